"""What is wrong with a data set, found before a GPU is spent on it: every sample is read and decoded as training would.

Problems (broken images, missing files, unusable lines or records, empty captions) make a source unfit; notes (duplicates,
extreme shapes, colour modes that are converted) are for a person to judge.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from vqrae.common.files import decode_text, printable, raw_lines, read_bytes, write_text
from vqrae.common.images import open_image
from vqrae.data.code_shards import read_manifest, verify_shard
from vqrae.data.conversations import (
    IMAGE_TAG,
    ConversationTable,
    check_record,
    has_blank_answer,
    image_paths,
    scan_conversations,
    stored_records,
)
from vqrae.data.image_files import CaptionedImages, parse_pair, scan_jsonl
from vqrae.data.samples import Encoded, missing_files
from vqrae.data.sources import (
    fingerprint,
    holds_conversations,
    open_images,
    open_pairs,
    source_kind,
)
from vqrae.data.stream import Draw
from vqrae.data.tars import TarDataset, parse_tars

EDGES = (64, 128, 256, 512, 1024)  # of the histogram of shorter edges
EDGE_RANGES = [
    f"< {EDGES[0]}",
    *(f"{a}-{b - 1}" for a, b in itertools.pairwise(EDGES)),
    f">= {EDGES[-1]}",
]
EXTREME_ASPECT = 3.0  # a square crop loses two thirds of such an image
SCENES = 100  # have no end: so many are drawn
EXAMPLES = 1000  # names that a finding keeps


class Issue(NamedTuple):
    """What is to be said about a conversation."""

    what: str
    unusable: bool
    """Training would stop at it, or learn nothing from it."""


Examine = Callable[[dict[str, Any]], Issue | None]


def find_issues(record: dict[str, Any], examine: Examine | None = None) -> list[Issue]:
    """What is to be said about a conversation in canonical form."""
    issues = []
    if has_blank_answer(record):
        issues.append(
            Issue("conversations with a blank answer, which teaches to say nothing", unusable=True)
        )
    if any(
        turn["from"] == "human" and not turn["value"].replace(IMAGE_TAG, "").strip()
        for turn in record["conversations"]
    ):
        issues.append(Issue("conversations with a question that has no words", unusable=False))
    if examine and (issue := examine(record)):
        issues.append(issue)
    return issues


class Inspection(NamedTuple):
    """What is known of a sample; `error` is empty when it can be decoded, `mode` when it holds no image."""

    name: str
    error: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    words: int | None = None
    """Of the caption; None when it has none."""
    issues: Sequence[Issue] = ()


class RawSource(Protocol):
    """Where samples lie, as they are stored."""

    def __len__(self) -> int: ...
    def encoded(self, draw: Draw) -> Encoded: ...


class Inspector(Dataset):
    """A raw_source as a data set of inspections, so that loader workers share the decoding."""

    def __init__(self, raw_source: RawSource) -> None:
        self.raw_source = raw_source

    def __len__(self) -> int:
        return len(self.raw_source)

    def __getitem__(self, index: int) -> Inspection:
        try:
            name, data, caption = self.raw_source.encoded(Draw(index, 0))
        except ValueError as error:
            return Inspection(f"sample {index}", error=str(error))
        words = None if caption is None else len(caption.split())
        digest = hashlib.blake2b(data, digest_size=8).digest()
        try:
            open_image(io.BytesIO(data), name=name)
        except ValueError as error:
            return Inspection(name, error=str(error), digest=digest, words=words)
        with Image.open(io.BytesIO(data)) as stored:
            return Inspection(name, "", stored.mode, *stored.size, digest, words)


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
    """What `check_source` found."""

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

    def issue(self, issue: Issue, example: str) -> None:
        """Count what was said about a conversation."""
        (self.problem if issue.unusable else self.note)(issue.what, example)

    def add(self, sample: Inspection) -> None:
        """Count one sample."""
        self.read += 1
        for issue in sample.issues:
            self.issue(issue, sample.name)
        if sample.words is not None:
            self.captions += 1
            self.caption_words += sample.words
            if not sample.words:
                self.problem("empty captions", sample.name)
        if sample.error:
            self.problem("broken images", sample.error)
            self.unfit.append(sample.name)
            return
        if sample.words is None:
            self.uncaptioned.add(sample.name)
        if not sample.mode:
            return
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
        verdict = (
            "no problem found"
            if not self.num_problems
            else f"{self.num_problems} problem{'s' * (self.num_problems > 1)}"
        )
        return printable(
            "\n".join([*lines, f"{self.read} of {self.samples} samples read, {verdict}"])
        )


def edge_range(pixels: int) -> str:
    """The bar of the histogram that a shorter edge belongs to."""
    return EDGE_RANGES[int(np.searchsorted(EDGES, pixels, side="right"))]


def _histogram(title: str, counts: dict[str, int]) -> list[str]:
    counts = {name: count for name, count in counts.items() if count}
    most = max(counts.values(), default=1)
    bars = [
        f"  {name:>12} {count:>10}  {'#' * -(-30 * count // most)}"
        for name, count in counts.items()
    ]
    return [f"  {title:>12} {'images':>10}", *bars] if bars else []


class ImageFiles:
    """A raw_source of files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, draw: Draw) -> Encoded:
        return Encoded(str(self.paths[draw]), read_bytes(self.paths[draw]))


class DrawnScenes:
    """A raw_source of rendered scenes."""

    def __init__(self, source: str) -> None:
        self.pairs = open_pairs(source, image_size=64, size=SCENES)

    def __len__(self) -> int:
        return len(self.pairs)

    def encoded(self, draw: Draw) -> Encoded:
        sample, stream = self.pairs[draw], io.BytesIO()
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(stream, "PNG")
        return Encoded(f"scene {draw:d}", stream.getvalue(), sample["caption"])


class ConversationRows(Dataset):
    """A table of conversations as a data set of inspections."""

    def __init__(self, source: str, examine: Examine | None) -> None:
        self.table, self.examine = ConversationTable(source), examine

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Inspection:
        name = f"row {index}"
        try:
            record = self.table.read(Draw(index, 0))
        except ValueError as error:
            return Inspection(str(error), issues=[Issue("unusable rows", unusable=True)])
        issues = find_issues(record, self.examine)
        image = record.get("image")
        if image is None:
            return Inspection(name, issues=issues)
        first = image[0] if isinstance(image, list) else image
        return Inspection(
            name, mode=first.mode, width=first.width, height=first.height, issues=issues
        )


def _existing(paths: Iterable[Path], report: DataReport) -> set[Path]:
    """Those of `paths` that exist; the others go into the report."""
    missing = missing_files(paths)
    for path in missing:
        report.problem("missing images", str(path))
        report.unfit.append(str(path))
    return set(paths) - set(missing)


def _open(
    source: str, report: DataReport, image_folder: str | Path | None, examine: Examine | None
) -> Any:
    """The samples of a source as a data set of inspections; what is wrong before any is read goes into the report."""
    kind = source_kind(source)
    if kind == "scenes":
        return Inspector(DrawnScenes(source))
    if kind == "json":
        records, problems = scan_conversations(source)
        for problem in problems:
            report.problem("unusable records", problem)
        for record in records:
            for issue in find_issues(record, examine):
                report.issue(issue, f"record {record['id']}")
        folder = Path(image_folder or Path(source).parent)
        files = {folder / image for record in records for image in image_paths(record)}
        return Inspector(ImageFiles(sorted(_existing(files, report))))
    if kind == "jsonl":
        pairs, problems = scan_jsonl(source)
        for problem in problems:
            report.problem("unusable lines", problem)
        images = [Path(source).parent / image for image, _ in pairs]
        existing = _existing(images, report)
        dataset = CaptionedImages(source, image_size=8, split="all", strict=False)
        return Subset(Inspector(dataset), [i for i, path in enumerate(images) if path in existing])
    if holds_conversations(source):
        return ConversationRows(source, examine)
    if kind == "tar":
        paths, keys, _ = parse_tars(source)
        tars = []
        for path in paths:
            try:
                tar = TarDataset(path, image_size=8, split="all")
                tar.reads_captions, tar.caption_keys = True, keys
                tars.append(Inspector(tar))
            except ValueError as error:
                report.problem("damaged tars", str(error))
        return ConcatDataset(tars) if tars else []
    return Inspector(open_images(source, image_size=8, split="all"))  # type: ignore[arg-type]


def _check_codes(
    report: DataReport, limit: int | None, progress: Callable[[int, int], None]
) -> None:
    """Read a code set, or shards of about `limit` images, evenly spread, and compare it with its checksums."""
    folder, manifest = Path(report.source), read_manifest(report.source)
    report.samples = manifest.num_images
    used = np.zeros(manifest.codebook_size, dtype=np.int64)
    shards = _spread(manifest.num_shards, -(-(limit or report.samples) // manifest.shard_size))
    for done, number in enumerate(shards, 1):
        try:
            shard = verify_shard(folder, number, manifest)
            counts = np.bincount(shard.codes.ravel(), minlength=manifest.codebook_size)
            if len(counts) > manifest.codebook_size:
                raise ValueError(
                    f"{folder}, shard {number} holds code {len(counts) - 1} of {manifest.codebook_size}"
                )
        except (ValueError, FileNotFoundError) as error:
            report.problem("shards that cannot be used", str(error))
            continue
        used += counts
        for row in range(len(shard.codes)):
            texts = shard.captions(row)
            report.captions += len(texts)
            report.caption_words += sum(len(text.split()) for text in texts)
            if not all(text.strip() for text in texts):
                report.note("empty captions", f"image {number * manifest.shard_size + row}")
        report.read += len(shard.codes)
        progress(done, len(shards))
    if report.read and not used.all():
        report.notes["codes of the codebook that no image uses"] = Finding(int((used == 0).sum()))


def _spread(size: int, count: int) -> list[int]:
    """`count` indices below `size`, or all, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(int)).tolist()


def check_source(
    source: str,
    *,
    image_folder: str | Path | None = None,
    limit: int | None = None,
    workers: int = 0,
    examine: Examine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DataReport:
    """Read and decode the samples of a source (of a mixture: give its parts).

    Args:
        image_folder: where the images of a LLaVA file lie; each image is read once, however many records show it.
        limit: read so many samples, evenly spread over the source; duplicates are found among these only.
        workers: loader processes that share the decoding.
        examine: asked about every conversation, for what only the text tokenizer knows.
        progress: called with (samples read, samples to read); for code sets with shards.

    Raises:
        ValueError, OSError: when the source cannot be opened at all.
    """
    report = DataReport(source, fingerprint(source))
    if source_kind(source) == "codes":
        _check_codes(report, limit, progress)
        return report
    dataset = _open(source, report, image_folder, examine)
    report.samples = len(dataset)
    chosen = _spread(len(dataset), limit or len(dataset))
    first: dict[bytes, int] = {}
    for batch in DataLoader(Subset(dataset, chosen), 32, num_workers=workers, collate_fn=list):
        for sample in batch:
            index = chosen[report.read]
            report.add(sample)
            original = first.setdefault(sample.digest, index) if sample.digest else index
            if original != index:
                report.note("duplicates", f"{sample.name} = {dataset[original].name}")
        progress(report.read, len(chosen))
    if report.captions and report.uncaptioned.count:
        report.notes["images without a readable caption, left out of pairs"] = report.uncaptioned
    return report


class Kept(NamedTuple):
    """Entries that were written, and entries of the source."""

    written: int
    total: int


def require_target(source: str, out: str | Path, image_folder: str | Path | None = None) -> None:
    """Refuse what `write_clean` cannot write.

    Raises:
        ValueError: when the source is no list, or paths in `out` would lead elsewhere.
    """
    path, out, kind = Path(source), Path(out), source_kind(source)
    if kind not in ("json", "jsonl") or out.suffix not in (
        (".jsonl",) if kind == "jsonl" else (".json", ".jsonl")
    ):
        raise ValueError(
            f"got {source} and {out}, expected a FILE.json or FILE.jsonl and another of its kind"
        )
    if image_folder is None and out.resolve().parent != path.resolve().parent:
        raise ValueError(
            f"{out} must be in the folder of {path}, for images are named relative to that"
        )
    if out.resolve() == path.resolve():
        raise ValueError(f"{out} is the source itself: give another file")


def write_clean(
    source: str,
    out: str | Path,
    *,
    unfit: Collection[str],
    image_folder: str | Path | None = None,
    examine: Examine | None = None,
) -> Kept:
    """Write the usable entries of FILE.json or FILE.jsonl, unchanged; a list to *.json, lines to *.jsonl.

    Args:
        unfit: images that are missing or broken, `DataReport.unfit`; entries that show one are left out.
        image_folder: where the images of LLaVA's records lie; the file's own folder when not given.
        examine: as for `check_source`.

    Raises:
        ValueError: see `require_target`.
    """
    require_target(source, out, image_folder)
    path, unfit, is_pairs = Path(source), set(unfit), source_kind(source) == "jsonl"
    folder = Path(image_folder or path.parent)

    def is_usable(index: int, entry: Any) -> bool:
        try:
            names = _captioned_image(entry) if is_pairs else _record_images(index, entry, examine)
        except ValueError:
            return False
        return all(str(folder / name) not in unfit and (folder / name).is_file() for name in names)

    stored = (
        [line for _, line in raw_lines(path) if line.strip()] if is_pairs else stored_records(path)
    )
    usable = [entry for index, entry in enumerate(stored) if is_usable(index, entry)]
    texts = [
        decode_text(entry, path) if isinstance(entry, bytes) else json.dumps(entry)
        for entry in usable
    ]
    as_lines = Path(out).suffix == ".jsonl"
    write_text(
        out,
        "".join(f"{text}\n" for text in texts) if as_lines else "[\n" + ",\n".join(texts) + "\n]\n",
    )
    return Kept(len(usable), len(stored))


def _captioned_image(line: bytes) -> list[str]:
    image, caption = parse_pair(line, "line")
    if not caption:
        raise ValueError("the caption is empty")
    return [image]


def _record_images(index: int, stored: Any, examine: Examine | None) -> list[str]:
    record = check_record(stored, index)
    if any(issue.unusable for issue in find_issues(record, examine)):
        raise ValueError("training would learn nothing from it")
    return image_paths(record)
