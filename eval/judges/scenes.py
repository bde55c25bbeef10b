"""A judge that reads the embedded scenes exactly."""

import re
from collections.abc import Sequence

from PIL import Image

from vqrae.data.scenes.language import NUMBER_WORDS, plural
from vqrae.data.scenes.scene import COLOR_NAMES, RELATIONS
from vqrae.data.scenes.sprites import load_sprites
from vqrae.eval.geneval.rules import Detection, confident_objects, relative_position
from vqrae.eval.geneval.scene_detector import SceneColorClassifier, SceneDetector
from vqrae.eval.judges.judge import Expected, JudgeError, Pairs


class SceneJudge:
    """Answers questions by what the scene detector sees: yes or no, or how many, and surely."""

    def __init__(self, sprites: str = "shapes") -> None:
        loaded = load_sprites(sprites)
        self.detector, self.classifier = SceneDetector(loaded), SceneColorClassifier()
        self.name, self.identity = self.detector.name, "rules"
        self._singular = {plural(name): name for name in loaded.names}
        names, many = _any_of(loaded.names), _any_of(list(self._singular))
        colors, numbers, where = map(_any_of, (COLOR_NAMES, NUMBER_WORDS[2:], RELATIONS))
        self._exists = re.compile(rf"is there an? (?:({colors}) )?({names}) \?")
        self._count = re.compile(rf"are there ({numbers}) ({many}) \?")
        self._number = re.compile(rf"How many ({many}) are there \?")
        self._where = re.compile(rf"is the ({names}) ({where}) the ({names}) \?")

    def answer(self, pairs: Pairs) -> list[str]:
        seen: dict[int, dict[str, list[Detection]]] = {}  # images are shared by their questions
        answers = []
        for image, question in pairs:
            if id(image) not in seen:
                found = self.detector.detect(image)
                seen[id(image)] = confident_objects(found, self.detector.threshold)
            if match := self._number.fullmatch(question):
                number = len(seen[id(image)].get(self._singular[match.group(1)], []))
                words = dict(enumerate(NUMBER_WORDS))
                answers.append(words.get(number, str(number)))
            else:
                answers.append("yes" if self._holds(image, seen[id(image)], question) else "no")
        return answers

    def probabilities(self, expected: Expected) -> list[float]:
        """As `SoftJudge`: 1 or 0."""
        said = self.answer([(image, question) for image, question, _ in expected])
        return [float(word in ways) for word, (_, _, ways) in zip(said, expected, strict=True)]

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
