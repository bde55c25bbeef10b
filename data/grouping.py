"""LLaVA's grouped sampling: every optimizer step sees one modality, and its micro-batches are equally long.

Batches of one modality pad less and never run the tower for nothing; micro-batches of equal total length let no process wait
for another. The rule is that of LLaVA-1.5's `group_by_modality_length`, except that everything is drawn from one seed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from vqrae.data.mixture import Mixture
from vqrae.data.scenes import SceneDataset
from vqrae.data.stream import Draw


def modality_lengths(dataset: Any) -> np.ndarray:
    """Words of every conversation of a data set, negative without an image; int64 (samples,). No image is read.

    Raises:
        ValueError: when the data set cannot tell.
    """
    if isinstance(dataset, Mixture):
        parts = [modality_lengths(part) for part in dataset.parts]
        return np.array(
            [parts[part][draw] for part, draw in map(dataset.locate, range(len(dataset)))]
        )
    if isinstance(dataset, SceneDataset):
        return np.ones(len(dataset), dtype=np.int64)  # all with an image, and about equally long
    if not hasattr(dataset, "modality_lengths"):
        raise ValueError(
            f"{type(dataset).__name__} has no lengths to group by: set batching to random or packed"
        )
    return dataset.modality_lengths()


class GroupedSampler(Sampler[int]):
    """Indices in LLaVA's order: consecutive micro-batches of an optimizer step hold one modality and are balanced in length.

    What does not fill a step of its own modality comes last, mixed.

    Args:
        lengths: `modality_lengths` of the data set.
        micro_batch_size: samples of one forward pass.
        micro_batches: forward passes of one optimizer step over all processes.
    """

    def __init__(
        self, lengths: np.ndarray, *, micro_batch_size: int, micro_batches: int, seed: int = 0
    ) -> None:
        self.lengths, self.seed, self.epoch = np.asarray(lengths), seed, 0
        self.micro_batch_size, self.micro_batches = micro_batch_size, micro_batches

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        size = self.micro_batch_size * self.micro_batches
        steps, rest = [], []
        for group in (np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths <= 0)):
            group, whole = rng.permutation(group), len(group) // size * size
            steps += [self._balanced(step) for step in group[:whole].reshape(-1, size)]
            rest.append(group[whole:])
        order = [steps[i] for i in rng.permutation(len(steps))]
        for index in np.concatenate([*order, rng.permutation(np.concatenate(rest))]).tolist():
            # Lengths are those of epoch 0, so that is what a mixture must draw.
            yield Draw(index, 0)

    def _balanced(self, step: np.ndarray) -> np.ndarray:
        """The samples of a step dealt to its micro-batches, longest first, always to the shortest that has room."""
        lengths = np.abs(self.lengths[step])
        batches: list[list[int]] = [[] for _ in range(self.micro_batches)]
        totals = np.zeros(self.micro_batches)
        for place in np.argsort(-lengths, kind="stable"):
            least = int(np.argmin(totals))
            batches[least].append(int(step[place]))
            totals[least] = (
                np.inf
                if len(batches[least]) == self.micro_batch_size
                else totals[least] + lengths[place]
            )
        return np.array([index for batch in batches for index in batch])
