"""LLaVA-1.5 from a tokenizer and a language model, with nothing but classes of transformers.

The vision tower *is* the tokenizer's encoder (same class, same weights), so the folder opens in
plain transformers, peft, vLLM and lmms-eval. Its configuration carries the tokenizer's fingerprint.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vqrae.common.checkpoints import load_model, local_model, resolve_model
from vqrae.common.distributed import gathered
from vqrae.common.files import atomic_path, require_same_tokenizer, weights_fingerprint
from vqrae.common.images import image_to_tensor
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.conversation import IMAGE_TOKEN, load_template, num_image_tokens

FINGERPRINT_KEY = "vqrae_tokenizer_fingerprint"
FEATURES_KEY = "vqrae_features"
QUANTIZED = "quantized"
LLAVA_TAP = "hidden_states[-1]"
ROWS_MULTIPLE = 64  # matrix shapes that kernels like
# "default" drops the first token, which is InternViT's class token; SigLIP has none.
SELECT_STRATEGY = {"siglip_vision_model": "full", "internvl_vision": "default"}
AspectRatio = Literal["crop", "pad"]


def build_llava(
    tokenizer_folder: str | Path,
    llm_folder: str | Path,
    attn_implementation: str = "eager",
    *,
    chat_template: str = "chatml",
    aspect_ratio: AspectRatio = "crop",
    dtype: torch.dtype = torch.float32,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The tokenizer's encoder, a fresh two-layer projector (LLaVA's mlp2x_gelu), a language model.

    Args:
        tokenizer_folder, llm_folder: run directory, checkpoint folder or hub id.
        attn_implementation: of tower and language model.
        chat_template: `chatml` or `vicuna_v1`; stored with the processor.
        aspect_ratio: of images that are not square, see `build_processor`.
        dtype: of all weights; an optimizer needs float32 unless DeepSpeed keeps master weights.

    Raises:
        ValueError: when LLaVA cannot read the tokenizer's features, when the text tokenizer lacks
            the template's end token, or when weights are missing or not finite.
    """
    folder, llm_name = local_model(tokenizer_folder), resolve_model(llm_folder)
    # The check of the features runs in fp32, which flash-attention refuses.
    exact = "sdpa" if attn_implementation.startswith("flash_attention") else attn_implementation
    tokenizer = VQRAEModel.from_pretrained(folder, attn_implementation=exact).eval()
    if tokenizer.config.feature_tap != LLAVA_TAP:
        raise ValueError(
            f"{folder}: got feature_tap {tokenizer.config.feature_tap!r}, expected {LLAVA_TAP!r}, "
            "which alone plain LLaVA can read: set it and train the tokenizer again"
        )
    llm = load_model(AutoModelForCausalLM, llm_name, dtype=dtype, attn_implementation=exact)
    llm.config._name_or_path = ""  # else a path of this machine gets into the model's config.json
    text_tokenizer = AutoTokenizer.from_pretrained(llm_name)
    processor = build_processor(tokenizer.config, text_tokenizer, chat_template, aspect_ratio)
    add_rows(llm, len(text_tokenizer))

    vision_config = tokenizer.encoder.config
    config = llava_config(tokenizer.config, llm.config, processor.image_token_id, vision_config)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tokenizer.encoder
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    # The only part that is initialised, by the rule of `nn.Linear` as in LLaVA.
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.generation_config = GenerationConfig(
        eos_token_id=text_tokenizer.convert_tokens_to_ids(end_token(text_tokenizer, chat_template)),
        bos_token_id=text_tokenizer.bos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
    )
    setattr(model.config, FINGERPRINT_KEY, weights_fingerprint(folder))

    model.set_attn_implementation(exact)  # the new LlavaConfig has reset it in its parts
    check_features(model, processor, tokenizer)
    model.set_attn_implementation(attn_implementation)
    # Not the whole model: the frequencies of the rotary positions stay in fp32.
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.to(dtype)
    keep_released_names(model)
    return model, processor


def llava_config(
    tokenizer: VQRAEConfig,
    text_config: PreTrainedConfig,
    image_token_id: int,
    vision_config: PreTrainedConfig | None = None,
) -> LlavaConfig:
    """LLaVA-1.5's configuration for a tokenizer and a language model."""
    vision_config = vision_config or tokenizer.build_encoder_config()
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=tokenizer.grid_size**2,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy=SELECT_STRATEGY[vision_config.model_type],
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def keep_released_names(model: LlavaForConditionalGeneration) -> None:
    """Let `save_pretrained` write the names of released LLaVA checkpoints, which vLLM needs.

    transformers reads `vision_tower.vision_model.…` and the names without `vision_model`. It
    writes the latter for a model that it has not loaded itself, or has loaded from such names.
    """
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def require_tokenizer(
    config: PreTrainedConfig, tokenizer_folder: str | Path, artefact: str | Path
) -> None:
    """Refuse a model that was built on another tokenizer.

    Raises:
        ValueError: naming both fingerprints, or saying that the model carries none.
    """
    found = getattr(config, FINGERPRINT_KEY, None)
    if found is None:
        raise ValueError(
            f"{artefact}: got no {FINGERPRINT_KEY} in its config.json, expected a model of "
            "this package"
        )
    require_same_tokenizer(weights_fingerprint(local_model(tokenizer_folder)), found, str(artefact))


@torch.no_grad()
def check_features(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tokenizer: VQRAEModel
) -> None:
    """Refuse a model whose projector does not read `encode_features`, tried on a noise image.

    Raises:
        ValueError: for another number of tokens or other values.
    """
    size = tokenizer.config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = tokenizer.encode_features(image_to_tensor(image)[None])
    received: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: received.append(args[0])
    )
    model.get_image_features(processor.image_processor(image, return_tensors="pt").pixel_values)
    hook.remove()
    num_tokens, num_features = num_image_tokens(processor), received[0].shape[1]
    if not num_tokens == num_features == expected.shape[1]:
        raise ValueError(
            f"got {num_tokens} image tokens and {num_features} features, "
            f"expected {expected.shape[1]}: the processor does not fit the tokenizer"
        )
    difference = (received[0] - expected).abs().max().item()
    if difference > 1e-4 * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"the projector's input differs from encode_features by up to {difference:.3g}"
        )


# ---- processor and vocabulary


def load_processor(
    tokenizer_folder: str | Path, llm_folder: str | Path, **options: Any
) -> LlavaProcessor:
    """The processor that `build_llava` makes, without the weights of either; options as there."""
    config = VQRAEConfig.from_pretrained(local_model(tokenizer_folder))
    text_tokenizer = AutoTokenizer.from_pretrained(resolve_model(llm_folder))
    return build_processor(config, text_tokenizer, **options)


def build_processor(
    config: VQRAEConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    chat_template: str = "chatml",
    aspect_ratio: AspectRatio = "crop",
) -> LlavaProcessor:
    """Image processor of a tokenizer and text tokenizer, which gets `<image>` and a padding token.

    Args:
        aspect_ratio: `crop` resizes images by their shorter edge and cuts out the centre; `pad`
            makes them square by a border in the mean colour, as LLaVA-1.5 does in sft and
            inference.

    Raises:
        ValueError: when the text tokenizer lacks the end token of the template.
    """
    end = end_token(text_tokenizer, chat_template)
    if end not in text_tokenizer.get_vocab():
        raise ValueError(
            f"chat_template: got {chat_template!r}, whose end token {end!r} the text tokenizer "
            "does not know: set another one"
        )
    if IMAGE_TOKEN not in text_tokenizer.get_vocab():
        token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        text_tokenizer.add_tokens([token], special_tokens=True)
    if text_tokenizer.pad_token is None:
        text_tokenizer.pad_token = text_tokenizer.unk_token or text_tokenizer.eos_token
    # For those who generate in batches from the saved folder; the collator pads on the right.
    text_tokenizer.padding_side = "left"
    image_class, options = {
        "crop": (SiglipImageProcessor, {}),
        "pad": (LlavaImageProcessor, {"do_pad": True, "do_convert_rgb": True}),
    }[aspect_ratio]
    size = config.image_size
    image_processor = image_class(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_center_crop=True,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        resample=Image.Resampling.BICUBIC,
        **options,
    )
    strategy = SELECT_STRATEGY[config.build_encoder_config().model_type]
    return LlavaProcessor(
        image_processor,
        text_tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=load_template(chat_template, text_tokenizer),
        image_token=IMAGE_TOKEN,
    )


def for_pretraining(processor: LlavaProcessor) -> LlavaProcessor:
    """The processor for captions, which as LLaVA-1.5's pretrain.sh crops and never pads."""
    processor = copy.deepcopy(processor)
    if hasattr(processor.image_processor, "do_pad"):
        processor.image_processor.do_pad = False
    return processor


def end_token(text_tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    """The token that ends an answer."""
    return "<|im_end|>" if chat_template == "chatml" else text_tokenizer.eos_token


def add_rows(llm: PreTrainedModel, num_tokens: int) -> None:
    """Give the model an embedding for every token."""
    if num_tokens > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(num_tokens, pad_to_multiple_of=ROWS_MULTIPLE)


@torch.no_grad()
def add_word_rows(model: PreTrainedModel, first: int, end: int) -> None:
    """Start the rows of the ids from `first` to `end` where the known words are.

    That is their mean with a tenth of their spread: rows that were padding before have been trained
    to be never chosen. The numbers depend on nothing else, so that a resumed run and a merged
    adapter find the same rows.
    """
    add_rows(model, end)
    noise = torch.Generator().manual_seed(first)
    weights = [model.get_input_embeddings().weight]
    if (head := model.get_output_embeddings().weight) is not weights[0]:  # not tied
        weights.append(head)
    for weight in weights:
        with gathered(weight):
            known = weight[:first].float()
            rows = torch.randn(end - first, weight.shape[1], generator=noise).to(weight.device)
            weight[first:end] = (known.mean(0) + 0.1 * known.std(0) * rows).to(weight.dtype)


# ---- the projector in LLaVA's own file

PROJECTOR = "multi_modal_projector."  # in the names of weights
PROJECTOR_FILE = "mm_projector.bin"
# LLaVA's nn.Sequential of linear, GELU, linear has names of its own for the same two layers.
PROJECTOR_NAMES = {
    "0.weight": "linear_1.weight",
    "0.bias": "linear_1.bias",
    "2.weight": "linear_2.weight",
    "2.bias": "linear_2.bias",
}


def save_projector(weights: dict[str, Tensor], path: str | Path) -> None:
    """Write the projector among the weights of a LLaVA as LLaVA-1.5 does, `mm_projector.bin`."""
    ours = {name.partition(PROJECTOR)[2]: weight for name, weight in weights.items()}
    state = {
        f"model.mm_projector.{theirs}": ours[name].detach().cpu().clone()
        for theirs, name in PROJECTOR_NAMES.items()
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        torch.save(state, stream)  # given a path, it writes that into the file


def extract_projector(model: Path, path: Path) -> None:
    """Write the projector of a saved LLaVA folder as LLaVA's file."""
    weights: dict[str, Tensor] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            names = [name for name in stored.keys() if PROJECTOR in name]  # noqa: SIM118
            weights |= {name: stored.get_tensor(name) for name in names}
    save_projector(weights, path)


def load_projector(projector: nn.Module, path: str | Path) -> None:
    """Put the weights of LLaVA's file into a `LlavaMultiModalProjector`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds no two-layer projector, or one of other widths.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"projector {path} does not exist: give the mm_projector.bin of a LLaVA pretraining"
        )
    stored = torch.load(path, map_location="cpu", weights_only=True)
    # What precedes `mm_projector.` depends on the program that wrote the file.
    found = {
        name.rpartition("mm_projector.")[2]: value
        for name, value in stored.items()
        if "mm_projector." in name
    }
    if found.keys() != PROJECTOR_NAMES.keys():
        raise ValueError(
            f"{path}: got a projector with {', '.join(sorted(found)) or 'no weights'}, "
            f"expected {', '.join(PROJECTOR_NAMES)}"
        )
    expected = projector.state_dict()
    for theirs, name in PROJECTOR_NAMES.items():
        shape, wanted = tuple(found[theirs].shape), tuple(expected[name].shape)
        if shape != wanted:
            raise ValueError(
                f"{path}: {theirs} has shape {shape}, expected {wanted}: "
                "it was trained for another encoder or language model"
            )
        expected[name] = found[theirs]
    projector.load_state_dict(expected)


# ---- quantized features, for one comparison only


def read_quantized_features(model: PreTrainedModel, tokenizer_folder: str | Path) -> None:
    """Let the projector read what the decoder reads, in the width of the continuous features.

    VQRAE shows continuous features to the language model (arXiv 2511.23386, section 3.4); this is
    the other side of that comparison. The folder stays that of a plain LLaVA, so all who open it
    must quantize too: `Chat.from_pretrained(…, tokenizer=…)` does.

    Raises:
        ValueError: when the model was built on another tokenizer.
    """
    require_tokenizer(model.config, tokenizer_folder, "the model")
    tokenizer = VQRAEModel.from_pretrained(local_model(tokenizer_folder))
    tokenizer.eval().requires_grad_(False)

    def quantize(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        [features_BND] = args
        tokenizer.to(features_BND.device)
        with torch.no_grad(), torch.autocast(features_BND.device.type, enabled=False):
            quantized_BNE = tokenizer.quantizer(tokenizer.project(features_BND)).quantized
            quantized_BND = tokenizer.out_proj(quantized_BNE)
        return (quantized_BND.to(features_BND.dtype),)

    model.model.multi_modal_projector.register_forward_pre_hook(quantize)
    setattr(model.config, FEATURES_KEY, QUANTIZED)


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether a model was trained on quantized features."""
    return getattr(config, FEATURES_KEY, None) == QUANTIZED
