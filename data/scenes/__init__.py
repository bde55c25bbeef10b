"""The embedded data set: compositional scenes rendered from a seed, with captions, questions and exact ground truth."""

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import (
    FAMILIES,
    Question,
    benchmark_prompts,
    questions,
    relation,
    wording,
)
from vqrae.data.scenes.scene import COLORS, Scene, SceneObject, SceneSampler, render
from vqrae.data.scenes.sprites import SPRITE_SETS, SpriteSet, load_sprites

__all__ = [
    "COLORS",
    "FAMILIES",
    "SPRITE_SETS",
    "Question",
    "Scene",
    "SceneDataset",
    "SceneObject",
    "SceneSampler",
    "SpriteSet",
    "benchmark_prompts",
    "load_sprites",
    "questions",
    "relation",
    "render",
    "wording",
]
