"""Models from and for other packages, and what a training would need."""

from dataclasses import dataclass

from transformers.utils import logging

from vqrae.common.checkpoints import count_parameters
from vqrae.common.config import check_range
from vqrae.mllm.unitok_checkpoint import import_mllm
from vqrae.planning.plan import GPU_COUNTS, plan, render
from vqrae.tokenizer.unitok_checkpoint import import_unitok
from vqrae.understanding.graft import graft


@dataclass(frozen=True, kw_only=True)
class Graft:
    """Put a tokenizer's encoder into InternVL3; plain transformers opens the result."""

    model: str
    """InternVL3: folder, or hub id that ends in -hf."""
    tokenizer: str
    """Run directory, model folder or hub id."""
    out: str
    """Folder for the new model, which must not exist."""

    def run(self) -> None:
        logging.disable_progress_bar()
        folder = graft(self.model, self.tokenizer, self.out)
        how = "open it with AutoModelForImageTextToText"
        print(f"{folder}: {how}; manifest.json says what it was made from")


@dataclass(frozen=True, kw_only=True)
class ImportUniTok:
    """Turn UniTok's published tokenizer, or its language model, into a folder of this package."""

    file: str
    """`unitok_tokenizer.pth` of FoundationVision/unitok_tokenizer; with `tokenizer`, the folder or
    hub id of the language model FoundationVision/unitok_mllm."""
    out: str
    """Folder for the result, which must not exist."""
    tokenizer: str | None = None
    """Of the language model: the folder with its imported tokenizer."""
    text_tokenizer: str | None = "openai/clip-vit-large-patch14"
    """Folder or hub id of CLIP's, which goes into the folder; empty: none, texts are not read."""

    def run(self) -> None:
        logging.disable_progress_bar()
        if self.tokenizer:
            total, _ = count_parameters(import_mllm(self.file, self.out, self.tokenizer))
            print(f"{self.out}: a unified model of {total:,} parameters")
            return
        config = import_unitok(self.file, self.out, self.text_tokenizer).config
        codes = " x ".join(map(str, config.code_shape))
        print(f"{self.out}: {codes} codes an image of {config.image_size} px")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what each training of a configuration needs, by number of GPUs and ZeRO stage."""

    config: str
    """A name such as siglip2_256 or tokenizer/tiny, or FILE.yaml; key=value changes it."""
    overrides: tuple[str, ...] = ()
    gpus: tuple[int, ...] = GPU_COUNTS
    """May be given several times."""
    gpu_memory: float = 80
    """GB of one GPU."""

    def __post_init__(self) -> None:
        check_range(self, "gpu_memory", low=1)
        if min(self.gpus) < 1:
            raise ValueError(f"gpus: got {min(self.gpus)}, expected at least 1")

    def run(self) -> None:
        reports = plan(self.config, self.overrides)
        texts = [render(*report, gpus=self.gpus, gpu_memory=self.gpu_memory) for report in reports]
        print("\n\n".join(texts))
