"""Configuration of the generator: one YAML file, sections for extraction and training."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vqrae.common.config import check_range
from vqrae.common.run import RunConfig
from vqrae.common.trainer import OptimizationConfig
from vqrae.data.samples import Crop
from vqrae.generation.sampling import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """Images -> code shards (`vqrae.generation.extract_codes`)."""

    tokenizer: str
    """Run directory, checkpoint folder or hub id of the visual tokenizer."""
    source: str
    """Captioned images: scenes, emoji, FILE.jsonl, FILE.tar, hf:NAME or a mixture."""
    output_dir: str
    size: int | None = None
    """Images to take; null takes all."""
    split: Literal["train", "validation", "all"] = "train"
    captions_per_image: int = 1
    """Wordings of each scene; any other source has one caption for each image."""
    crop: Crop = "center"
    """Square that is cut out of an image: center (Table 9), random, zoom or ten (LlamaGen)."""
    crops_per_image: int = 1
    """Crops of each image with random, zoom or ten, each an entry of its own."""
    shard_size: int = 8192
    """Images of one shard, the unit of resuming and of sharing among processes."""
    batch_size: int = 64
    num_workers: int = 0
    seed: int = 0
    """Of scenes and random crops."""

    def __post_init__(self) -> None:
        check_range(self, "size", "captions_per_image", "shard_size", "batch_size", low=1)
        check_range(self, "num_workers", low=0)
        if self.crops_per_image < 1 or (self.crops_per_image > 1 and self.crop == "center"):
            raise ValueError(
                f"got crops_per_image {self.crops_per_image} with crop {self.crop}, "
                "expected 1 with center: set crop=random, zoom or ten for several"
            )


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """The head that predicts several codes a position, one after the other."""

    num_layers: int = 3
    """Of the language model's own kind and width."""
    positions: bool = True
    """RoPE positions 0 … n - 1 (UniTok's MLLM); off in its class-conditional generator."""
    z_loss: float = 5e-5
    """Weight of the mean squared largest logit."""
    zero_start: bool = False
    """The classifier starts at zero (LlamaGen), all codes equally likely."""

    def __post_init__(self) -> None:
        check_range(self, "num_layers", low=1)
        check_range(self, "z_loss", low=0)


@dataclass(frozen=True, kw_only=True)
class GeneratorModelConfig:
    """The language model, its vocabulary, its prompts."""

    offset: int = 0
    """First visual id: 151936 for Qwen3-0.6B; room for the words of a small model."""
    condition: Literal["text", "class"] = "text"
    """What an image is drawn from: its caption in `prompt_template`, or its caption as the name of
    a class, which is one id."""
    llm: str | None = None
    """Folder or hub id of a pretrained Qwen3; null builds `llm_config` with random weights and a
    tokenizer of the most frequent words of the data."""
    llm_config: dict[str, Any] | None = None
    """`Qwen3Config` fields of a new model; together with `llm`, of that model, for dry runs on a
    machine without it. With several codes a position also of another `model_type`."""
    prompt_template: str = "{caption}"
    max_caption_tokens: int = 448
    max_length: int = 1536
    """Longest sequence, prompt and codes; longer captions lose their end."""
    caption_dropout: float = 0.1
    """Share of samples whose caption is emptied, so that guidance works."""
    embedding_init: Literal["random", "codebook"] = "random"
    """Where the rows of the codes start, one code a position: like any new row, or from the code
    vectors."""
    code_embedding: Literal["tokenizer", "tables"] = "tokenizer"
    """How several codes a position are read: from the tokenizer's frozen codebooks through a
    causal copy of its output projection and an MLP (UniTok), or as the sum of learned tables
    (LlamaGen)."""
    depth: DepthConfig = field(default_factory=DepthConfig)
    """The head for several codes a position."""
    positions: Literal["sequence", "grid"] = "sequence"
    """RoPE of the language model, or LlamaGen's in two dimensions, for several codes a position and
    prompts of one id."""
    dropout: float = 0.0
    """Share of input vectors, and of what every layer adds to them, that is dropped, with several
    codes a position."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How to sample from the trained model unless asked otherwise; written to its `config.json`."""
    attention: str = "auto"

    def __post_init__(self) -> None:
        check_range(self, "max_caption_tokens", "max_length", low=1)
        check_range(self, "offset", low=0)
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout: got {self.caption_dropout}, expected 0 <= p < 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, expected 0 <= p < 1")
        if self.positions == "grid" and self.condition != "class":
            raise ValueError(
                "positions: got grid, but prompts of text have several ids: set condition=class"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """Code shards or captioned images -> generator (`vqrae.generation.train`)."""

    tokenizer: str
    """The visual tokenizer that made the codes, or makes them while training."""
    data: str
    """Folder of code shards, captioned images as for extraction, or a mixture of both."""
    model: GeneratorModelConfig
    optimization: OptimizationConfig
    full_vocabulary_loss: bool = False
    """Softmax over text ids too. Off: over the codes only, as in sampling; faster, and a tenth of
    the memory."""
    dry_run: int = 0
    """Take that many steps of the longest sequences with random codes, keep nothing, and report
    parameters, memory and time."""
    previews: int = 8
    """Images generated next to each checkpoint, for people; none under ZeRO-3."""

    def __post_init__(self) -> None:
        check_range(self, "dry_run", "previews", low=0)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """A whole YAML file."""

    extraction: ExtractionConfig
    training: TrainingConfig
