"""Random tables and answers, and what ELLA's own compute_dpg_bench.py makes of them.

git clone https://github.com/TencentQQGYLab/ELLA
python tests/eval/golden/dpg_bench.py ELLA > dpg_bench.json     # writes 60 tables
python tests/eval/golden/dpg_bench.py ELLA 600                  # counts the tables that differ
"""

import contextlib
import json
import math
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqrae.eval.dpg_bench.questions import DPGItem, DPGQuestion, write_questions
from vqrae.eval.dpg_bench.scores import official_scores

CATEGORIES = (
    "entity - whole", "entity - part", "attribute - color", "attribute - size",
    "relation - spatial", "global - ",
    "other - count",
)  # fmt: skip
Said = dict[str, list[list[str]]]
"""By item, for each image, one answer per question."""


def tables(count: int, seed: int = 0) -> Iterator[tuple[list[DPGItem], Said]]:
    """Tables of one to six prompts, questions in any order, answers of one to four images."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        items, said, images = [], {}, int(rng.integers(1, 5))
        for i in range(int(rng.integers(1, 7))):
            questions = []
            for number in range(1, int(rng.integers(1, 7)) + 1):
                parents = tuple(parent for parent in range(1, number) if rng.random() < 0.3)
                category = CATEGORIES[rng.integers(len(CATEGORIES))]
                text = f"item{i} q{number} ?"
                questions.append(DPGQuestion(number, text, f"{category} (x, y)", parents))
            if rng.random() < 0.3:
                questions = [questions[place] for place in rng.permutation(len(questions))]
            items.append(DPGItem(f"item{i}", f"prompt {i}", tuple(questions)))
            kinds = ("yes", "yes", "yes", "no", "Yes", "maybe")
            said[f"item{i}"] = [[str(rng.choice(kinds)) for _ in questions] for _ in range(images)]
        yield items, said


def outcome(
    dpg: float, broad: dict[str, float], detailed: dict[str, float], dropped: int
) -> dict[str, Any]:
    """What must be equal of a table."""
    rounded = {}
    for name, scores in (("l1", broad), ("l2", detailed)):
        rounded[name] = {key: round(value, 6) for key, value in sorted(scores.items())}
    return {"dpg": round(dpg, 6), **rounded, "dropped": dropped}


def ours(items: list[DPGItem], said: Said) -> dict[str, Any] | None:
    """Our scores; None where no prompt is left."""
    try:
        found = official_scores(items, said)
    except ValueError:
        return None
    categories = (found["categories"], found["categories_detailed"])
    return outcome(found["dpg"], *categories, len(found["dropped"]))


def official(checkout: Path, items: list[DPGItem], said: Said) -> dict[str, Any] | None:
    """The published script's scores, its model replaced by the given answers."""
    source = (checkout / "dpg_bench" / "compute_dpg_bench.py").read_text()
    source = source.replace("time.sleep(3)", "")
    text = 'read_csv(args.csv, dtype={"dependency": str})'
    source = source.replace("read_csv(args.csv)", text)
    code: dict[str, Any] = {"__name__": "official"}
    exec(source, code)
    alone = {"is_main_process": True, "num_processes": 1, "process_index": 0}
    process = types.SimpleNamespace(device="cpu", **alone)
    process.prepare, process.wait_for_everyone = (lambda model: model), (lambda: None)
    code.update(Accelerator=lambda: process, gather_object=list, tqdm=lambda names: names)

    def answer(cell: Image.Image, question: str) -> str:
        item, image, _ = cell.getpixel((0, 0))
        place = [q.text for q in items[item].questions].index(question)
        return said[items[item].id][image][place]

    code["MPLUG"] = lambda device: types.SimpleNamespace(vqa=answer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        write_questions(folder / "table.csv", items)
        for i, item in enumerate(items):
            grid = Image.new("RGB", (4, 4))
            for image, corner in enumerate(((0, 0), (2, 0), (0, 2), (2, 2))):
                grid.paste((i, image, 0), (*corner, corner[0] + 2, corner[1] + 2))
            grid.save(folder / "images" / f"{item.id}.png")
        code["parse_args"] = lambda: types.SimpleNamespace(
            image_root_path=str(folder / "images"), csv=str(folder / "table.csv"),
            res_path=str(folder / "result.txt"),
            resolution=2, pic_num=len(said[items[0].id]), vqa_model="mplug",
        )  # fmt: skip
        log = (folder / "log").open("w")
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code["main"]()
        dropped = (folder / "log").read_text().count("Failed filename")
        return _parse((folder / "result.txt").read_text(), dropped)


def _parse(text: str, dropped: int) -> dict[str, Any] | None:
    sections: dict[str, dict[str, float]] = {"L1": {}, "L2": {}}
    section, dpg = "", math.nan
    for line in text.splitlines():
        key, _, value = line.strip().rpartition(": ")
        if line.startswith(("L1", "L2")):
            section = line[:2]
        elif line.startswith("\t"):
            sections[section][key] = float(value)
        elif key == "DPG-Bench score":
            dpg = float(value)
    return None if math.isnan(dpg) else outcome(dpg, sections["L1"], sections["L2"], dropped)


def main() -> None:
    checkout = Path(sys.argv[1])
    if len(sys.argv) > 2:
        random = tables(int(sys.argv[2]), seed=1)
        found = [(official(checkout, *table), ours(*table)) for table in random]
        dropped = sum(bool(a and a["dropped"]) for a, _ in found)
        different = sum(a != b for a, b in found)
        print(f"{different} of {len(found)} tables differ, {dropped} have dropped prompts")
    else:
        lines = ",\n".join(json.dumps(official(checkout, *table)) for table in tables(60))
        print(f"[\n{lines}\n]")


if __name__ == "__main__":
    main()
