"""What `vqrae check-data` found in a source: counts, examples by name, a histogram of sizes."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vqrae.common.files import printable

EDGES = (64, 128, 256, 512, 1024)  # of the histogram of shorter edges
_BETWEEN = [f"{a}-{b - 1}" for a, b in itertools.pairwise(EDGES)]
EDGE_RANGES = [f"< {EDGES[0]}", *_BETWEEN, f">= {EDGES[-1]}"]
EXAMPLES = 1000  # names kept for a finding
UNCAPTIONED = "images without a readable caption, left out of pairs"


class Issue(NamedTuple):
    """Something that is wrong, or odd, with a sample."""

    what: str
    unusable: bool
    """Training would stop at it, or learn nothing from it."""
    example: str = ""
    """What the report shows; the sample's name if empty."""


Examine = Callable[[dict[str, Any]], Issue | None]


class Inspection(NamedTuple):
    """What was found in a sample."""

    name: str
    issues: list[Issue]
    digest: bytes = b""
    """Of its bytes, to find duplicates."""
    edge: int = 0
    """Pixels of the shorter edge; 0 for an image that cannot be decoded."""
    words: int | None = None
    """Of the caption; None when it has none."""


@dataclass
class Finding:
    """How often something was found, and where first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class DataReport:
    """The result of `check_source`."""

    source: str
    identity: str
    samples: int = 0
    read: int = 0
    problems: dict[str, Finding] = field(default_factory=dict)
    """What makes the source unfit."""
    notes: dict[str, Finding] = field(default_factory=dict)
    """What a person should know."""
    shorter_edges: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EDGE_RANGES, 0))
    captions: int = 0
    caption_words: int = 0
    unfit: list[str] = field(default_factory=list)
    """All images that are missing or broken, by name."""

    @property
    def num_problems(self) -> int:
        return sum(finding.count for finding in self.problems.values())

    def count(self, issue: Issue, name: str = "") -> None:
        """Count an issue of the sample `name`."""
        findings = self.problems if issue.unusable else self.notes
        finding = findings.setdefault(issue.what, Finding())
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(issue.example or name)

    def add(self, sample: Inspection) -> None:
        """Count one sample."""
        self.read += 1
        for issue in sample.issues:
            self.count(issue, sample.name)
        if sample.words is not None:
            self.captions += 1
            self.caption_words += sample.words
        if sample.edge:
            self.shorter_edges[edge_range(sample.edge)] += 1
        else:
            self.unfit.append(sample.name)

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.source}: {self.samples} samples, {self.read} read", f"  {self.identity}"]
        if self.captions:
            average = self.caption_words / self.captions
            lines.append(f"  {self.captions} captions, {average:.1f} words on average")
        if most := max(self.shorter_edges.values()):
            lines.append(f"  {'shorter edge':>12} {'images':>10}")
            for name, count in self.shorter_edges.items():
                lines.append(f"  {name:>12} {count:>10}  {'#' * -(-30 * count // most)}")
        for title, findings, shown in (("problem", self.problems, 10), ("note", self.notes, 3)):
            for name, finding in findings.items():
                lines.append(f"{title}: {finding.count} {name}")
                lines += [f"    {example}" for example in finding.examples[:shown]]
                if finding.count > shown:
                    lines.append(f"    … and {finding.count - shown} more")
        count = self.num_problems
        verdict = f"{count} problem{'s' * (count > 1)}" if count else "no problem found"
        lines.append(f"{self.read} of {self.samples} samples read, {verdict}")
        return printable("\n".join(lines))  # names of files may hold escape sequences


def edge_range(pixels: int) -> str:
    """The bar of the histogram that a shorter edge belongs to."""
    return EDGE_RANGES[int(np.searchsorted(EDGES, pixels, side="right"))]
