"""DPG-Bench over the embedded scenes: prompts and questions in its format, and a judge that reads the images exactly."""

import re
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import NUMBER_WORDS, plural, relation, with_article
from vqrae.data.scenes.scene import COLOR_NAMES, Scene
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.dpg_bench.judges import JudgeError
from vqrae.eval.dpg_bench.questions import Item, Question
from vqrae.eval.geneval.rules import Detection, confident_objects, relative_position
from vqrae.eval.geneval.scene_detector import SceneColorClassifier, SceneDetector


def scene_items(sprites: str, count: int) -> list[Item]:
    """Detailed captions of the first validation scenes, with the questions that they answer."""
    scenes = SceneDataset("validation", count, sprites=sprites)
    names = scenes.sprites.names
    return [
        Item(f"scene{i}", scenes.caption(i, detailed=True), scene_questions(scenes.scene(i), names))
        for i in range(count)
    ]


def true_images(sprites: str, count: int, image_size: int = 64) -> list[Image.Image]:
    """The scenes that the prompts of `scene_items` describe."""
    scenes = SceneDataset("validation", count, sprites=sprites, image_size=image_size)
    return [Image.fromarray(scenes.pixels(i)) for i in range(count)]


def scene_questions(scene: Scene, names: Sequence[str]) -> tuple[Question, ...]:
    """Questions that a scene answers with yes: what is there, its colours, how many, and where when there are two."""
    asked: list[Question] = []

    def ask(text: str, proposition: str, *parents: int) -> int:
        asked.append(Question(len(asked) + 1, f"{text} ?", proposition, parents))
        return len(asked)

    counts = Counter(names[item.name] for item in scene.objects)
    entities = {
        name: ask(f"is there {with_article(name)}", f"entity - whole ({name})") for name in counts
    }
    for name, color in dict.fromkeys((names[o.name], COLOR_NAMES[o.color]) for o in scene.objects):
        phrase = with_article(f"{color} {name}")
        ask(f"is there {phrase}", f"attribute - color ({name}, {color})", entities[name])
    for name, count in counts.items():
        if count > 1:
            text = f"are there {NUMBER_WORDS[count]} {plural(name)}"
            ask(text, f"other - count ({plural(name)}, =={count})", entities[name])
    if len(counts) == len(scene.objects) == 2 and (where := relation(*scene.objects)):
        a, b = (names[item.name] for item in scene.objects)
        ask(
            f"is the {a} {where} the {b}",
            f"relation - spatial ({a}, {b}, {where})",
            entities[a],
            entities[b],
        )
    return tuple(asked)


class SceneVQA:
    """Answers the questions of `scene_questions` with yes or no by what the scene detector sees."""

    def __init__(self, sprites: str = "shapes") -> None:
        loaded = load_sprites(sprites)
        self.detector, self.classifier = SceneDetector(loaded), SceneColorClassifier()
        self.name, self.identity = self.detector.name, "rules"
        names = "|".join(map(re.escape, sorted(loaded.names, key=len, reverse=True)))
        plurals = {plural(name): name for name in loaded.names}
        many = "|".join(map(re.escape, sorted(plurals, key=len, reverse=True)))
        self._plurals = plurals
        self._exists = re.compile(rf"is there an? (?:({'|'.join(COLOR_NAMES)}) )?({names}) \?")
        self._count = re.compile(rf"are there ({'|'.join(NUMBER_WORDS[2:])}) ({many}) \?")
        self._where = re.compile(
            rf"is the ({names}) (left of|right of|above|below) the ({names}) \?"
        )

    def answer(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        seen: dict[int, dict[str, list[Detection]]] = {}
        answers = []
        for image, question in pairs:
            if id(image) not in seen:
                seen[id(image)] = confident_objects(
                    self.detector.detect(image), self.detector.threshold
                )
            answers.append("yes" if self._holds(image, seen[id(image)], question) else "no")
        return answers

    def _holds(
        self, image: Image.Image, objects: dict[str, list[Detection]], question: str
    ) -> bool:
        if match := self._exists.fullmatch(question):
            color, name = match.groups()
            found = objects.get(name, [])
            return (
                bool(found)
                if color is None
                else color in self.classifier.classify(image, found, name)
            )
        if match := self._count.fullmatch(question):
            number, many = match.groups()
            return len(objects.get(self._plurals[many], [])) == NUMBER_WORDS.index(number)
        if match := self._where.fullmatch(question):
            a, where, b = match.groups()
            return any(
                where in relative_position(x.box, y.box)
                for x in objects.get(a, [])
                for y in objects.get(b, [])
            )
        raise JudgeError(
            f"judge=scenes understands questions about scenes only, got {question!r}: choose another judge="
        )
