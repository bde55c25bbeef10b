"""The order of samples: a function of seed, epoch and position alone.

So a resume is exact, and neither the number of processes nor that of loader workers changes what
is trained on.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

WINDOW = 16  # positions of a mixture, shuffled together: no process always gets the same part
MAX_PERIOD = 10_000  # places of a schedule, which is held in memory
_PART = re.compile(r"\s*(.+?)\s*\*\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:\+|$)")


class Draw(int):
    """An index that carries its epoch.

    It travels to loader workers, which `set_epoch` in the parent process cannot reach: random crops
    stay a function of (seed, epoch, index) in every process.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "Draw":
        draw = super().__new__(cls, index)
        draw.epoch = epoch
        return draw

    def __reduce__(self) -> tuple[type["Draw"], tuple[int, int]]:
        return Draw, (int(self), self.epoch)


def shuffled(place: int, size: int, *key: int) -> int:
    """Entry `place` of a permutation of range(size) that `key` chooses, without building it.

    A Feistel network permutes the next power of four; results outside of the range are permuted
    again (cycle walking, Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    salt = ",".join(map(str, key)).encode()
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):  # rounds that make it pseudorandom (Luby and Rackoff 1988)
            digest = hashlib.blake2b(b"%d,%d," % (turn, right) + salt, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        place = left << half | right
        if place < size:
            return place


def draw_at(data: Any, position: int, *key: int) -> Draw:
    """The sample at a position of an endless stream: each epoch is a permutation by (key, epoch).

    A data set with a `training_index`, (place, epoch) -> index, orders itself: a mixture, tars with
    a buffer.
    """
    epoch, place = divmod(position, len(data))
    own_order = getattr(data, "training_index", None)
    index = own_order(place, epoch) if own_order else shuffled(place, len(data), *key, epoch)
    return Draw(index, epoch)


class StreamSampler(Sampler[int]):
    """The endless stream of a data set; process r of w takes every w-th position, starting with r.

    Epochs are permuted by torch here, which is faster than `draw_at` but holds the permutation.
    `start` samples have been consumed by all processes together.
    """

    def __init__(
        self, data: Any, *, seed: int = 0, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        if len(data) < 1:
            raise ValueError("the data set is empty")
        self.data, self.seed = data, seed
        self.first, self.stride = start + rank, world_size

    def __iter__(self) -> Iterator[Draw]:
        position, size = self.first, len(self.data)
        order_epoch = -1
        while True:
            if getattr(self.data, "training_index", None):
                yield draw_at(self.data, position)
            else:
                epoch, place = divmod(position, size)
                if epoch != order_epoch:
                    # A prime beyond any number of epochs: no two (seed, epoch) share a permutation.
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order, order_epoch = torch.randperm(size, generator=generator), epoch
                yield Draw(int(order[place]), epoch)
            position += self.stride


class OwnOrderSampler(Sampler[int]):
    """One epoch of a data set that orders itself, for `Trainer`."""

    def __init__(self, data: Any) -> None:
        self.data, self.epoch = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Draw]:
        for place in range(len(self)):
            yield draw_at(self.data, self.epoch * len(self) + place)


class GroupedSampler(Sampler[int]):
    """LLaVA-1.5's `group_by_modality_length`, drawn from one seed.

    The micro-batches of an optimizer step hold one modality, which pads less and never runs the
    vision tower for nothing, and have about the same total length, so that no process waits for
    another. What does not fill a step comes last, mixed.

    Args:
        lengths: words of every conversation, negative without an image; int64 (samples,).
        micro_batch_size: samples of one forward pass.
        micro_batches: forward passes of one optimizer step over all processes.
    """

    def __init__(
        self, lengths: np.ndarray, *, micro_batch_size: int, micro_batches: int, seed: int = 0
    ) -> None:
        self.lengths, self.seed = np.asarray(lengths), seed
        self.epoch = 0
        self.micro_batch_size, self.micro_batches = micro_batch_size, micro_batches

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Draw]:
        rng = np.random.default_rng([self.seed, self.epoch])
        size = self.micro_batch_size * self.micro_batches
        steps, rest = [], []
        for group in (np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths <= 0)):
            group, whole = rng.permutation(group), len(group) // size * size
            steps += [self._balanced(step) for step in group[:whole].reshape(-1, size)]
            rest.append(group[whole:])
        order = [steps[i] for i in rng.permutation(len(steps))]
        for index in np.concatenate([*order, rng.permutation(np.concatenate(rest))]).tolist():
            yield Draw(index, 0)  # lengths of a mixture are those of what it draws in epoch 0

    def _balanced(self, step: np.ndarray) -> np.ndarray:
        """Deal out the samples of a step, longest first, each to the shortest batch with room."""
        lengths = np.abs(self.lengths[step])
        batches: list[list[int]] = [[] for _ in range(self.micro_batches)]
        totals = np.zeros(self.micro_batches)
        for place in np.argsort(-lengths, kind="stable"):
            shortest = int(np.argmin(totals))
            batches[shortest].append(int(step[place]))
            is_full = len(batches[shortest]) == self.micro_batch_size
            totals[shortest] = np.inf if is_full else totals[shortest] + lengths[place]
        return np.array(batches).flatten()


# ---- mixtures


def parse_mixture(source: str) -> list[tuple[str, Fraction]]:
    """(source, weight) of each part of `A*0.7+B*0.3`, or an empty list when this is not a mixture.

    Every part has its weight, so `*` and `+` in file names keep their meaning.
    """
    parts: list[tuple[str, Fraction]] = []
    end = 0
    while match := _PART.match(source, end):
        parts.append((match[1], Fraction(match[2])))
        end = match.end()
    return parts if end == len(source) else []


class Mixture(Dataset):
    """Samples of several data sets in proportion to their weights.

    Position -> (part, number of that part's samples before) follows a periodic schedule, shuffled
    within every `WINDOW`; that number is a position in the part's own stream. So each position is a
    pure function of the seed, the proportions hold in every window to a handful of samples, and no
    part repeats before it was seen whole.

    Args:
        parts: map-style data sets.
        weights: their shares, of any sum; up to four decimals.
        size: samples of an epoch; by default until every part was seen whole (`repeat`), or as long
            as no part repeats.

    Raises ValueError when a weight is not positive, or the weights have too many decimals for a
    schedule.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        weights: Sequence[Fraction | float],
        *,
        seed: int = 0,
        size: int | None = None,
        repeat: bool = True,
    ) -> None:
        # As decimals: 0.1 is a tenth, not the nearest binary fraction.
        shares = [Fraction(str(weight)) for weight in weights]
        shown = [float(share) for share in shares]
        if min(shares) <= 0:
            raise ValueError(f"got weights {shown}, expected a positive one for each source")
        multiple = math.lcm(*(share.denominator for share in shares))
        counts = np.array([int(share * multiple) for share in shares])
        counts //= np.gcd.reduce(counts)
        if counts.sum() > MAX_PERIOD:
            raise ValueError(
                f"got weights {shown}, expected at most four decimals (after scaling to a sum of 1)"
            )
        self.parts, self.seed = list(parts), seed
        self.epoch = 0
        self.sizes = np.array([len(part) for part in parts])
        self._schedule = _schedule(counts)
        is_part = self._schedule[:, None] == np.arange(len(parts))
        # Samples of each part before every place of the schedule, int64 (period + 1, parts).
        self._before = np.concatenate([np.zeros((1, len(parts)), int), np.cumsum(is_part, axis=0)])
        self.size = size or self._epoch_size(repeat)

    def _epoch_size(self, repeat: bool) -> int:
        # Near the answer; the shuffled windows move it by a few samples.
        needed = self.sizes * len(self._schedule) / self._before[-1]
        if repeat:
            size = max(1, int(needed.max()) - WINDOW)
            while (self.counts(size) < self.sizes).any():
                size += 1
        else:
            size = max(1, int(needed.min()) - 2 * WINDOW)
            while (self.counts(size + 1) <= self.sizes).all():
                size += 1
        return size

    def __len__(self) -> int:
        return self.size

    def training_index(self, place: int, epoch: int) -> int:
        """The order to train in is 0, 1, 2, …; see `draw_at`."""
        return place

    def set_epoch(self, epoch: int) -> None:
        """The epoch of plain indices; a `Draw` carries its own."""
        self.epoch = epoch

    def modality_lengths(self) -> np.ndarray:
        """int64 (samples,), lengths of the conversations of epoch 0, see `GroupedSampler`."""
        lengths = [part.modality_lengths() for part in self.parts]
        places = map(self.locate, range(self.size))
        return np.array([lengths[part][draw] for part, draw in places])

    def _window(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of each part before a position's window, and the parts in it, shuffled."""
        start = position // WINDOW * WINDOW
        rounds, place = divmod(start, len(self._schedule))
        order = self._schedule[(place + np.arange(WINDOW)) % len(self._schedule)]
        before = rounds * self._before[-1] + self._before[place]
        return before, np.random.default_rng([self.seed, start]).permutation(order)

    def counts(self, position: int) -> np.ndarray:
        """Samples of each part among the first `position`, int64 (parts,)."""
        before, order = self._window(position)
        return before + np.bincount(order[: position % WINDOW], minlength=len(self.parts))

    def locate(self, position: int) -> tuple[int, Draw]:
        """The part at a position of the endless stream, and the sample of that part."""
        before, order = self._window(position)
        place = position % WINDOW
        part = int(order[place])
        number = int(before[part] + (order[:place] == part).sum())
        return part, draw_at(self.parts[part], number, self.seed, part)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside of this mixture of {self.size} samples")
        epoch = index.epoch if isinstance(index, Draw) else self.epoch
        part, draw = self.locate(epoch * self.size + index)
        return self.parts[part][draw]


def _schedule(counts: np.ndarray) -> np.ndarray:
    """Parts, int64 (sum of counts,), spread evenly: the next is the one that lags most."""
    period = int(counts.sum())
    given = np.zeros(len(counts), dtype=np.int64)
    order = np.empty(period, dtype=np.int64)
    for i in range(period):
        order[i] = np.argmax(counts * (i + 1) - given * period)
        given[order[i]] += 1
    return order
