"""What `vqrae check-data` found in a source: counts, examples by name, a histogram of sizes."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vqrae.common.files import printable

EDGES = (64, 128, 256, 512, 1024)  # of the histogram of shorter edges
_BETWEEN = [f"{a}-{b - 1}" for a, b in itertools.pairwise(EDGES)]
EDGE_RANGES = [f"< {EDGES[0]}", *_BETWEEN, f">= {EDGES[-1]}"]
EXTREME_ASPECT = 3.0  # a square crop loses two thirds of such an image
EXAMPLES = 1000  # names kept for a finding


class Issue(NamedTuple):
    """A finding about a conversation."""

    what: str
    unusable: bool
    """Training would stop at it, or learn nothing from it."""


Examine = Callable[[dict[str, Any]], Issue | None]


class Inspection(NamedTuple):
    """Facts about a sample; no `error` when it can be decoded, no `mode` without an image."""

    name: str
    error: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    words: int | None = None
    """Of the caption; None when it has none."""
    issues: Sequence[Issue] = ()


@dataclass
class Finding:
    """How often something was found, and where first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class DataReport:
    """The result of `check_source`."""

    source: str
    identity: str
    samples: int = 0
    read: int = 0
    problems: dict[str, Finding] = field(default_factory=dict)
    notes: dict[str, Finding] = field(default_factory=dict)
    shorter_edges: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EDGE_RANGES, 0))
    modes: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    caption_words: int = 0
    uncaptioned: Finding = field(default_factory=Finding)
    unfit: list[str] = field(default_factory=list)
    """All images that are missing or broken, by name."""

    @property
    def num_problems(self) -> int:
        return sum(finding.count for finding in self.problems.values())

    def problem(self, what: str, example: str) -> None:
        """Count something that makes the source unfit."""
        self.problems.setdefault(what, Finding()).add(example)

    def note(self, what: str, example: str) -> None:
        """Count something that a person should know."""
        self.notes.setdefault(what, Finding()).add(example)

    def add_issues(self, issues: Iterable[Issue], example: str) -> None:
        """Count the findings about a conversation."""
        for issue in issues:
            add = self.problem if issue.unusable else self.note
            add(issue.what, example)

    def add(self, sample: Inspection) -> None:
        """Count one sample."""
        self.read += 1
        self.add_issues(sample.issues, sample.name)
        if sample.words is not None:
            self.captions += 1
            self.caption_words += sample.words
        if sample.words == 0:
            self.problem("empty captions", sample.name)
        if sample.error:
            self.problem("broken images", sample.error)
            self.unfit.append(sample.name)
            return
        if sample.words is None:
            self.uncaptioned.add(sample.name)
        if sample.mode:
            self._add_image(sample)

    def _add_image(self, sample: Inspection) -> None:
        self.modes[sample.mode] = self.modes.get(sample.mode, 0) + 1
        if sample.mode != "RGB":
            self.note(f"stored as {sample.mode}, read as RGB", sample.name)
        short, long = sorted((sample.width, sample.height))
        self.shorter_edges[edge_range(short)] += 1
        if long / short > EXTREME_ASPECT:
            shape = f"{sample.name} ({sample.width} x {sample.height})"
            self.note(f"more than {EXTREME_ASPECT:g} times as long as wide", shape)

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.source}: {self.samples} samples, {self.read} read", f"  {self.identity}"]
        if self.captions:
            average = self.caption_words / self.captions
            lines.append(f"  {self.captions} captions, {average:.1f} words on average")
        lines += _histogram("shorter edge", self.shorter_edges)
        lines += _histogram("mode", self.modes)
        for title, findings, shown in (("problem", self.problems, 10), ("note", self.notes, 3)):
            for name, finding in findings.items():
                lines.append(f"{title}: {finding.count} {name}")
                lines += [f"    {example}" for example in finding.examples[:shown]]
                if finding.count > shown:
                    lines.append(f"    … and {finding.count - shown} more")
        count = self.num_problems
        verdict = f"{count} problem{'s' * (count > 1)}" if count else "no problem found"
        lines.append(f"{self.read} of {self.samples} samples read, {verdict}")
        return printable("\n".join(lines))


def edge_range(pixels: int) -> str:
    """The bar of the histogram that a shorter edge belongs to."""
    return EDGE_RANGES[int(np.searchsorted(EDGES, pixels, side="right"))]


def _histogram(title: str, counts: dict[str, int]) -> list[str]:
    bars = [f"  {title:>12} {'images':>10}"]
    for name, count in counts.items():
        if count:
            bars.append(f"  {name:>12} {count:>10}  {'#' * -(-30 * count // max(counts.values()))}")
    return bars if len(bars) > 1 else []
