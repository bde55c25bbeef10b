"""The training samples of the unified model."""

from typing import Any

from torch.utils.data import Dataset

from vqrae.data.sources import Samples, open_conversations, open_pairs
from vqrae.data.stream import Mixture
from vqrae.mllm.config import MLLMConfig


class TaskSamples(Dataset):
    """Samples of a source, each with its task, as `SequenceEncoder` takes them."""

    def __init__(self, samples: Samples, task: str) -> None:
        self.samples, self.task = samples, task
        # A mixture, or tars with a buffer, order themselves.
        self.training_index = getattr(samples, "training_index", None)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {**self.samples[index], "task": self.task}
        if self.task == "captioning":
            sample["answer"] = sample.pop("caption")
        return sample


def open_tasks(config: MLLMConfig, *, image_size: int, tokenizer_fingerprint: str) -> Mixture:
    """The samples of all tasks, in proportion to their weights; code shards must fit the tokenizer.

    Args:
        image_size: pixels of a side of captioned images.
    """
    parts, weights = [], []
    options: dict[str, Any] = {"image_size": image_size, "seed": config.seed}
    for task, settings in config.tasks.items():
        if not settings.weight:
            continue
        if task == "instructions":
            samples = open_conversations(
                settings.data,
                image_folder=settings.image_folder,
                skip_missing=settings.skip_missing,
                **options,
            )
        else:
            samples = open_pairs(
                settings.data, tokenizer_fingerprint=tokenizer_fingerprint, **options
            )
        parts.append(TaskSamples(samples, task))
        weights.append(settings.weight)
    return Mixture(parts, weights, seed=config.seed)


def captions_of(samples: Mixture, count: int) -> list[str]:
    """The first captions that images are generated from, at most `count`."""
    for part in samples.parts:
        if part.task == "generation":
            return [part[i]["caption"] for i in range(min(count, len(part)))]
    return []
