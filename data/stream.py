"""The endless order of training samples, as a function of step and process alone, so that a resume is exact."""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence, Sized
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class Draw(int):
    """An index that knows which time round it is asked for.

    It travels to loader workers, which `set_epoch` in the parent process cannot reach: random crops stay a function of
    (seed, epoch, index), whoever decodes.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "Draw":
        draw = super().__new__(cls, index)
        draw.epoch = epoch
        return draw

    def __reduce__(self) -> tuple[type["Draw"], tuple[int, int]]:
        return Draw, (int(self), self.epoch)


class StreamSampler(Sampler[int]):
    """Indices of a map-style data set, epoch after epoch, each epoch a seeded permutation.

    Process r of w takes every w-th index, so the union over processes is what one process would see, and loader workers
    change nothing. A data set that has a `training_index`, (place, epoch) -> index, orders itself (a mixture, tars with a
    buffer).

    Args:
        data: the data set; only its length counts.
        start: global samples that were already consumed.
    """

    def __init__(
        self, data: Sized, *, seed: int = 0, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        self.size, self.own_order = len(data), getattr(data, "training_index", None)
        if self.size < 1:
            raise ValueError("the data set is empty")
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start

    def __iter__(self) -> Iterator[Draw]:
        position = self.start + self.rank
        epoch, order = -1, torch.empty(0)
        while True:
            if not self.own_order and position // self.size != epoch:
                epoch = position // self.size
                order = torch.randperm(
                    self.size,
                    generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch),
                )
            turn, place = divmod(position, self.size)
            yield Draw(self.own_order(place, turn) if self.own_order else int(order[place]), turn)
            position += self.world_size


class OwnOrderSampler(Sampler[int]):
    """The indices of an epoch of a data set that orders itself."""

    def __init__(self, data: Any) -> None:
        self.data, self.epoch = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for place in range(len(self.data)):
            yield Draw(self.data.training_index(place, self.epoch), self.epoch)


WINDOW = 16  # so many consecutive samples are shuffled: far enough that no process always gets the same source
MAX_PERIOD = 10_000
_PART = re.compile(r"\s*(.+?)\s*\*\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:\+|$)")


def parse_mixture(source: str) -> list[tuple[str, Fraction]]:
    """(source, weight) of each part of `A*0.7+B*0.3`, or an empty list when this is no mixture.

    Every part carries its weight, so that `*` and `+` in file names stay what they are.
    """
    parts: list[tuple[str, Fraction]] = []
    end = 0
    while match := _PART.match(source, end):
        parts.append((match[1], Fraction(match[2])))
        end = match.end()
    return parts if parts and end == len(source) else []


def shuffled(place: int, size: int, *key: int) -> int:
    """Where `place` lies in a permutation of range(size) that `key` chooses, without building the permutation.

    A Feistel network over the next power of four permutes its numbers; those outside of the range walk on (cycle walking,
    Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    salt = ",".join(map(str, key)).encode()
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            digest = hashlib.blake2b(b"%d,%d," % (turn, right) + salt, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        place = left << half | right
        if place < size:
            return place


class Mixture(Dataset):
    """A map-style data set whose consecutive samples come from its parts in proportion to their weights.

    Position -> (part, count of that part so far) follows a periodic schedule, shuffled within every 16 positions; the count
    -> sample of the part is one seeded permutation after another. So each position is a pure function of the seed, the
    proportions hold in every window (to a handful of samples), and no part repeats before it was seen whole.

    Args:
        parts: map-style data sets.
        weights: their shares, of any sum; up to four decimals.
        size: length; when not given, an epoch is as long as it takes to see every part whole (`repeat`), or as long as no
            part has to repeat.

    Raises:
        ValueError: when a weight is not positive, or the weights have too many decimals for a schedule.
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
        shares = [Fraction(str(weight)) for weight in weights]
        if len(shares) != len(parts) or min(shares) <= 0:
            raise ValueError(
                f"got weights {[float(s) for s in shares]} for {len(parts)} sources, expected a positive one for each"
            )
        multiple = math.lcm(*(share.denominator for share in shares))
        counts = np.array([int(share * multiple) for share in shares])
        counts //= np.gcd.reduce(counts)
        if counts.sum() > MAX_PERIOD:
            raise ValueError(
                f"got weights {[float(s) for s in shares]}, expected at most four decimals (after scaling to a sum of 1)"
            )
        self.parts, self.seed, self.epoch = list(parts), seed, 0
        self.sizes = np.array([len(part) for part in parts])
        self._schedule = _schedule(counts)
        self._before = np.zeros(
            (len(self._schedule) + 1, len(parts)), dtype=np.int64
        )  # samples of each part before a place
        np.cumsum(self._schedule[:, None] == np.arange(len(parts)), axis=0, out=self._before[1:])
        self.size = size or self._epoch_size(repeat)

    def _epoch_size(self, repeat: bool) -> int:
        needed = self.sizes * len(self._schedule) / self._before[-1]
        size = max(1, int(needed.max()) - WINDOW if repeat else int(needed.min()) - 2 * WINDOW)
        if repeat:
            while (self.counts(size) < self.sizes).any():
                size += 1
        else:
            while (self.counts(size + 1) <= self.sizes).all():
                size += 1
        return size

    def __len__(self) -> int:
        return self.size

    def training_index(self, place: int, epoch: int) -> int:
        """Index 0, 1, 2, … is the order to train in already; see `StreamSampler`."""
        return place

    def set_epoch(self, epoch: int) -> None:
        """The epoch of plain indices; a `Draw` carries its own."""
        self.epoch = epoch

    def modality_lengths(self) -> np.ndarray:
        """Signed lengths of the conversations of an epoch, int64 (samples,), see `GroupedSampler`."""
        lengths = [part.modality_lengths() for part in self.parts]
        places = (self.locate(position) for position in range(self.size))
        return np.array([lengths[part][draw] for part, draw in places])

    def _window(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of each part before the window around `position`, and the parts of its positions, shuffled."""
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
        """The part that a position of the endless stream falls on, and the sample of that part."""
        before, order = self._window(position)
        place = position % WINDOW
        part, seen = int(order[place]), order[:place]
        epoch, place = divmod(int(before[part] + (seen == part).sum()), int(self.sizes[part]))
        if own_order := getattr(self.parts[part], "training_index", None):
            return part, Draw(own_order(place, epoch), epoch)
        return part, Draw(shuffled(place, int(self.sizes[part]), self.seed, part, epoch), epoch)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside of this mixture of {self.size} samples")
        epoch = index.epoch if isinstance(index, Draw) else self.epoch
        part, draw = self.locate(epoch * self.size + index)
        return self.parts[part][draw]


def _schedule(counts: np.ndarray) -> np.ndarray:
    """Parts, int64 (sum of counts,), each spread as evenly as possible: the next is always the one furthest behind."""
    period = int(counts.sum())
    given = np.zeros(len(counts), dtype=np.int64)
    order = np.empty(period, dtype=np.int64)
    for i in range(period):
        order[i] = np.argmax(counts * (i + 1) - given * period)
        given[order[i]] += 1
    return order


class GroupedSampler(Sampler[int]):
    """Indices in LLaVA's order: consecutive micro-batches of an optimizer step hold one modality and are balanced in length.

    What does not fill a step of its own modality comes last, mixed.

    Args:
        lengths: words of every conversation, negative without an image; int64 (samples,).
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
