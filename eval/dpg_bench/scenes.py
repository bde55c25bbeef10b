"""DPG-Bench over the embedded scenes: prompts and questions."""

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import NUMBER_WORDS, plural, relation, with_article
from vqrae.data.scenes.scene import COLOR_NAMES, Scene
from vqrae.eval.dpg_bench.questions import DPGItem, DPGQuestion


def scene_items(sprites: str, count: int) -> list[DPGItem]:
    """Detailed captions of the first validation scenes, with the questions that they answer."""
    scenes = SceneDataset("validation", count, sprites=sprites)
    items = []
    for i in range(count):
        questions = scene_questions(scenes.scene(i), scenes.sprites.names)
        items.append(DPGItem(f"scene{i}", scenes.caption(i, detailed=True), questions))
    return items


def true_images(sprites: str, count: int, image_size: int = 64) -> list[Image.Image]:
    """The scenes that the prompts of `scene_items` describe."""
    scenes = SceneDataset("validation", count, sprites=sprites, image_size=image_size)
    return [Image.fromarray(scenes.pixels(i)) for i in range(count)]


def scene_questions(scene: Scene, names: Sequence[str]) -> tuple[DPGQuestion, ...]:
    """Questions that a scene answers with yes: things, colours, how many, and where if two."""
    asked: list[DPGQuestion] = []

    def ask(text: str, proposition: str, *parents: int) -> int:
        asked.append(DPGQuestion(len(asked) + 1, f"{text} ?", proposition, parents))
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
