"""One word names a source of samples: in a YAML file, on the command line, in a manifest.

    scenes, scenes:emoji      the embedded scenes, of plain shapes or of Twemoji artwork
    emoji                     the embedded real images, 4,009 named emoji
    FOLDER                    images below a folder; as captions, the names of FOLDER/CLASS
    FILE.jsonl                lines {"image": path, "caption": text}, or a conversation each
    FILE.tar                  WebDataset tars, KEY.jpg with KEY.txt or KEY.json; also a glob, a
                              range shard-{000..012}.tar, s3://, https:// or hf://datasets/…
    hf:NAME                   a Hugging Face data set: hub id, folder or FILE.parquet; options: see
                              `vqrae.data.huggingface`
    FILE.json                 conversations in LLaVA's format
    CODES                     a folder of code shards: captioned images that a tokenizer has encoded
    A*0.7+B*0.3               a mixture of these

All but scenes, conversations and codes hold out 5 % (by name) as their `validation` split;
conversations and codes are used whole. `docs/data.md` has an example of each.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vqrae.common.config import did_you_mean
from vqrae.data.code_shards import CodeDataset, is_code_set, read_manifest
from vqrae.data.conversations import IMAGE_TAG, Conversations, has_record_lines, scan_conversations
from vqrae.data.emoji import EmojiDataset
from vqrae.data.huggingface import PREFIX, HuggingFaceDataset, parse_name
from vqrae.data.image_files import CaptionedImages, ImageFolder
from vqrae.data.remote import is_remote
from vqrae.data.samples import FileSplit, TolerantDataset
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.scenes.sprites import SPRITE_SETS
from vqrae.data.stream import Mixture, parse_mixture
from vqrae.data.tars import TarDataset, is_tar

Samples = SceneDataset | TolerantDataset | CodeDataset | Mixture  # all map-style, with a length
MAX_CLASSES = 1 << 16
DEFAULT_SCENES = {"train": 1_000_000, "validation": 1_000}  # rendered on the fly, without an end
FORMS = "scenes, emoji, a folder, a .jsonl, .tar or .json file, or hf:NAME"

READERS: dict[str, Any] = {
    "scenes": SceneDataset,
    "emoji": EmojiDataset,
    "folder": ImageFolder,
    "jsonl": CaptionedImages,
    "tar": TarDataset,
    "hf": HuggingFaceDataset,
    "json": Conversations,
    "codes": CodeDataset,
}
"""Kind of a source -> its data set, which has a `fingerprint`; mixtures are made of these."""


def source_kind(source: str) -> str:
    """The meaning of a source name: a key of `READERS`, or `mixture`.

    Raises ValueError when it is none of the forms above, FileNotFoundError when nothing is there.
    """
    name, _, sprites = source.partition(":")
    if parse_mixture(source):
        return "mixture"
    if is_tar(source):
        return "tar"
    if is_remote(source):
        raise ValueError(
            f"of {source}: only tars are read from URLs; for a data set of the hub write "
            "hf:OWNER/NAME"
        )
    if source.startswith(PREFIX):
        parse_name(source)
        return "hf"
    if name == "scenes":
        if sprites and sprites not in SPRITE_SETS:
            raise ValueError(f"unknown scenes {sprites!r}. {did_you_mean(sprites, SPRITE_SETS)}")
        return "scenes"
    if source == "emoji":
        return "emoji"
    if source.endswith(".jsonl"):
        return "json" if has_record_lines(source) else "jsonl"
    if source.endswith(".json"):
        return "json"
    if Path(source).is_dir():
        return "codes" if is_code_set(source) else "folder"
    if Path(source).is_file():
        raise ValueError(
            f"data source {source} is a file of unknown kind: expected .jsonl, .tar or .json"
        )
    weights = "; each part of a mixture needs its weight, as in scenes*1+emoji*1"
    raise FileNotFoundError(
        f"data source {source} does not exist: give {FORMS}{weights if '+' in source else ''}"
    )


# ---- opening


def open_images(source: str, **options: Any) -> Samples:
    """Images of a source -> map-style data set of {"image": uint8 (3, H, W)}, see `_open`."""
    return _open(source, "image", **options)


def open_pairs(source: str, *, detailed: bool = False, **options: Any) -> Samples:
    """Captioned images -> map-style data set of {"image": uint8 (3, H, W), "caption": str}.

    Code shards, {"codes": int64 (N,), "caption": str}, are opened for their `tokenizer_fingerprint`
    alone. `detailed` captions of scenes name every colour and relation (for contrastive training).
    Other options: see `_open`; a crop may lose what the caption mentions.
    """
    return _open(source, "detailed_pair" if detailed else "pair", **options)


def open_captioned(source: str, **options: Any) -> Samples:
    """Images with the captions that they may have -> as `open_pairs` detailed, "" for none."""
    return _open(source, "captioned_image", **options)


def open_conversations(source: str, **options: Any) -> Samples:
    """Conversations -> map-style data set of LLaVA records with an RGB `image` or none.

    Images of a LLaVA file keep their own size; other options: see `_open` and `read_conversations`.
    """
    return _open(source, "conversation", **options)


def _open(
    source: str,
    item: Any,
    *,
    image_size: int,
    size: int | None = None,
    split: FileSplit = "train",
    seed: int = 0,
    tokenizer_fingerprint: str | None = None,
    **options: Any,
) -> Samples:
    """A source as a data set of `item`s.

    `size` is of scenes by default a million for training and 1000 for validation; `seed` decides
    random crops, scenes and a mixture's order. With `tokenizer_fingerprint`, code shards of this
    tokenizer are opened, too. Options are those of the reader, such as `crop`; scenes take none.
    """
    kind = source_kind(source)
    if kind == "mixture":
        names, weights = zip(*parse_mixture(source), strict=True)
        options |= {"image_size": image_size, "split": split, "seed": seed}
        options["tokenizer_fingerprint"] = tokenizer_fingerprint
        parts = [_open(name, item, **options) for name in names]
        return Mixture(parts, weights, seed=seed, size=size, repeat=split != "validation")
    if kind == "scenes":
        if split == "all":
            raise ValueError("scenes have no end: split must be train or validation")
        size = size or DEFAULT_SCENES[split]
        sprites = source.partition(":")[2] or "shapes"
        item = "detailed_pair" if item == "captioned_image" else item
        return SceneDataset(
            split, size, item=item, image_size=image_size, sprites=sprites, seed=seed
        )
    if item == "conversation":
        if kind != "json":
            raise ValueError(f"{source} holds no conversations: give scenes or a .json file")
        if split == "validation":
            raise ValueError(f"{source} is trained on whole, without validation: give another file")
        return Conversations(source, size=size, **options)
    if kind == "codes" and tokenizer_fingerprint:
        return CodeDataset(source, tokenizer_fingerprint=tokenizer_fingerprint)
    if kind in ("json", "codes"):
        held = "conversations" if kind == "json" else "codes"
        raise ValueError(f"{source} holds {held}; for images give {FORMS}")
    optional = item == "captioned_image"
    options |= {"size": size, "split": split, "seed": seed, "optional": optional}
    return READERS[kind](source, image_size=image_size, captions=item != "image", **options)


# ---- questions about sources


def is_encoded(samples: Samples) -> bool:
    """Whether all samples are codes already."""
    if isinstance(samples, Mixture):
        return all(map(is_encoded, samples.parts))
    return isinstance(samples, CodeDataset)


def holds_conversations(source: str) -> bool:
    """Whether a source, or part of a mixture, consists of conversations in LLaVA's format."""
    parts = [name for name, _ in parse_mixture(source)] or [source]
    return any(source_kind(part) == "json" for part in parts)


def texts_of(samples: Samples, limit: int = 20_000) -> list[str]:
    """Captions, or questions and answers, read without decoding an image.

    Of each part of a mixture, `limit` samples are asked, evenly spread. Scenes answer with
    sentences that hold all of their words.
    """
    if isinstance(samples, Mixture):
        return list(chain.from_iterable(texts_of(part, limit) for part in samples.parts))
    if isinstance(samples, SceneDataset):
        return vocabulary_texts(samples.sprites.names)
    spread = np.linspace(0, len(samples) - 1, min(limit, len(samples))).astype(int)
    indices = np.unique(spread).tolist()
    if own_order := getattr(samples, "training_index", None):
        # Only the remote tars that training reads first.
        indices = [own_order(place, 0) for place in range(len(indices))]
    return list(chain.from_iterable(map(samples.texts, indices)))


def classes_of(samples: Samples) -> list[str]:
    """The different captions of all samples, sorted.

    Raises:
        ValueError: when they are too many for classes, or scenes, which have sentences.
    """
    if isinstance(samples, Mixture):
        return sorted(set(chain.from_iterable(map(classes_of, samples.parts))))
    if isinstance(samples, CodeDataset):
        found = samples.distinct_captions()
    elif isinstance(samples, SceneDataset):
        raise ValueError("scenes have captions, no classes: give a folder of FOLDER/CLASS/image")
    else:
        found = set(chain.from_iterable(map(samples.texts, range(len(samples)))))
    if len(found) > MAX_CLASSES:
        raise ValueError(
            f"{len(found)} different captions, expected names of at most {MAX_CLASSES} classes: "
            "set condition=text"
        )
    return sorted(found)


def texts_in(source: str) -> list[str]:
    """What is written in a file of conversations, also where images are missing; else nothing."""
    if source_kind(source) != "json":
        return []
    records, _ = scan_conversations(source)
    turns = chain.from_iterable(record["conversations"] for record in records)
    return [turn["value"].replace(IMAGE_TAG, "") for turn in turns]


def vocabulary(source: str) -> list[str]:
    """Sentences with every word of the scenes in a source, with any sprites; see `texts_of`."""
    if parts := parse_mixture(source):
        return list(chain.from_iterable(vocabulary(name) for name, _ in parts))
    if source.partition(":")[0] == "scenes":
        names = (sprites.names for sprites in SPRITE_SETS.values())
        return list(chain.from_iterable(map(vocabulary_texts, names)))
    if is_code_set(source):  # its source reads like `scenes (train, seed 0)`
        return vocabulary(read_manifest(source).source.rpartition(" (")[0])
    return []


def fingerprint(source: str) -> str:
    """Identity of a source for a run's manifest: what it is, how much, and a checksum.

    Scenes are identified by what they render; files by content; folders and tars by names and
    sizes; Hugging Face data sets by their rows, of which a hundred are read.
    """
    if parts := parse_mixture(source):
        return "; ".join(f"{float(weight):g} of {fingerprint(name)}" for name, weight in parts)
    return f"{source}: {READERS[source_kind(source)].fingerprint(source)}"
