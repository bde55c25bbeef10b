"""Configuration of the unified model: one YAML file."""

from dataclasses import dataclass, field
from typing import Literal

from vqrae.common.config import check_range
from vqrae.common.run import RunConfig
from vqrae.common.trainer import OptimizationConfig
from vqrae.generation.config import DepthConfig
from vqrae.generation.sampling import SamplingConfig
from vqrae.mllm.sequences import TASKS


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What one of the three tasks is trained on."""

    data: str = "scenes"
    """generation, captioning: captioned images, code shards or a mixture, such as
    FILE.tar,caption=short*0.2+FILE.tar,caption=long*0.8; instructions: conversations."""
    weight: float = 1.0
    """Of its samples, relative to those of the other tasks; 0 leaves the task out."""
    image_folder: str | None = None
    """Where the images of a .json file are; null means next to it."""
    skip_missing: int = 0
    """Records of a .json file that may lack their images and are then left out."""

    def __post_init__(self) -> None:
        check_range(self, "weight", "skip_missing", low=0)


@dataclass(frozen=True, kw_only=True)
class MLLMConfig(RunConfig):
    """One run."""

    tokenizer: str
    """Run directory, folder or hub id of the visual tokenizer."""
    llm: str
    """Folder or hub id of the language model."""
    optimization: OptimizationConfig
    generation: TaskConfig = field(default_factory=TaskConfig)
    captioning: TaskConfig = field(default_factory=TaskConfig)
    instructions: TaskConfig = field(default_factory=TaskConfig)
    chat_template: Literal["chatml", "vicuna_v1"] = "chatml"
    """Format of dialogues."""
    aspect_ratio: Literal["crop", "pad"] = "crop"
    """Images of dialogues that are not square: cut out the centre, or add a border in CLIP's mean
    colour, as UniTok. Captioned images are cropped by their source."""
    image_tokens: tuple[str, str] = ("<0x00>", "<0x01>")
    """BOI and EOI: byte tokens of Llama (ids 3 and 4), else new tokens of the text tokenizer."""
    max_caption_tokens: int = 1750
    """Ids of a caption with BOS and prompt; a longer one loses its end."""
    max_length: int = 2048
    """Ids of a dialogue, image tokens included."""
    caption_dropout: float = 0.1
    """Share of images that are generated from `<unconditional>`, so that guidance works."""
    depth: DepthConfig = field(default_factory=DepthConfig)
    """The head that predicts the codes of a place."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How to generate images unless asked otherwise; written to the model's `config.json`."""
    attn_implementation: str = "auto"
    dry_run: int = 0
    """Take this many steps of the longest sequences with random codes, keep nothing, and report
    parameters, memory and time."""
    previews: int = 8
    """Images generated next to each checkpoint, for people; none under ZeRO-3."""

    def __post_init__(self) -> None:
        check_range(self, "max_caption_tokens", "max_length", low=1)
        check_range(self, "caption_dropout", "dry_run", "previews", low=0)
        if not any(task.weight for task in self.tasks.values()):
            raise ValueError(f"weight: got 0 for all of {', '.join(TASKS)}, expected a task")

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """Each task by its name."""
        return {task: getattr(self, task) for task in TASKS}
