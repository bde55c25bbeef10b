"""Check a data set before training: read and decode every sample as training would.

Problems (broken images, missing files, unusable lines or records, empty captions) make a source
unfit; notes (duplicates, extreme shapes, colour modes that are converted) are for a person to
judge.
"""

import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from vqrae.common.files import decode_text, raw_lines, read_bytes, write_text
from vqrae.common.images import open_image
from vqrae.data.code_shards import open_shard, read_manifest
from vqrae.data.conversations import (
    IMAGE_TAG,
    check_record,
    has_blank_answer,
    image_paths,
    scan_conversations,
    stored_records,
)
from vqrae.data.image_files import CaptionedImages, parse_pair, scan_jsonl
from vqrae.data.report import UNCAPTIONED, DataReport, Examine, Finding, Inspection, Issue
from vqrae.data.samples import Encoded, EncodedImages, missing_files
from vqrae.data.sources import fingerprint, open_images, source_kind
from vqrae.data.stream import Draw
from vqrae.data.tars import TarDataset, parse_tars

EXTREME_ASPECT = 3.0  # a square crop loses two thirds of such an image

# ---- one sample


class Inspector(Dataset):
    """Inspections of encoded images, as a data set, so that loader workers share the decoding."""

    def __init__(self, images: "EncodedImages | ImageFiles") -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Inspection:
        try:
            name, data, caption = self.images.encoded(Draw(index, 0))
        except ValueError as error:
            return Inspection(f"sample {index}", [Issue("broken images", True, str(error))])
        issues = []
        words = None if caption is None else len(caption.split())
        if words == 0:
            issues.append(Issue("empty captions", True))
        digest = hashlib.blake2b(data, digest_size=8).digest()
        try:
            open_image(io.BytesIO(data), name=name)
        except ValueError as error:
            issues.append(Issue("broken images", True, str(error)))
            return Inspection(name, issues, digest, words=words)
        if words is None:
            issues.append(Issue(UNCAPTIONED, False))
        with Image.open(io.BytesIO(data)) as stored:
            short, long = sorted(stored.size)
            if stored.mode != "RGB":
                issues.append(Issue(f"stored as {stored.mode}, read as RGB", False))
            if long / short > EXTREME_ASPECT:
                what = f"more than {EXTREME_ASPECT:g} times as long as wide"
                shape = f"{name} ({stored.width} x {stored.height})"
                issues.append(Issue(what, False, shape))
        return Inspection(name, issues, digest, short, words)


class ImageFiles:
    """Files of a list, as they are stored."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, draw: Draw) -> Encoded:
        return Encoded(str(self.paths[draw]), read_bytes(self.paths[draw]))


def find_issues(record: dict[str, Any], examine: Examine | None = None) -> list[Issue]:
    """Issues of a conversation in canonical form."""
    issues = []
    if has_blank_answer(record):
        what = "conversations with a blank answer, which teaches to say nothing"
        issues.append(Issue(what, unusable=True))
    questions = [turn["value"] for turn in record["conversations"] if turn["from"] == "human"]
    if not all(text.replace(IMAGE_TAG, "").strip() for text in questions):
        issues.append(Issue("conversations with a question that has no words", unusable=False))
    if examine and (issue := examine(record)):
        issues.append(issue)
    return issues


# ---- sources as data sets of inspections; problems of lists and tars go into the report


def _inspect(report: DataReport, image_folder: str | Path | None, examine: Examine | None) -> Any:
    kind = source_kind(report.source)
    if kind == "scenes":
        return []  # rendered: nothing to read
    if kind == "json":
        return _inspect_records(report, image_folder, examine)
    if kind == "jsonl":
        return _inspect_lines(report)
    if kind == "tar":
        return _inspect_tars(report)
    images = open_images(report.source, image_size=8, split="all")
    assert isinstance(images, EncodedImages)
    return Inspector(images)


def _inspect_records(
    report: DataReport, image_folder: str | Path | None, examine: Examine | None
) -> Any:
    records, problems = scan_conversations(report.source)
    for problem in problems:
        report.count(Issue("unusable records", True, problem))
    folder = Path(image_folder or Path(report.source).parent)
    files: set[Path] = set()
    for record in records:
        for issue in find_issues(record, examine):
            report.count(issue, f"record {record['id']}")
        files.update(folder / image for image in image_paths(record))
    return Inspector(ImageFiles(sorted(_existing(files, report))))


def _inspect_lines(report: DataReport) -> Any:
    pairs, problems = scan_jsonl(report.source)
    for problem in problems:
        report.count(Issue("unusable lines", True, problem))
    images = [Path(report.source).parent / image for image, _ in pairs]
    existing = _existing(images, report)
    dataset = CaptionedImages(report.source, image_size=8, split="all", strict=False)
    return Subset(Inspector(dataset), [i for i, path in enumerate(images) if path in existing])


def _inspect_tars(report: DataReport) -> Any:
    paths, caption_keys, _ = parse_tars(report.source)
    tars = []
    for path in paths:
        try:
            tar = TarDataset(path, image_size=8, split="all")
        except ValueError as error:
            report.count(Issue("damaged tars", True, str(error)))
            continue
        tar.reads_captions, tar.caption_keys = True, caption_keys
        tars.append(Inspector(tar))
    return ConcatDataset(tars) if tars else []


def _existing(paths: Iterable[Path], report: DataReport) -> set[Path]:
    """Those of `paths` that exist; the others go into the report."""
    missing = missing_files(paths)
    for path in missing:
        report.count(Issue("missing images", True, str(path)))
        report.unfit.append(str(path))
    return set(paths) - set(missing)


# ---- checking


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
        image_folder: the folder of a LLaVA file's images; each image is read once.
        limit: read this number of samples, evenly spread; duplicates are found among these only.
        workers: loader processes that share the decoding.
        examine: called on every conversation, for what only the text tokenizer knows.
        progress: called with (samples read, samples to read); for code sets with shards.

    Raises ValueError or OSError when the source cannot be opened at all.
    """
    report = DataReport(source, fingerprint(source))
    if source_kind(source) == "codes":
        _check_codes(report, limit, progress)
        return report
    dataset = _inspect(report, image_folder, examine)
    report.samples = len(dataset)
    chosen = _spread(len(dataset), limit or len(dataset))
    names: dict[bytes, str] = {}
    # 32: inspections are small, and workers send a batch at once.
    for batch in DataLoader(Subset(dataset, chosen), 32, num_workers=workers, collate_fn=list):
        for sample in batch:
            report.add(sample)
            if sample.digest in names:
                same = f"{sample.name} = {names[sample.digest]}"
                report.count(Issue("duplicates", False, same))
            elif sample.digest:
                names[sample.digest] = sample.name
        progress(report.read, len(chosen))
    if not report.captions:
        report.notes.pop(UNCAPTIONED, None)  # nothing has a caption here
    return report


def _check_codes(
    report: DataReport, limit: int | None, progress: Callable[[int, int], None]
) -> None:
    """Compare a code set, or shards of about `limit` images, evenly spread, with its checksums."""
    folder, manifest = Path(report.source), read_manifest(report.source)
    report.samples = manifest.num_images
    size = manifest.codebook_size
    used = np.zeros((manifest.num_codebooks, size), dtype=np.int64)
    shards = _spread(manifest.num_shards, -(-(limit or report.samples) // manifest.shard_size))
    for done, number in enumerate(shards, 1):
        try:
            shard = open_shard(folder, number, manifest, verify=True)
            largest = shard.codes.max()
            if largest >= size:
                raise ValueError(f"{folder}, shard {number} holds code {largest} of {size}")
        except (ValueError, FileNotFoundError) as error:
            report.count(Issue("shards that cannot be used", True, str(error)))
            continue
        for counts, codes in zip(used, shard.codes.reshape(-1, len(used)).T, strict=True):
            counts += np.bincount(codes, minlength=size)
        for row in range(len(shard.codes)):
            texts = shard.captions(row)
            report.captions += len(texts)
            report.caption_words += sum(len(text.split()) for text in texts)
            if not all(map(str.strip, texts)):
                image = f"image {number * manifest.shard_size + row}"
                report.count(Issue("empty captions", False, image))
        report.read += len(shard.codes)
        progress(done, len(shards))
    if report.read and not used.all():
        report.notes["codes of the codebook that no image uses"] = Finding(int((used == 0).sum()))


def _spread(size: int, count: int) -> list[int]:
    """`count` indices below `size`, or all, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(int)).tolist()


# ---- cleaning


def require_target(source: str, out: str | Path, image_folder: str | Path | None = None) -> None:
    """Refuse, with ValueError, what `write_clean` cannot write."""
    path, out = Path(source), Path(out)
    suffixes = {"jsonl": [".jsonl"], "json": [".json", ".jsonl"]}.get(source_kind(source), [])
    if out.suffix not in suffixes:
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
) -> tuple[int, int]:
    """Write the usable entries of a list, unchanged: as a list to *.json, as lines to *.jsonl.

    Entries with an image in `unfit` (`DataReport.unfit`) are left out; other arguments as for
    `check_source`. Returns the number of entries written, and of those in the source.
    """
    require_target(source, out, image_folder)
    path, unfit = Path(source), set(unfit)
    is_pairs = source_kind(source) == "jsonl"
    folder = Path(image_folder or path.parent)
    lines = (line for _, line in raw_lines(path) if line.strip())
    stored = list(lines) if is_pairs else stored_records(path)
    texts = []
    for index, entry in enumerate(stored):
        try:
            names = _pair_images(entry) if is_pairs else _record_images(index, entry, examine)
        except ValueError:
            continue
        files = [folder / name for name in names]
        if all(str(file) not in unfit and file.is_file() for file in files):
            is_line = isinstance(entry, bytes)
            texts.append(decode_text(entry, path) if is_line else json.dumps(entry))
    if Path(out).suffix == ".jsonl":
        write_text(out, "".join(f"{text}\n" for text in texts))
    else:
        write_text(out, "[\n" + ",\n".join(texts) + "\n]\n")
    return len(texts), len(stored)


def _pair_images(line: bytes) -> list[str]:
    image, caption = parse_pair(line, "line")
    if not caption:
        raise ValueError("the caption is empty")
    return [image]


def _record_images(index: int, stored: Any, examine: Examine | None) -> list[str]:
    record = check_record(stored, index)
    if any(issue.unusable for issue in find_issues(record, examine)):
        raise ValueError("training would learn nothing from it")
    return image_paths(record)
