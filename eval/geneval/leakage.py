"""Benchmark prompts among training captions: a generator that has read them is not tested by them.

BLIP3o-60k, for one, holds some 10,000 captions in GenEval's templates.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from vqrae.common.files import text_lines
from vqrae.data.image_files import scan_jsonl
from vqrae.data.samples import EncodedImages
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.sources import open_pairs, source_kind
from vqrae.data.stream import parse_mixture

SCENES = 100_000  # captions that are taken of scenes, which are endless, when no number is given
EXAMPLES = 20
TEMPLATE = re.compile(r"^an? photo of ")  # GenEval's


def training_captions(source: str, limit: int | None = None) -> Iterator[str]:
    """The captions of a data source, without decoding images.

    Args:
        source: what `vqrae.data.sources` accepts, or FILE.txt with one caption per line.
        limit: take the first ones only, of each part of a mixture.
    """
    if source.endswith(".txt"):
        yield from islice((line.strip() for _, line in text_lines(source) if line.strip()), limit)
        return
    kind = source_kind(source)
    if kind == "mixture":
        for part, _ in parse_mixture(source):
            yield from training_captions(part, limit)
    elif kind == "jsonl":
        yield from islice((caption for _, caption in scan_jsonl(source)[0]), limit)
    elif kind == "scenes":
        scenes = open_pairs(source, image_size=64, size=limit or SCENES)
        assert isinstance(scenes, SceneDataset)
        yield from map(scenes.caption, range(len(scenes)))
    else:
        pairs = open_pairs(source, image_size=64, size=limit, split="all")
        assert isinstance(pairs, EncodedImages)
        captions = chain.from_iterable(map(pairs.texts, range(len(pairs))))
        yield from map(str.strip, captions)


def normalized(text: str) -> str:
    """Lower case, one form of every character, no punctuation, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())


def leakage_report(prompts: Sequence[str], captions: Iterable[str]) -> dict[str, Any]:
    """How many benchmark prompts occur among captions.

    Returns:
        num_prompts and num_captions; the prompts that equal a caption, `exact` and `normalized`;
        `contained`, prompts within a longer caption; `template_captions`, captions that start like
        a GenEval prompt; the first `examples` of prompts found.
    """
    wanted, plain = set(prompts), {normalized(prompt) for prompt in prompts}
    lengths = sorted({len(prompt.split()) for prompt in plain})
    exact: set[str] = set()
    equal: set[str] = set()
    contained: set[str] = set()
    total = template = 0
    for caption in captions:
        total += 1
        template += bool(TEMPLATE.match(caption.casefold()))
        exact |= wanted & {caption}
        text = normalized(caption)
        equal |= plain & {text}
        words = text.split()
        for length in lengths:
            starts = range(len(words) - length + 1) if length < len(words) else ()
            contained |= plain & {" ".join(words[i : i + length]) for i in starts}
    found = [prompt for prompt in prompts if normalized(prompt) in equal | contained]
    texts = list(map(normalized, prompts))
    return {
        "num_prompts": len(prompts),
        "num_captions": total,
        "exact": sum(map(exact.__contains__, prompts)),
        "normalized": sum(map(equal.__contains__, texts)),
        "contained": sum(map(contained.__contains__, texts)),
        "template_captions": template,
        "examples": sorted(set(found))[:EXAMPLES],
    }
