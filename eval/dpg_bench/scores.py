"""DPG-Bench's scores from a judge's answers: as it means them, and as its script computes them.

A question counts when it and every question that it depends on are answered with yes. An image
scores the share of its questions that count, a prompt the mean of its images, the benchmark 100 x
the mean of its prompts. Categories take the answers themselves, whatever they depend on.

The published script (ELLA's compute_dpg_bench.py) departs from that; `official_scores` reproduces
it for comparison with old numbers:

1. Categories use the last image of each prompt only. 2. With several processes, categories are
gathered in another order on each, which mixes them up. Not
   reproduced: it is random, and absent with one process.
3. The table's first row is skipped. Where a question depends on it, the whole prompt may fail. 4.
Prompts that fail leave every mean silently. Here they are counted in both ways of scoring. 5. An
answer counts when it equals "yes" to the letter. 6. Dependencies are followed in the order of the
table: a question before its parent uses what the parent
   was answered, not whether it counts.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vqrae.eval.dpg_bench.questions import DPGItem, broad

Answers = Sequence[Sequence[str]]
"""What a judge says: for each image of a prompt, one answer per question in the table's order."""


def first_word(answer: str) -> str:
    """Lower case: "Yes, it is." is a yes."""
    match = re.search(r"\w+", answer.casefold())
    return match.group() if match else ""


def ancestors(item: DPGItem) -> dict[int, set[int]]:
    """The existing questions that each one depends on, also indirectly, without itself."""
    parents = {question.number: question.parents for question in item.questions}
    found: dict[int, set[int]] = {}
    for number in parents:
        reached: set[int] = set()
        todo = list(parents[number])
        while todo:
            parent = todo.pop()
            if parent in parents and parent not in reached:
                reached.add(parent)
                todo += parents[parent]
        found[number] = reached - {number}
    return found


def image_score(item: DPGItem, answers: Sequence[str]) -> float:
    """Share of an item's questions that count on one image."""
    yes = {}
    for question, answer in zip(item.questions, answers, strict=True):
        yes[question.number] = first_word(answer) == "yes"
    counts = []
    for number, needed in ancestors(item).items():
        counts.append(yes[number] and all(yes[parent] for parent in needed))
    return float(np.mean(counts))


def summarize(items: Sequence[DPGItem], answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Scores over the prompts that have answers (by item id).

    Returns `dpg`, 0 to 100; its `interval`, 95 % by the spread of prompts; `categories` and
    `categories_detailed`, 0 to 100; num_prompts, num_scored; `unclear_answers`, neither yes nor no,
    which count as no. Raises ValueError when no prompt has answers.
    """
    by_category: defaultdict[str, list[bool]] = defaultdict(list)
    prompts, unclear = [], 0
    for item in items:
        if item.id not in answers:
            continue
        images = answers[item.id]
        prompts.append(float(np.mean([image_score(item, image) for image in images])))
        for image in images:
            for question, answer in zip(item.questions, image, strict=True):
                word = first_word(answer)
                by_category[question.category].append(word == "yes")
                unclear += word not in ("yes", "no")
    return {**_result(len(items), prompts, by_category), "unclear_answers": unclear}


def official_scores(items: Sequence[DPGItem], answers: Mapping[str, Answers]) -> dict[str, Any]:
    """As `summarize`, by the published script's formulas, faults included; see the module.

    `dropped` has the prompts that the script loses, with the reason.
    """
    items = [replace(items[0], questions=items[0].questions[1:]), *items[1:]]
    by_category: defaultdict[str, list[bool]] = defaultdict(list)
    dropped: dict[str, str] = {}
    prompts, unclear = [], 0
    for number, item in enumerate(items):
        if item.id not in answers:
            continue
        images = [list(image)[1 if number == 0 else 0 :] for image in answers[item.id]]
        try:
            prompts.append(float(np.mean([_official_image_score(item, image) for image in images])))
        except KeyError as error:
            dropped[item.id] = f"question {error} was skipped with the first row"
            continue
        except ZeroDivisionError:
            dropped[item.id] = "no question left"
            continue
        for question, answer in zip(item.questions, images[-1], strict=True):
            by_category[question.category].append(answer == "yes")
        for image in images:
            unclear += sum(answer not in ("yes", "no") for answer in image)
    result = _result(len(items), prompts, by_category)
    return {**result, "unclear_answers": unclear, "dropped": dropped}


def _official_image_score(item: DPGItem, answers: Sequence[str]) -> float:
    counts = {}
    for question, answer in zip(item.questions, answers, strict=True):
        counts[question.number] = answer == "yes"
    for question in item.questions:
        if any(not counts[parent] for parent in question.parents):
            counts[question.number] = False
    return sum(counts.values()) / len(counts)


def _result(
    num_prompts: int, prompts: Sequence[float], by_category: Mapping[str, Sequence[bool]]
) -> dict[str, Any]:
    if not prompts:
        raise ValueError(f"none of {num_prompts} prompts could be scored")
    by_broad: defaultdict[str, list[bool]] = defaultdict(list)
    for category, yes in by_category.items():
        by_broad[broad(category)] += yes
    mean, spread = 100 * float(np.mean(prompts)), 100.0
    if len(prompts) > 1:
        spread = 196 * float(np.std(prompts, ddof=1)) / len(prompts) ** 0.5
    return {
        "dpg": mean,
        "interval": (max(0.0, mean - spread), min(100.0, mean + spread)),
        "interval_method": "95 %, normal approximation over prompts",
        "categories": _percent(by_broad),
        "categories_detailed": _percent(by_category),
        "num_prompts": num_prompts,
        "num_scored": len(prompts),
    }


def _percent(by_category: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: 100 * float(np.mean(yes)) for name, yes in sorted(by_category.items())}
