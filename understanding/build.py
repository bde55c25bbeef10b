"""LLaVA-1.5 from a tokenizer and a language model, with nothing but classes of transformers.

The vision tower *is* the tokenizer's encoder (same class, same weights), so the folder opens in
plain transformers, peft, vLLM and lmms-eval. Its configuration carries the tokenizer's fingerprint.
Features that no encoder of transformers gives have a tower of ours, see `vision_tower`.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
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
from vqrae.common.files import require_same_tokenizer, weights_fingerprint
from vqrae.common.images import image_to_tensor
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.conversation import IMAGE_TOKEN, load_template, num_image_tokens
from vqrae.understanding.vision_tower import (
    SELECT_STRATEGY,
    BorderImageProcessor,
    Features,
    VQRAEFeatures,
    tower_config,
)

FINGERPRINT_KEY = "vqrae_tokenizer_fingerprint"
LLAVA_TAP = "hidden_states[-1]"
ROWS_MULTIPLE = 64  # matrix shapes that kernels like
AspectRatio = Literal["crop", "pad"]
Color = tuple[int, int, int]


def build_llava(
    tokenizer_folder: str | Path,
    llm_folder: str | Path,
    attn_implementation: str = "eager",
    *,
    features: Features = "continuous",
    chat_template: str = "chatml",
    aspect_ratio: AspectRatio = "crop",
    border_color: Color | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The tokenizer's encoder, a fresh two-layer projector (LLaVA's mlp2x_gelu), a language model.

    Args:
        tokenizer_folder, llm_folder: run directory, checkpoint folder or hub id.
        attn_implementation: of tower and language model.
        features: what the projector reads: `continuous` or `quantized`.
        chat_template: `chatml` or `vicuna_v1`; stored with the processor.
        aspect_ratio, border_color: of images that are not square, see `build_processor`.
        dtype: of all weights but those that choose codes, which stay in float32; an optimizer
            needs float32 unless DeepSpeed keeps master weights.

    Raises:
        ValueError: when LLaVA cannot read the tokenizer's features, when the text tokenizer lacks
            the template's end token, or when weights are missing or not finite.
    """
    folder, llm_name = local_model(tokenizer_folder), resolve_model(llm_folder)
    # The check of the features runs in fp32, which flash-attention refuses.
    exact = "sdpa" if attn_implementation.startswith("flash_attention") else attn_implementation
    tokenizer = VQRAEModel.from_pretrained(folder, attn_implementation=exact).eval()
    vision_config = tower_config(tokenizer.config, features)
    is_plain = vision_config.model_type in SELECT_STRATEGY
    if is_plain and tokenizer.config.feature_tap != LLAVA_TAP:
        raise ValueError(
            f"{folder}: got feature_tap {tokenizer.config.feature_tap!r}, expected {LLAVA_TAP!r}, "
            "which alone plain LLaVA can read: set it and train the tokenizer again"
        )
    llm = load_model(AutoModelForCausalLM, llm_name, dtype=dtype, attn_implementation=exact)
    llm.config._name_or_path = ""  # else a path of this machine gets into the model's config.json
    text_tokenizer = AutoTokenizer.from_pretrained(llm_name)
    processor = build_processor(
        tokenizer.config, text_tokenizer, chat_template, aspect_ratio, border_color, features
    )
    add_rows(llm, len(text_tokenizer))

    tower = tokenizer.encoder
    if not is_plain:
        options = {"config": vision_config, "attn_implementation": exact}
        tower = VQRAEFeatures.from_pretrained(folder, **options)
        tower.config._name_or_path = ""
    config = llava_config(tokenizer.config, llm.config, processor.image_token_id, tower.config)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
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
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        cast_parameters(part, dtype)
    keep_released_names(model)
    return model, processor


def llava_config(
    tokenizer: VQRAEConfig,
    text_config: PreTrainedConfig,
    image_token_id: int,
    vision_config: PreTrainedConfig | None = None,
) -> LlavaConfig:
    """LLaVA-1.5's configuration for a tokenizer and a language model."""
    vision_config = vision_config or tower_config(tokenizer)
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=tokenizer.grid_size**2,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy=SELECT_STRATEGY.get(vision_config.model_type, "full"),
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
        ValueError: naming both fingerprints, or saying that the model carries none; see also
            `require_own_features`.
    """
    require_own_features(config.to_dict(), artefact)
    found = getattr(config, FINGERPRINT_KEY, None)
    if found is None:
        raise ValueError(
            f"{artefact}: got no {FINGERPRINT_KEY} in its config.json, expected a model of "
            "this package"
        )
    require_same_tokenizer(weights_fingerprint(local_model(tokenizer_folder)), found, str(artefact))


def require_own_features(config: Mapping[str, Any], artefact: str | Path) -> None:
    """Refuse a folder of before the tower of quantized features, which it needs and does not hold.

    Args:
        config: the values of its config.json.

    Raises:
        ValueError: saying what to do.
    """
    if config.get("vqrae_features") == "quantized":
        raise ValueError(
            f"{artefact} was trained on quantized features by an earlier version, whose folders do "
            "not hold what quantizes: train it again with features=quantized"
        )


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the precision of weights alone.

    Buffers stay in fp32: the frequencies of rotary positions, and what chooses codes.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def check_features(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tokenizer: VQRAEModel
) -> None:
    """Refuse a model whose projector does not read the tokenizer's features of a noise image.

    Raises:
        ValueError: for another number of tokens or other values.
    """
    size = tokenizer.config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    images = image_to_tensor(image)[None]
    is_quantized = getattr(model.config.vision_config, "features", "continuous") == "quantized"
    name = "quantized_features" if is_quantized else "encode_features"
    expected = getattr(tokenizer, name)(images)
    received: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: received.append(args[0])
    )
    pixel_values = tokenizer.normalize(images)
    model.get_image_features(pixel_values)
    hook.remove()
    num_tokens, num_features = num_image_tokens(processor), received[0].shape[1]
    if not num_tokens == num_features == expected.shape[1]:
        raise ValueError(
            f"got {num_tokens} image tokens and {num_features} features, "
            f"expected {expected.shape[1]}: the processor does not fit the tokenizer"
        )
    processed = processor.image_processor(image, return_tensors="pt").pixel_values
    for what, found, wanted in (
        (
            "the processor's output differs from the tokenizer's normalisation",
            processed,
            pixel_values,
        ),
        (f"the projector's input differs from {name}", received[0], expected),
    ):
        difference = (found - wanted).abs().max().item()
        if difference > 1e-4 * max(1.0, wanted.abs().max().item()):
            raise ValueError(f"{what} by up to {difference:.3g}")


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
    border_color: Color | None = None,
    features: Features = "continuous",
) -> LlavaProcessor:
    """Image processor of a tokenizer and text tokenizer, which gets `<image>` and a padding token.

    Args:
        aspect_ratio: `crop` resizes images by their shorter edge and cuts out the centre; `pad`
            makes them square by a border, as LLaVA-1.5 does in sft and inference.
        border_color: RGB of 0 to 255; None: the mean of the normalisation.
        features: what the projector reads.

    Raises:
        ValueError: when the text tokenizer lacks the end token of the template, or when a folder
            of classes of transformers cannot hold the border's colour.
    """
    vision_config = tower_config(config, features)
    strategy = SELECT_STRATEGY.get(vision_config.model_type)
    if border_color is not None and strategy is not None:
        raise ValueError(
            f"border_color: got {border_color} for a plain LLaVA folder, which pads in the mean "
            "colour: set features=quantized or border_color="
        )
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
    image_class: type = SiglipImageProcessor
    options: dict[str, Any] = {}
    if aspect_ratio == "pad":
        image_class, options = LlavaImageProcessor, {"do_pad": True, "do_convert_rgb": True}
        if border_color is not None:
            image_class, options["border_color"] = BorderImageProcessor, border_color
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
    return LlavaProcessor(
        image_processor,
        text_tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy=strategy or "full",
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
