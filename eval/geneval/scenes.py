"""Embedded scenes that satisfy GenEval prompts, and how they score.

They give two ceilings of a generator's scores: the `truth` (what the detector itself loses) and its
`reconstruction` (what the codes lose).
"""

import dataclasses
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image

from vqrae.common.images import image_to_tensor, tensor_to_image
from vqrae.data.scenes.language import relation
from vqrae.data.scenes.scene import (
    COLOR_NAMES,
    Scene,
    SceneSampler,
    is_held_out_pair,
    is_held_out_triple,
    render,
)
from vqrae.data.scenes.sprites import SpriteSet, load_sprites
from vqrae.eval.geneval.judges import Judges, scene_judges
from vqrae.eval.geneval.rules import Record, evaluate_image, summarize
from vqrae.eval.sharding import map_shared
from vqrae.tokenizer.modeling import VQRAEModel

# The families whose prompts can hold combinations that training never showed.
COMPOSING = ("colors", "position", "color_attr")
BATCH = 64  # images that a tokenizer reconstructs, and that a process scores, at once


def satisfying_scene(record: Record, sampler: SceneSampler, rng: np.random.Generator) -> Scene:
    """A scene with exactly what a prompt asks for; the rest is distributed as in the data set.

    Layouts are sampled until one has the right number of objects and the relation; the prompt's
    names and colours are then put on it.
    """
    names: list[int] = []
    colors: list[int | None] = []
    where = None
    for clause in record["include"]:
        color = COLOR_NAMES.index(clause["color"]) if "color" in clause else None
        names += [sampler.sprites.names.index(clause["class"])] * clause["count"]
        colors += [color] * clause["count"]
        where = clause["position"][0] if "position" in clause else where
    while True:
        scene = sampler.sample(rng, held_out=None)
        one_name = len({item.name for item in scene.objects}) == 1  # groups have their own colours
        if len(scene.objects) != len(names) or one_name != (len(set(names)) == 1):
            continue
        objects = []
        for item, name, color in zip(scene.objects, names, colors, strict=True):
            color = item.color if color is None else color
            objects.append(dataclasses.replace(item, name=name, color=color))
        if where is None or relation(objects[1], objects[0]) == where:
            return Scene(tuple(objects), scene.background)


def satisfying_images(
    records: Sequence[Record],
    sprites: SpriteSet,
    *,
    image_size: int,
    per_prompt: int,
    seed: int = 0,
) -> list[tuple[Image.Image, Record]]:
    """`per_prompt` rendered scenes for each prompt, with the prompt's record."""
    sampler = SceneSampler(sprites, image_size)
    images = []
    for i, record in enumerate(records):
        for sample in range(per_prompt):
            scene = satisfying_scene(record, sampler, np.random.default_rng([seed, i, sample]))
            images.append((Image.fromarray(render(scene, sprites, image_size)), record))
    return images


@torch.inference_mode()
def reconstruct(pil_images: Sequence[Image.Image], tokenizer: VQRAEModel) -> list[Image.Image]:
    """A batch of images through the tokenizer and back."""
    images = torch.stack([image_to_tensor(image) for image in pil_images]).to(tokenizer.device)
    return [tensor_to_image(image) for image in tokenizer.decode(tokenizer.encode(images))]


def holds_held_out(record: Record, names: Sequence[str]) -> bool:
    """Whether a prompt names a combination that training never shows."""
    clauses = record["include"]
    for clause in clauses:
        name = names.index(clause["class"])
        if "color" in clause and is_held_out_pair(name, COLOR_NAMES.index(clause["color"])):
            return True
        if "position" in clause:
            where, target = clause["position"]
            if is_held_out_triple(name, where, names.index(clauses[target]["class"])):
                return True
    return False


def scene_scores(
    rows: Sequence[dict[str, Any]], records: Sequence[Record], names: Sequence[str]
) -> dict[str, Any]:
    """GenEval's summary; apart, prompts that compose: new combinations (`held_out`) and `seen`."""
    new = {record["prompt"] for record in records if holds_held_out(record, names)}
    halves: dict[str, list[dict[str, Any]]] = {"held_out": [], "seen": []}
    for row in rows:
        if row["tag"] in COMPOSING:
            halves["held_out" if row["prompt"] in new else "seen"].append(row)
    scores = summarize(rows)
    for half, chosen in halves.items():
        if chosen:
            summary = summarize(chosen)
            keys = [key for key in ("overall", *COMPOSING, "num_images") if key in summary]
            scores[half] = {key: summary[key] for key in keys}
    return scores


def score_images(
    images: Sequence[tuple[Image.Image, Record]],
    judges: Judges,
    tokenizer: VQRAEModel | None = None,
    label: str = "scores",
) -> list[dict[str, Any]]:
    """Result rows of images, or of a tokenizer's reconstructions; all processes get all rows."""

    def score(batch: Sequence[tuple[Image.Image, Record]]) -> list[dict[str, Any]]:
        shown = [image for image, _ in batch]
        shown = reconstruct(shown, tokenizer) if tokenizer is not None else shown
        rows = []
        for image, (_, record) in zip(shown, batch, strict=True):
            rows.append(evaluate_image(image, record, judges.detector, judges.classifier))
        return rows

    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return list(chain.from_iterable(map_shared(score, batches, label)))


def ceilings(
    records: Sequence[Record],
    tokenizer: VQRAEModel,
    *,
    sprites: str,
    images_per_prompt: int,
) -> dict[str, Any]:
    """Scores of scenes that satisfy the prompts: `truth`, and their `reconstruction`."""
    loaded, judges = load_sprites(sprites), scene_judges(sprites)
    size = tokenizer.config.image_size
    truth = satisfying_images(records, loaded, image_size=size, per_prompt=images_per_prompt)
    found = {}
    for name, copier in (("truth", None), ("reconstruction", tokenizer)):
        rows = score_images(truth, judges, copier, name)
        found[name] = scene_scores(rows, records, loaded.names)
    return found
