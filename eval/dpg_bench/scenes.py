"""DPG-Bench over the embedded scenes: prompts, questions, and a judge that reads images exactly."""

import re
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import NUMBER_WORDS, plural, relation, with_article
from vqrae.data.scenes.scene import COLOR_NAMES, RELATIONS, Scene
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.dpg_bench.judges import JudgeError, Pairs
from vqrae.eval.dpg_bench.questions import Item, Question
from vqrae.eval.geneval.rules import Detection, confident_objects, relative_position
from vqrae.eval.geneval.scene_detector import SceneColorClassifier, SceneDetector


def scene_items(sprites: str, count: int) -> list[Item]:
    """Detailed captions of the first validation scenes, with the questions that they answer."""
    scenes = SceneDataset("validation", count, sprites=sprites)
    items = []
    for i in range(count):
        questions = scene_questions(scenes.scene(i), scenes.sprites.names)
        items.append(Item(f"scene{i}", scenes.caption(i, detailed=True), questions))
    return items


def true_images(sprites: str, count: int, image_size: int = 64) -> list[Image.Image]:
    """The scenes that the prompts of `scene_items` describe."""
    scenes = SceneDataset("validation", count, sprites=sprites, image_size=image_size)
    return [Image.fromarray(scenes.pixels(i)) for i in range(count)]


def scene_questions(scene: Scene, names: Sequence[str]) -> tuple[Question, ...]:
    """Questions that a scene answers with yes: things, colours, how many, and where if two."""
    asked: list[Question] = []

    def ask(text: str, proposition: str, *parents: int) -> int:
        asked.append(Question(len(asked) + 1, f"{text} ?", proposition, parents))
        return len(asked)

    counts = Counter(names[item.name] for item in scene.objects)
    entities = {}
    for name in counts:
        entities[name] = ask(f"is there {with_article(name)}", f"entity - whole ({name})")
    for name, color in dict.fromkeys((names[o.name], COLOR_NAMES[o.color]) for o in scene.objects):
        phrase = with_article(f"{color} {name}")
        ask(f"is there {phrase}", f"attribute - color ({name}, {color})", entities[name])
    for name, count in counts.items():
        if count > 1:
            text = f"are there {NUMBER_WORDS[count]} {plural(name)}"
            ask(text, f"other - count ({plural(name)}, =={count})", entities[name])
    if len(counts) == len(scene.objects) == 2 and (where := relation(*scene.objects)):
        a, b = (names[item.name] for item in scene.objects)
        proposition = f"relation - spatial ({a}, {b}, {where})"
        ask(f"is the {a} {where} the {b}", proposition, entities[a], entities[b])
    return tuple(asked)


class SceneJudge:
    """Answers the questions of `scene_questions` with yes or no by what the scene detector sees."""

    def __init__(self, sprites: str = "shapes") -> None:
        loaded = load_sprites(sprites)
        self.detector, self.classifier = SceneDetector(loaded), SceneColorClassifier()
        self.name, self.identity = self.detector.name, "rules"
        self._singular = {plural(name): name for name in loaded.names}
        names, many = _any_of(loaded.names), _any_of(list(self._singular))
        colors, numbers, where = map(_any_of, (COLOR_NAMES, NUMBER_WORDS[2:], RELATIONS))
        self._exists = re.compile(rf"is there an? (?:({colors}) )?({names}) \?")
        self._count = re.compile(rf"are there ({numbers}) ({many}) \?")
        self._where = re.compile(rf"is the ({names}) ({where}) the ({names}) \?")

    def answer(self, pairs: Pairs) -> list[str]:
        seen: dict[int, dict[str, list[Detection]]] = {}  # images are shared by their questions
        answers = []
        for image, question in pairs:
            if id(image) not in seen:
                found = self.detector.detect(image)
                seen[id(image)] = confident_objects(found, self.detector.threshold)
            answers.append("yes" if self._holds(image, seen[id(image)], question) else "no")
        return answers

    def _holds(
        self, image: Image.Image, objects: dict[str, list[Detection]], question: str
    ) -> bool:
        if match := self._exists.fullmatch(question):
            color, name = match.groups()
            found = objects.get(name, [])
            if color is None:
                return bool(found)
            return color in self.classifier.classify(image, found, name)
        if match := self._count.fullmatch(question):
            number, many = match.groups()
            return len(objects.get(self._singular[many], [])) == NUMBER_WORDS.index(number)
        if match := self._where.fullmatch(question):
            a, where, b = match.groups()
            for x in objects.get(a, []):
                if any(where in relative_position(x.box, y.box) for y in objects.get(b, [])):
                    return True
            return False
        raise JudgeError(f"judge=scenes answers questions about scenes only, got {question!r}")


def _any_of(words: Sequence[str]) -> str:
    """A pattern for one of the words; the longest first, for some begin like others."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
