"""Scenes as map-style data sets: index -> scene, the same on every machine and in every process."""

from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vqrae.data.samples import checksum
from vqrae.data.scenes import language
from vqrae.data.scenes.language import Question
from vqrae.data.scenes.scene import Scene, SceneSampler, render
from vqrae.data.scenes.sprites import load_sprites

Split = Literal["train", "validation"]
Item = Literal["image", "pair", "detailed_pair", "grounded_pair", "conversation"]
_SPLIT_SEED = {"train": 0, "validation": 1}  # in the seed of each scene: no two splits share one
_LANGUAGE_SEED = 7  # a random stream of its own: asking a question never changes an image


class SceneDataset(Dataset):
    """Scenes that `(seed, split, index)` decide.

    Training scenes hold no held-out combination; every second validation scene (the odd indices)
    holds at least one.

    Args:
        split: `train` or `validation`, disjoint by seed.
        size: number of scenes; they are rendered on the fly, so a million costs nothing.
        item: what `dataset[i]` returns. `image` -> {image}; `pair` -> {image, caption};
            `detailed_pair` -> the same with every colour and relation named; `grounded_pair` ->
            also `boxes` (n, 4) of the objects, (left, top, right, bottom) as shares of the image,
            and `phrases`, what each is called and where it is; `conversation` -> a LLaVA record
            {id, image, conversations}, of scenes that more often hold things to compare. Images
            are uint8 tensors (3, H, W), in a conversation PIL's.
        num_questions: at most, of one conversation.
    """

    def __init__(
        self,
        split: Split = "train",
        size: int = 1_000_000,
        *,
        item: Item = "image",
        image_size: int = 64,
        sprites: str = "shapes",
        seed: int = 0,
        num_questions: int = 20,
    ) -> None:
        self.split, self.size = split, size
        self.item, self.seed = item, seed
        self.num_questions = num_questions
        self.sprites = load_sprites(sprites)
        is_lesson = item == "conversation"
        weights = SceneSampler.LESSON_WEIGHTS if is_lesson else SceneSampler.KIND_WEIGHTS
        self.sampler = SceneSampler(self.sprites, image_size, weights)
        self._latest: tuple[int, Scene] | None = None

    def __len__(self) -> int:
        return self.size

    def _rng(self, index: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _SPLIT_SEED[self.split], index, *stream])

    def scene(self, index: int) -> Scene:
        """The scene of an index."""
        # The newest is kept: image, caption and questions of an index ask for it in turn.
        if self._latest is None or self._latest[0] != index:
            held_out = self.split == "validation" and index % 2 == 1
            self._latest = index, self.sampler.sample(self._rng(index), held_out=held_out)
        return self._latest[1]

    def pixels(self, index: int) -> np.ndarray:
        """The rendered scene, uint8 (H, W, 3)."""
        return render(self.scene(index), self.sprites, self.sampler.image_size)

    def image(self, index: int) -> Tensor:
        """The rendered scene, uint8 (3, H, W)."""
        return torch.from_numpy(self.pixels(index)).permute(2, 0, 1).contiguous()

    def caption(self, index: int, *, detailed: bool = False) -> str:
        """A detailed caption, or what a generator is trained on, see `language.wording`."""
        scene, rng = self.scene(index), self._rng(index, _LANGUAGE_SEED)
        if detailed:
            objects = language.shuffled(scene.objects, rng)
            return language.caption(objects, self.sprites.names, rng, detailed=True)
        return language.wording(scene, self.sprites.names, rng, self.sampler.image_size)

    def wordings(self, index: int, count: int) -> list[str]:
        """Several captions of the scene with this index, each with its own wording."""
        scene, names = self.scene(index), self.sprites.names
        size = self.sampler.image_size
        rngs = [np.random.default_rng([self.seed, index, draw]) for draw in range(count)]
        return [language.wording(scene, names, rng, size) for rng in rngs]

    def description(self, index: int) -> str:
        """The objects of a scene and their places."""
        objects = language.shuffled(self.scene(index).objects, self._rng(index, _LANGUAGE_SEED))
        return language.description(objects, self.sprites.names, self.sampler.image_size)

    def grounding(self, index: int) -> dict[str, Any]:
        """Boxes and phrases of the objects of a scene, see `item`."""
        size = self.sampler.image_size
        corners, phrases = [], []
        for o in self.scene(index).objects:
            corners.append((o.left, o.top, o.left + o.size, o.top + o.size))
            called = language.object_phrases(o, self.sprites.names)
            phrases.append((*called, *language.place_phrases(o, size)))
        return {"boxes": torch.tensor(corners) / size, "phrases": phrases}

    def questions(self, index: int, limit: int = 8) -> list[Question]:
        """Questions about a scene, with answers: those that a model is scored on."""
        scene, rng = self.scene(index), self._rng(index, _LANGUAGE_SEED)
        return language.questions(scene, self.sprites.names, rng, limit)

    def conversation(self, index: int) -> dict[str, Any]:
        """The scene as a LLaVA record with a PIL image: a lesson, in one of ten cases with a
        description.

        The description comes last, for the answers before could be copied from it.
        """
        scene, rng = self.scene(index), self._rng(index, _LANGUAGE_SEED, 1)
        lesson = language.lesson(scene, self.sprites.names, rng, self.sampler.image_size)
        pairs = [(question.text, question.answer) for question in lesson[: self.num_questions]]
        if rng.random() < 0.1:
            pairs.append((language.DESCRIBE, self.description(index)))
        turns = []
        for text, answer in pairs:
            turns.append({"from": "human", "value": text})
            turns.append({"from": "gpt", "value": answer})
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        return {
            "id": f"{self.sprites.name}-{self.split}-{index}",
            "image": Image.fromarray(self.pixels(index)),
            "conversations": turns,
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside of this data set of {self.size} scenes")
        if self.item == "conversation":
            return self.conversation(index)
        sample: dict[str, Any] = {"image": self.image(index)}
        if self.item != "image":
            sample["caption"] = self.caption(index, detailed=self.item != "pair")
        if self.item == "grounded_pair":
            sample |= self.grounding(index)
        return sample

    def modality_lengths(self) -> np.ndarray:
        """int64 (scenes,): all have an image and are about equally long, see `GroupedSampler`."""
        return np.ones(self.size, dtype=np.int64)

    @staticmethod
    def fingerprint(source: str) -> str:
        """A checksum of the first images and captions of a source, `scenes` or `scenes:SPRITES`."""
        scenes = SceneDataset(size=4, sprites=source.partition(":")[2] or "shapes")
        rendered = [scenes.pixels(i).tobytes() + scenes.caption(i).encode() for i in range(4)]
        return f"crc32 {checksum(b''.join(rendered))}"
