"""GenEval 2 over the embedded scenes: what their captions say, atom by atom."""

from collections import Counter

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import NUMBER_WORDS, plural
from vqrae.eval.dpg_bench.questions import broad
from vqrae.eval.dpg_bench.scenes import scene_questions
from vqrae.eval.geneval2.prompts import Atom, GenEval2Item

# Not `other`: numbers are asked for in words.
_SKILLS = {"entity": "object", "attribute": "attribute", "relation": "position"}


def scene_items(sprites: str, count: int) -> list[GenEval2Item]:
    """The first `count` different detailed captions of validation scenes, with their atoms.

    An item is named after its scene.
    """
    scenes = SceneDataset("validation", sprites=sprites)
    names = scenes.sprites.names
    items: dict[str, GenEval2Item] = {}
    index = 0
    while len(items) < count:
        caption, scene = scenes.caption(index, detailed=True), scenes.scene(index)
        atoms = []
        for name, number in Counter(names[item.name] for item in scene.objects).items():
            question = f"How many {plural(name)} are there ?"
            atoms.append(Atom(question, NUMBER_WORDS[number], "count"))
        for asked in scene_questions(scene, names):
            kind = broad(asked.category)
            atoms += [Atom(asked.text, "Yes", _SKILLS[kind])] if kind in _SKILLS else []
        # As in GenEval 2, "a" is checked but is not an atom.
        atom_count = sum(atom.answer != "one" for atom in atoms)
        items.setdefault(caption, GenEval2Item(f"{index:05d}", caption, atom_count, tuple(atoms)))
        index += 1
    return list(items.values())
