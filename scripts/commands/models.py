"""A tokenizer's encoder in another model, and what a training would need."""

from dataclasses import dataclass

from transformers.utils import logging

from vqrae.common.config import check_range
from vqrae.planning.plan import GPU_COUNTS, plan, render
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
