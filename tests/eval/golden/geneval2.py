"""Random prompts and judge's logits, and what GenEval 2's own scripts make of them.

git clone https://github.com/facebookresearch/GenEval2
python tests/eval/golden/geneval2.py GenEval2 > geneval2.json     # 6 benchmarks
python tests/eval/golden/geneval2.py GenEval2 200                 # counts those that differ

Nothing of GenEval 2 (CC BY-NC) is here: the prompts are invented, its code is read from the
checkout and runs with a stand-in for the language model.
"""

import contextlib
import io
import json
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqrae.eval.geneval2.prompts import DIGITS, SKILLS, Atom, GenEval2Item, write_prompts
from vqrae.eval.geneval2.scores import summarize
from vqrae.eval.judges.judge import ChatJudge

NUMBERS = ("one", "two", "three", "four", "five", "six", "se")  # as in Qwen's, "seven" is in pieces
WHOLE = [form for word in ("yes", "no", *NUMBERS) for form in (word, word.capitalize())]
# No two ways to answer share their first token: there the scripts would count it twice.
VOCABULARY = [*WHOLE, *(f" {word}" for word in WHOLE), "ven", " ", *DIGITS.values()]
Logits = dict[tuple[int, str], Tensor]
"""(V,) by the number of the prompt and the text that the judge is given."""


def tokens(text: str) -> list[int]:
    """Ids by the longest entries of the vocabulary."""
    ids = []
    while text:
        entry = max((entry for entry in VOCABULARY if text.startswith(entry)), key=len)
        ids.append(VOCABULARY.index(entry))
        text = text.removeprefix(entry)
    return ids


def benchmarks(count: int, seed: int = 0) -> Iterator[tuple[list[GenEval2Item], Logits]]:
    """Two prompts of each number of atoms from 3 to 10, and the judge's logits."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        items: list[GenEval2Item] = []
        logits: Logits = {}
        for number in range(16):
            atoms = []
            atom_count = 3 + number // 2
            while len(atoms) < atom_count + rng.integers(0, 3):
                skill = SKILLS[(number + len(atoms)) % len(SKILLS)]
                answer = list(DIGITS)[rng.integers(7)] if skill == "count" else "Yes"
                start = "How many" if skill == "count" else "Are the"
                question = f"{start} things {len(atoms)} of prompt {number}?"
                atoms.append(Atom(question, answer, skill))
                values = rng.normal(scale=rng.uniform(0.5, 5), size=len(VOCABULARY))
                text = f"{question} Answer in one word."
                logits[number, text] = torch.tensor(values, dtype=torch.float32)
            items.append(
                GenEval2Item(f"{number:05d}", f"prompt {number}", atom_count, tuple(atoms))
            )
        yield items, logits


def outcome(am: float, gm: float, skills: dict[str, float], counts: dict[str, float]) -> Any:
    """What must be equal of a benchmark."""
    return {"am": am, "gm": gm, "skills": skills, "atom_counts": counts}


def ours(items: list[GenEval2Item], logits: Logits) -> Any:
    """Our scores, with the judge that reads first tokens."""

    def probabilities(chats: Any) -> Tensor:
        rows = []
        for [message] in chats:
            image, text = message["content"]
            rows.append(logits[image["image"].getpixel((0, 0))[0], text["text"]].softmax(-1))
        return torch.stack(rows)

    class Tokenizer:
        unk_token_id = None

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": tokens(text)}

    judge = ChatJudge.__new__(ChatJudge)
    judge.name, judge.batch_size = "golden", 4
    judge.chat = types.SimpleNamespace(text_tokenizer=Tokenizer())  # type: ignore[assignment]
    judge.first_token_probabilities = probabilities  # type: ignore[method-assign]
    scores = {}
    for number, item in enumerate(items):
        image = Image.new("RGB", (1, 1), (number, 0, 0))
        asked = [(image, atom.question, atom.ways) for atom in item.atoms]
        scores[item.id] = judge.probabilities(asked)
    found = summarize(items, scores)
    skills = {name: value["score"] for name, value in found["skills"].items()}
    counts = {name: value["score"] for name, value in found["atom_counts"].items()}
    return outcome(found["soft_tifa_am"], found["soft_tifa_gm"], skills, counts)


class Inputs(dict):
    """What a processor returns."""

    def to(self, device: str) -> "Inputs":
        return self


def official(checkout: Path, items: list[GenEval2Item], logits: Logits) -> Any:
    """The published scripts' scores, their model replaced by the logits."""

    def template(messages: Any, **options: Any) -> Inputs:
        image, text = messages[0]["content"]
        return Inputs(key=(int(image["image"]), text["text"]))

    def generate(key: tuple[int, str], **options: Any) -> Any:
        return types.SimpleNamespace(scores=(logits[key][None],))

    parts = {"apply_chat_template": template, "tokenizer": types.SimpleNamespace(encode=tokens)}
    parts["batch_decode"] = lambda ids: [VOCABULARY[int(ids[0])]]
    processor, model = (
        types.SimpleNamespace(**parts),
        types.SimpleNamespace(device="cpu", generate=generate),
    )
    stub = types.ModuleType("transformers")
    for name in ("AutoModelForCausalLM", "GenerationConfig", "AutoTokenizer"):
        setattr(stub, name, None)
    for name, value in (("AutoProcessor", processor), ("Qwen3VLForConditionalGeneration", model)):
        loader = types.SimpleNamespace(from_pretrained=lambda *a, value=value, **o: value)
        setattr(stub, name, loader)
    real, arguments = sys.modules["transformers"], sys.argv
    codes: list[dict[str, Any]] = [{"__name__": "evaluation"}, {"__name__": "analysis"}]
    printed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        write_prompts(folder / "data.jsonl", items)
        images = {item.prompt: str(number) for number, item in enumerate(items)}
        (folder / "images.json").write_text(json.dumps(images))
        sys.modules["transformers"] = stub
        try:
            for code, file in zip(codes, ("evaluation", "soft_tifa_analysis"), strict=True):
                with contextlib.redirect_stdout(io.StringIO()):
                    exec((checkout / f"{file}.py").read_text(), code)
            for method in ("soft_tifa_am", "soft_tifa_gm"):
                sys.argv = ["evaluation.py", "--benchmark_data", f"{folder}/data.jsonl"]
                sys.argv += ["--image_filepath_data", f"{folder}/images.json", "--method", method]
                sys.argv += ["--output_file", f"{folder}/scores.json"]
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    codes[0]["main"]()
                printed[method] = out.getvalue().rpartition("Score: ")[2]
        finally:
            sys.modules["transformers"], sys.argv = real, arguments
        scores = json.loads((folder / "scores.json").read_text())
    skills = [[atom.skill for atom in item.atoms] for item in items]
    by_skill = codes[1]["per_skill_analysis"](scores, skills)
    order = ("object", "attribute", "count", "position", "verb")
    by_count = codes[1]["per_atomicity_analysis"](scores, [item.atom_count for item in items])
    counts = {str(count): float(value["accuracy"]) for count, value in by_count.items()}
    both = (float(printed["soft_tifa_am"]), float(printed["soft_tifa_gm"]))
    return outcome(*both, dict(zip(order, by_skill, strict=True)), counts)


def differs(a: Any, b: Any) -> bool:
    """By more than fp32 rounds, on a scale of 100."""
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(differs(a[key], b[key]) for key in a)
    return abs(a - b) > 1e-4


def main() -> None:
    checkout = Path(sys.argv[1])
    if len(sys.argv) > 2:
        random = benchmarks(int(sys.argv[2]), seed=1)
        found = [differs(official(checkout, *case), ours(*case)) for case in random]
        print(f"{sum(found)} of {len(found)} benchmarks differ")
    else:
        lines = ",\n".join(json.dumps(official(checkout, *case)) for case in benchmarks(6))
        print(f"[\n{lines}\n]")


if __name__ == "__main__":
    main()
