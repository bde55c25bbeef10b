"""Assemble LLaVA-1.5 from a tokenizer and a language model, with nothing but classes of `transformers`.

The vision tower *is* the tokenizer's encoder (same class, same weights), so the folder opens in plain transformers,
peft, vLLM and lmms-eval. Its configuration carries the tokenizer's fingerprint under `vqrae_tokenizer_fingerprint`.
"""

import copy
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
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
from vqrae.common.files import require_same_tokenizer, weights_fingerprint
from vqrae.common.images import image_to_tensor
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.conversation import IMAGE_TOKEN, load_template

FINGERPRINT_KEY = "vqrae_tokenizer_fingerprint"
LLAVA_TAP = "hidden_states[-1]"
# "default" drops the first token, which is InternViT's class token; SigLIP has none.
ROWS_MULTIPLE = 64  # matrix shapes that kernels like
SELECT_STRATEGY = {"siglip_vision_model": "full", "internvl_vision": "default"}


def build_llava(
    tokenizer_folder: str | Path,
    llm_folder: str | Path,
    attn_implementation: str = "eager",
    *,
    chat_template: str = "chatml",
    aspect_ratio: Literal["crop", "pad"] = "crop",
    dtype: torch.dtype = torch.float32,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The tokenizer's encoder, a fresh two-layer projector (LLaVA's mlp2x_gelu) and a language model.

    Args:
        tokenizer_folder, llm_folder: run directory, checkpoint folder or hub id.
        attn_implementation: of tower and language model.
        chat_template: `chatml` or `vicuna_v1`; stored with the processor.
        aspect_ratio: of images that are not square, see `build_processor`.
        dtype: of all weights; float32 is what an optimizer needs unless DeepSpeed keeps master weights.

    Raises:
        ValueError: when LLaVA cannot read the tokenizer's features, when the text tokenizer lacks the template's end token, or
            when weights are missing or not finite.
    """
    folder = local_model(tokenizer_folder)
    # The check of the features runs in fp32, which flash-attention refuses.
    exact = "sdpa" if attn_implementation.startswith("flash_attention") else attn_implementation
    tokenizer = VQRAEModel.from_pretrained(folder, attn_implementation=exact).eval()
    _require_readable_features(tokenizer.config, folder)
    llm_name = resolve_model(llm_folder)
    llm = load_model(AutoModelForCausalLM, llm_name, dtype=dtype, attn_implementation=exact)
    llm.config._name_or_path = ""  # else a path of this machine gets into the model's config.json
    text_tokenizer = AutoTokenizer.from_pretrained(llm_name)
    prepare_text_tokenizer(text_tokenizer)
    add_rows(llm, len(text_tokenizer))
    processor = build_processor(tokenizer.config, text_tokenizer, chat_template, aspect_ratio)
    model = _assemble(tokenizer, llm, processor)
    model.set_attn_implementation(exact)  # the new LlavaConfig has reset it in its parts
    setattr(model.config, FINGERPRINT_KEY, weights_fingerprint(folder))
    check_features(model, processor, tokenizer)
    model.set_attn_implementation(attn_implementation)
    # Not the whole model: the frequencies of the language model's rotary positions stay in fp32.
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.to(dtype)
    keep_released_names(model)
    return model, processor


def keep_released_names(model: LlavaForConditionalGeneration) -> None:
    """Let `save_pretrained` write the names of released LLaVA checkpoints, `vision_tower.vision_model.…`.

    vLLM knows no others. transformers reads both, and writes back what it has read; a model that it has not loaded itself, or
    from a folder without `vision_model`, it writes without.
    """
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def require_tokenizer(
    config: LlavaConfig, tokenizer_folder: str | Path, artefact: str | Path
) -> None:
    """Refuse a model that was built on another tokenizer.

    Raises:
        ValueError: naming both fingerprints, or saying that the model carries none.
    """
    found = getattr(config, FINGERPRINT_KEY, None)
    if found is None:
        raise ValueError(
            f"{artefact}: got no {FINGERPRINT_KEY} in its config.json, expected a model built by this package"
        )
    require_same_tokenizer(weights_fingerprint(local_model(tokenizer_folder)), found, str(artefact))


def _require_readable_features(config: VQRAEConfig, folder: Path) -> None:
    if config.feature_tap != LLAVA_TAP:
        raise ValueError(
            f"{folder}: got a tokenizer with feature_tap {config.feature_tap!r}, expected {LLAVA_TAP!r}, the only one that "
            f"plain LLaVA can feed to its projector: set feature_tap to {LLAVA_TAP!r} and train the tokenizer again"
        )


def load_processor(
    tokenizer_folder: str | Path,
    llm_folder: str | Path,
    *,
    chat_template: str = "chatml",
    aspect_ratio: Literal["crop", "pad"] = "crop",
) -> LlavaProcessor:
    """The processor that `build_llava` makes, without the weights of either."""
    config = VQRAEConfig.from_pretrained(local_model(tokenizer_folder))
    text_tokenizer = AutoTokenizer.from_pretrained(resolve_model(llm_folder))
    prepare_text_tokenizer(text_tokenizer)
    return build_processor(config, text_tokenizer, chat_template, aspect_ratio)


def prepare_text_tokenizer(text_tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the text tokenizer `<image>` and a padding token."""
    if IMAGE_TOKEN not in text_tokenizer.get_vocab():
        text_tokenizer.add_tokens(
            [AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True
        )
    if text_tokenizer.pad_token is None:
        text_tokenizer.pad_token = text_tokenizer.unk_token or text_tokenizer.eos_token
    # For whoever generates in batches from the saved folder; the collator pads on the right by itself.
    text_tokenizer.padding_side = "left"


def add_rows(llm: PreTrainedModel, num_tokens: int) -> None:
    """Give the model an embedding for every token."""
    if num_tokens > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(num_tokens, pad_to_multiple_of=ROWS_MULTIPLE)


def build_processor(
    config: VQRAEConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    chat_template: str = "chatml",
    aspect_ratio: Literal["crop", "pad"] = "crop",
) -> LlavaProcessor:
    """The processor.

    Args:
        aspect_ratio: `crop` resizes images by their shorter edge and cuts out the centre; `pad` first makes them square by
            a border in the mean colour, as LLaVA-1.5 does in sft and inference (its pretraining crops: `for_pretraining`).

    Raises:
        ValueError: when the text tokenizer lacks the end token of the template.
    """
    end = end_token(text_tokenizer, chat_template)
    if end not in text_tokenizer.get_vocab():
        raise ValueError(
            f"chat_template: got {chat_template!r}, whose end token {end!r} the text tokenizer does not know: set another one"
        )
    size = config.image_size
    strategy = SELECT_STRATEGY[config.build_encoder_config().model_type]
    image_class, options = {
        "crop": (SiglipImageProcessor, {}),
        "pad": (LlavaImageProcessor, {"do_pad": True, "do_convert_rgb": True}),
    }[aspect_ratio]
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
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=load_template(chat_template, text_tokenizer),
        image_token=IMAGE_TOKEN,
    )


def for_pretraining(processor: LlavaProcessor) -> LlavaProcessor:
    """The processor with which captions are trained: as LLaVA-1.5's pretrain.sh, it cuts out the centre and never pads."""
    processor = copy.deepcopy(processor)
    if getattr(processor.image_processor, "do_pad", None):
        processor.image_processor.do_pad = False
    return processor


def end_token(text_tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    """The token that ends an answer."""
    return "<|im_end|>" if chat_template == "chatml" else text_tokenizer.eos_token


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


def _assemble(
    tokenizer: VQRAEModel, llm: PreTrainedModel, processor: LlavaProcessor
) -> LlavaForConditionalGeneration:
    """Put loaded parts into an empty LLaVA: only the projector is initialised, by `nn.Linear`'s rule as in LLaVA."""
    config = llava_config(
        tokenizer.config,
        llm.config,
        processor.image_token_id,
        vision_config=tokenizer.encoder.config,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tokenizer.encoder
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    text_tokenizer = processor.tokenizer
    chatml = "<|im_end|>" in processor.chat_template
    model.generation_config = GenerationConfig(
        eos_token_id=text_tokenizer.convert_tokens_to_ids(
            end_token(text_tokenizer, "chatml" if chatml else "vicuna_v1")
        ),
        bos_token_id=text_tokenizer.bos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
    )
    assert not any(parameter.is_meta for parameter in model.parameters()), (
        "a part of LLaVA was not filled in"
    )
    return model


@torch.no_grad()
def check_features(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tokenizer: VQRAEModel
) -> None:
    """Refuse a model whose projector reads anything else than `tokenizer.encode_features`, tried on one noise image.

    Raises:
        ValueError: for another number of tokens or other values.
    """
    size = tokenizer.config.image_size
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    )
    expected = tokenizer.encode_features(image_to_tensor(image)[None])
    inputs = processor(images=image, text=IMAGE_TOKEN, return_tensors="pt")
    received: list[torch.Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: received.append(args[0])
    )
    try:
        model.get_image_features(inputs["pixel_values"])
    finally:
        hook.remove()
    num_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    if not num_tokens == received[0].shape[1] == expected.shape[1]:
        raise ValueError(
            f"got {num_tokens} image tokens and {received[0].shape[1]} features, expected {expected.shape[1]}: "
            "the processor does not fit the tokenizer"
        )
    difference = (received[0] - expected).abs().max().item()
    if difference > 1e-4 * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"the projector's input differs from encode_features by up to {difference:.3g}, expected the same"
        )
