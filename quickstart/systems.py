"""The two systems of the quickstart: what their pipelines and their reports differ in."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Curve(NamedTuple):
    """One metric of one training run, whose directory is `folder` in that of the quickstart."""

    title: str
    folder: str
    key: str
    caption: str


VQRAE_CURVES = (
    Curve("Encoder", "encoder", "loss", "contrastive loss of images and captions"),
    Curve(
        "Tokenizer, stage 1",
        "tokenizer/stage1",
        "reconstruction_loss",
        "reconstruction loss, encoder frozen",
    ),
    Curve(
        "Tokenizer, stage 2",
        "tokenizer/stage2",
        "reconstruction_loss",
        "reconstruction loss, encoder trained",
    ),
    Curve("Codebook", "tokenizer/stage2", "codebook_usage", "share of the codes in use, stage 2"),
)
UNITOK_CURVES = (
    Curve("Tokenizer", "tokenizer/stage1", "reconstruction_loss", "reconstruction loss"),
    Curve(
        "Tokenizer, captions",
        "tokenizer/stage1",
        "contrastive_loss",
        "contrastive loss of quantized images and captions",
    ),
    Curve("Codebooks", "tokenizer/stage1", "codebook_usage", "share of the codes in use"),
    Curve("Unified model", "mllm", "loss", "next code or word, nats"),
)
CURVES = (
    Curve("Language model", "llm", "loss", "next word, text alone, nats"),
    Curve(
        "Understanding, pretrain",
        "understanding/pretrain",
        "loss",
        "next word, projector trained, nats",
    ),
    Curve(
        "Understanding, sft",
        "understanding/sft",
        "loss",
        "answers, language model trained too, nats",
    ),
    Curve("Generator", "generation", "loss", "next code, nats"),
)


@dataclass(frozen=True, kw_only=True)
class System:
    """A tokenizer with what is trained before and on it."""

    name: str
    paper: str
    directory: str
    """Folder of its run, unless another is asked for."""
    tokenizer: str
    """Its configuration in tokenizer/configs."""
    steps: dict[str, int]
    """Optimizer steps at the reference minutes of its encoder, where one is pretrained, of the
    tokenizer's stages, and of the unified model; others replace those that both systems share."""
    bypass: str = ""
    """The stage with a continuous warm-up, if any."""
    features: Literal["continuous", "quantized"]
    """What understanding reads."""
    unified: bool
    """Whether a unified model is trained too."""
    curves: tuple[Curve, ...]
    """What its report shows of the trainings."""


SYSTEMS = {
    "vqrae": System(
        name="VQRAE",
        paper="VQRAE: Representation Quantization Autoencoders for Multimodal Understanding, "
        "Generation and Reconstruction, arXiv 2511.23386",
        directory="runs/quickstart",
        tokenizer="tiny",
        steps={"encoder": 500, "tokenizer.stage1": 50, "tokenizer.stage2": 700},
        bypass="stage2",
        features="continuous",
        unified=False,
        curves=VQRAE_CURVES + CURVES,
    ),
    "unitok": System(
        name="UniTok",
        paper="UniTok: A Unified Tokenizer for Visual Generation and Understanding, "
        "arXiv 2502.20321",
        directory="runs/quickstart_unitok",
        tokenizer="unitok_tiny",
        # A step of the generator with a depth head takes five times as long as one without.
        steps={"tokenizer.stage1": 700, "mllm": 1200, "generation": 500},
        features="quantized",
        unified=True,
        curves=UNITOK_CURVES + CURVES,
    ),
}
