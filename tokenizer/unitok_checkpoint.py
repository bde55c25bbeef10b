"""UniTok's published checkpoint, `unitok_tokenizer.pth`, as a tokenizer of this package.

    vqrae import-unitok unitok_tokenizer.pth runs/unitok

Its codes are (B, n, N) in UniTok's code, (B, N, n) here.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.initialization import no_init_weights

from vqrae.common.checkpoints import require_finite
from vqrae.common.files import atomic_path
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.open_clip import (
    VITAMIN_KEYS,
    convert_text,
    load_weights,
    rename,
    vitamin_config,
)

PROJECTION_KEYS = (
    (r"^norm3\.", "linear_norm."),
    (r"^proj\.", "linear."),
    (r"^norm1\.", "attention_norm."),
    (r"^attn\.proj\.", "attention_out."),
    (r"^attn\.", ""),
    (r"^norm2\.", "mlp_norm."),
    (r"^mlp\.w0\.", "mlp.gate."),
    (r"^mlp\.w1\.", "mlp.up."),
    (r"^mlp\.w2\.", "mlp.down."),
)
DECODER_KEYS = (
    (r"^blocks\.", "blocks.layers."),
    (r"^up_conv4\.conv1\.", "up_conv4."),
    (r"^up_conv4\.norm1\.", "head_norm."),
    (r"^up_conv4\.conv2\.", "head."),
)
# Prefix in the checkpoint -> ours, and the names after it.
PARTS = {
    "encoder.": ("encoder.", VITAMIN_KEYS),
    "quant_proj.": ("in_proj.", PROJECTION_KEYS),
    "post_quant_proj.": ("out_proj.", PROJECTION_KEYS),
    "decoder.": ("decoder.", DECODER_KEYS),
    "fc_norm.": ("fc_norm.", ()),
    "projection.": ("image_projection.", ()),
}
# Without effect: a position that stays 0, the zeros in place of the keys' biases, a statistic.
ZEROS = re.compile(r"encoder\.pos_embed|(post_)?quant_proj\.attn\.zero_k_bias")
DROPPED = re.compile(r"quantizer\.codebooks\.\d+\.vocab_usage")
CODEBOOK = re.compile(r"quantizer\.codebooks\.(\d+)\.codebook\.weight")


def import_unitok(
    file: str | Path, out: str | Path, text_tokenizer: str | None = None
) -> VQRAEModel:
    """Write the tokenizer folder of a published checkpoint.

    Args:
        text_tokenizer: folder or hub id of CLIP's, which the checkpoint lacks, for the folder.
            None: the folder has none, and its model embeds no texts.

    Raises:
        ValueError: for another kind of file, or tensors that are unknown, missing, of another shape
            or not finite.
        FileExistsError: when `out` exists.
        FileNotFoundError: when there is no such text tokenizer.
    """
    if Path(out).exists():
        raise FileExistsError(f"{out} exists: give another folder")
    args, state = read_checkpoint(file)
    words = None
    if text_tokenizer is not None:
        try:
            words = AutoTokenizer.from_pretrained(text_tokenizer)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"text_tokenizer {text_tokenizer}: {reason} Give a folder, or an empty one for none"
            ) from error
        words.model_max_length = args["text_context_length"]
    with no_init_weights():  # all of them are loaded
        model = VQRAEModel(published_config(args)).eval()
    model.text_tokenizer = words
    load_published(model, state, str(file))
    with atomic_path(Path(out)) as temporary:
        model.save_pretrained(temporary)
    return model


def read_checkpoint(file: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of the published training, and the weights.

    Raises:
        ValueError: for a file that holds something else.
    """
    expected = "unitok_tokenizer.pth: {args, trainer: {unitok: weights}}"
    stored = load_weights(Path(file), expected)
    try:
        return dict(stored["args"]), dict(stored["trainer"]["unitok"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: got no {error}, expected {expected}") from error


def published_config(args: Mapping[str, Any]) -> VQRAEConfig:
    """The configuration of a tokenizer that was trained with these arguments."""
    encoder = vitamin_config(args["model"], args["img_size"]) | {"drop_path": args["drop_path"]}
    return VQRAEConfig(
        encoder_config=encoder,
        feature_tap="last_hidden_state",
        quantizer="mcq",
        codebook_size=args["vocab_size"] // args["num_codebooks"],
        codebook_dim=args["vocab_width"],
        num_codebooks=args["num_codebooks"],
        projection={"attn": "attention", "linear": "linear"}[args["quant_proj"]],
        projection_heads=encoder["hidden_size"] // args["vocab_width"],
        decoder="conv",
        text_config={
            "vocab_size": args["text_vocab_size"],
            "hidden_size": args["text_width"],
            "intermediate_size": 4 * args["text_width"],
            "num_hidden_layers": args["text_layers"],
            "num_attention_heads": args["text_heads"],
            "max_position_embeddings": args["text_context_length"],
            "projection_dim": args["embed_dim"],
            "hidden_act": "gelu",
            "eos_token_id": args["text_vocab_size"] - 1,
        },
    )


def load_published(model: VQRAEModel, state: Mapping[str, Tensor], source: str) -> None:
    """Load published weights, all of them and nothing else; errors: see `load_converted`."""
    # Not in the checkpoint: the statistics of feature_norm=standardize, which UniTok has not.
    own = {"feature_mean", "feature_std"}
    load_converted(model, convert_published(state), source, "models/unitok.py", own=own)


def load_converted(
    model: nn.Module,
    converted: Mapping[str, Tensor],
    source: str,
    published: str,
    *,
    own: Collection[str] = (),
) -> None:
    """Load weights under our names, all of them and nothing else.

    Args:
        source: where they are from.
        published: the file of UniTok's class that has them.
        own: what the model has and they do not.

    Raises:
        ValueError: for tensors that are unknown, missing, of another shape or not finite.
    """
    state = model.state_dict()
    expected = state.keys() - set(own)
    both = expected & converted.keys()
    wrong = {
        "unknown": converted.keys() - expected,
        "missing": expected - converted.keys(),
        "of another shape": {key for key in both if state[key].shape != converted[key].shape},
    }
    for what, keys in wrong.items():
        if keys:
            raise ValueError(
                f"{source}: {len(keys)} tensors are {what}, such as {min(keys)}: expected the "
                f"weights of UniTok's class (FoundationVision/UniTok, {published})"
            )
    model.load_state_dict(converted, strict=False)
    require_finite(model, source)


def convert_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names; unknown ones keep theirs.

    Raises:
        ValueError: when a tensor that has no place here is not 0.
    """
    converted: dict[str, Tensor] = {}
    codebooks: dict[int, Tensor] = {}
    text: dict[str, Tensor] = {}
    for key, tensor in state.items():
        prefix = next((each for each in PARTS if key.startswith(each)), "")
        if ZEROS.fullmatch(key):
            if tensor.any():
                raise ValueError(f"{key}: got values that are not 0, expected what was published")
        elif DROPPED.fullmatch(key):
            continue
        elif match := CODEBOOK.fullmatch(key):
            codebooks[int(match[1])] = tensor
        elif key.startswith("text_encoder."):
            text[key.removeprefix("text_encoder.")] = tensor
        elif prefix:
            ours, rules = PARTS[prefix]
            converted[ours + rename(key.removeprefix(prefix), rules)] = tensor
        else:
            converted[key] = tensor.flatten() if key == "logit_scale" else tensor
    if codebooks:
        tables = [codebooks[i] for i in sorted(codebooks)]
        converted["quantizer.codebook"] = torch.stack(tables)
    return converted | convert_text(text)
