"""One word names a source of samples, everywhere: in a YAML file, on the command line, in a manifest.

    scenes, scenes:emoji      the embedded scenes, with drawn shapes or with Twemoji artwork
    FOLDER                    pictures below a folder
    FILE.jsonl                lines {"image": path, "caption": text}
    FILE.tar                  WebDataset tars, KEY.jpg beside KEY.txt; also a glob, or a range such as shard-{000..012}.tar
    FILE.json                 conversations in LLaVA's format

Image folders and caption files hold 5 % (by name) back as their `validation` split; a LLaVA file is used whole.
"""

from pathlib import Path
from typing import Any, Literal

from vqrae.common.config import did_you_mean
from vqrae.data.conversations import Conversations
from vqrae.data.images import ImageFolder, folder_fingerprint
from vqrae.data.pairs import CaptionedImages
from vqrae.data.scenes import SPRITE_SETS, SceneDataset
from vqrae.data.tars import TarDataset, tars_fingerprint
from vqrae.data.tolerant import FileSplit, TolerantDataset, checksum

Samples = SceneDataset | TolerantDataset  # both map-style, with a length
Kind = Literal["scenes", "folder", "jsonl", "tar", "json"]
DEFAULT_SCENES = {"train": 1_000_000, "validation": 1_000}


def source_kind(source: str) -> Kind:
    """What a source name stands for.

    Raises:
        ValueError: when it is none of the forms above, or names an unknown sprite set.
        FileNotFoundError: when it looks like a path and nothing is there.
    """
    name, _, sprites = source.partition(":")
    if name == "scenes":
        if sprites and sprites not in SPRITE_SETS:
            raise ValueError(f"unknown scenes {sprites!r}. {did_you_mean(sprites, SPRITE_SETS)}")
        return "scenes"
    for kind in ("jsonl", "tar", "json"):
        if source.endswith(f".{kind}"):
            return kind
    if Path(source).is_dir():
        return "folder"
    if Path(source).is_file():
        raise ValueError(f"data source {source} is a file of unknown kind: expected .jsonl, .tar or .json")
    raise FileNotFoundError(f"data source {source} does not exist: give scenes, a folder, or a .jsonl, .tar or .json file")


def open_images(
    source: str, *, image_size: int, size: int | None = None, split: FileSplit = "train", augment: bool = False, seed: int = 0
) -> Samples:
    """Pictures of a source -> map-style data set of {"image": uint8 (3, H, W)}.

    Args:
        size: use so many samples; scenes default to a million for training and 1000 for validation.
        augment: random crops and flips of training pictures; scenes have endless variety and take none.
        seed: of the augmentation, or of the scenes.
    """
    kind = source_kind(source)
    if kind == "scenes":
        return _scenes(source, "image", image_size=image_size, size=size, split=split, seed=seed)
    if kind == "folder":
        return ImageFolder(source, image_size=image_size, size=size, split=split, augment=augment, seed=seed)
    if kind == "tar":
        return TarDataset(source, image_size=image_size, captions=False, size=size, split=split, augment=augment, seed=seed)
    if kind == "jsonl":
        return CaptionedImages(source, image_size=image_size, size=size, split=split)
    raise ValueError(f"{source} holds conversations; for pictures give scenes, a folder, a .jsonl or a .tar")


def open_pairs(
    source: str, *, image_size: int, size: int | None = None, split: FileSplit = "train", detailed: bool = False, seed: int = 0
) -> Samples:
    """Captioned pictures of a source -> map-style data set of {"image": uint8 (3, H, W), "caption": str}.

    Args:
        detailed: captions of scenes name every colour and relation (for contrastive training).
    """
    kind = source_kind(source)
    if kind == "scenes":
        item: Any = "detailed_pair" if detailed else "pair"
        return _scenes(source, item, image_size=image_size, size=size, split=split, seed=seed)
    if kind == "tar":
        return TarDataset(source, image_size=image_size, captions=True, size=size, split=split)
    if kind == "jsonl":
        return CaptionedImages(source, image_size=image_size, size=size, split=split)
    raise ValueError(f"{source} has no captions: give scenes, a .jsonl of image and caption, or a .tar of KEY.jpg and KEY.txt")


def open_conversations(
    source: str,
    *,
    image_size: int,
    size: int | None = None,
    split: FileSplit = "train",
    image_folder: str | Path | None = None,
    seed: int = 0,
) -> Samples:
    """Conversations of a source -> map-style data set of LLaVA records whose `image` is an RGB picture (or absent).

    Args:
        image_size: of rendered scenes; pictures of a LLaVA file keep their own size.
        image_folder: where a LLaVA file's pictures lie; its own folder when not given.
    """
    kind = source_kind(source)
    if kind == "scenes":
        return _scenes(source, "conversation", image_size=image_size, size=size, split=split, seed=seed)
    if kind != "json":
        raise ValueError(f"{source} holds no conversations: give scenes, or a .json file in LLaVA's format")
    if split == "validation":
        raise ValueError(f"{source} is trained on whole, it has no validation split: give another file")
    return Conversations(source, image_folder=image_folder, size=size)


def _scenes(source: str, item: Any, *, image_size: int, size: int | None, split: FileSplit, seed: int) -> SceneDataset:
    if split == "all":
        raise ValueError("scenes have no end: split must be train or validation")
    sprites = source.partition(":")[2] or "shapes"
    return SceneDataset(split, size or DEFAULT_SCENES[split], item=item, image_size=image_size, sprites=sprites, seed=seed)


def fingerprint(source: str) -> str:
    """Identity of a source for a run's manifest: what it is, how much, and a checksum.

    Scenes are identified by what they render; files by content; folders and tars by names and sizes.
    """
    kind = source_kind(source)
    if kind == "scenes":
        dataset = _scenes(source, "pair", image_size=64, size=4, split="train", seed=0)
        drawn = b"".join(dataset.pixels(i).tobytes() + dataset.caption(i).encode() for i in range(len(dataset)))
        return f"{source}: crc32 {checksum(drawn)}"
    if kind == "folder":
        return f"{source}: {folder_fingerprint(source)}"
    if kind == "tar":
        return f"{source}: {tars_fingerprint(source)}"
    content = Path(source).read_bytes()
    return f"{source}: {len(content)} bytes, crc32 {checksum(content)}"
