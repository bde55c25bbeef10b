"""DPG-Bench's scores from a judge's answers: as the benchmark means them, and as its published script computes them.

A question counts when it and every question that it depends on are answered with yes. An image scores the share of its
questions that count, a prompt the mean of its images, the benchmark 100 x the mean of its prompts. Categories take the
answers themselves, whatever they depend on.

The published script (ELLA's compute_dpg_bench.py) departs from that; `official_scores` reproduces it for comparison with old
numbers:

1. Categories hear the last image of each prompt only.
2. With several processes, categories are gathered in another order on each, which mixes them up. Not reproduced: it is
   chance, and absent with one process.
3. The table's first row is skipped. Where a question depends on it, the whole prompt may fail.
4. Prompts that fail leave every mean without a word. Here they are counted in both ways of scoring.
5. Its results land among the images and fail as images in the next run: no effect on scores.
6. Its switch for half precision has no effect on the judge: none on scores.

Besides: an answer counts when it equals "yes" to the letter; dependencies are followed in the order of the table, so that a
question before its parent hears what the parent was answered, not what it counts.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vqrae.eval.dpg_bench.questions import Item

Answers = Sequence[Sequence[str]]
"""What a judge says: for each image of a prompt, one answer per question in the table's order."""


def is_yes(answer: str) -> bool:
    """Whether the first word of an answer is yes: "Yes, it is." is one."""
    return _first_word(answer) == "yes"


def is_clear(answer: str) -> bool:
    """Whether an answer is a yes or a no at all."""
    return _first_word(answer) in ("yes", "no")


def _first_word(answer: str) -> str:
    match = re.search(r"\w+", answer.casefold())
    return match.group() if match else ""


def image_score(item: Item, answers: Sequence[str]) -> float:
    """Share of an item's questions that count on one image."""
    yes = {
        question.number: is_yes(answer)
        for question, answer in zip(item.questions, answers, strict=True)
    }
    ancestors = item.ancestors()
    return float(
        np.mean(
            [
                right and all(yes[parent] for parent in ancestors[number])
                for number, right in yes.items()
            ]
        )
    )


def summarize(items: Sequence[Item], answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Scores over the prompts that have answers.

    Args:
        answers: by item id.

    Returns:
        `dpg`, 0 to 100; its `interval`, 95 % by the spread of prompts; `categories` and `categories_detailed`, 0 to 100;
        num_prompts, num_scored; `unclear_answers`, neither yes nor no, which count as no.

    Raises:
        ValueError: when no prompt has answers.
    """
    scored = [item for item in items if item.id in answers]
    by_category: defaultdict[str, list[bool]] = defaultdict(list)
    unclear = 0
    for item in scored:
        for image in answers[item.id]:
            for question, answer in zip(item.questions, image, strict=True):
                by_category[question.category].append(is_yes(answer))
                unclear += not is_clear(answer)
    prompts = [
        float(np.mean([image_score(item, image) for image in answers[item.id]])) for item in scored
    ]
    return {**_result(items, prompts, by_category), "unclear_answers": unclear}


def official_scores(items: Sequence[Item], answers: Mapping[str, Answers]) -> dict[str, Any]:
    """The same keys by the published script's formulas, faults included; see the module.

    Returns:
        As `summarize`, and in `dropped` the prompts that the script loses, with the reason.
    """
    items = [dataclasses.replace(items[0], questions=items[0].questions[1:]), *items[1:]]
    by_category: defaultdict[str, list[bool]] = defaultdict(list)
    prompts, dropped, unclear = [], {}, 0
    for number, item in enumerate(items):
        if item.id not in answers:
            continue
        images = [list(image)[1:] if number == 0 else list(image) for image in answers[item.id]]
        try:
            prompts.append(float(np.mean([_official_image_score(item, image) for image in images])))
        except (KeyError, ZeroDivisionError) as error:
            dropped[item.id] = (
                f"question {error} was skipped with the first row"
                if item.questions
                else "no question left"
            )
            continue
        for question, answer in zip(item.questions, images[-1], strict=True):
            by_category[question.category].append(answer == "yes")
        unclear += sum(answer not in ("yes", "no") for image in images for answer in image)
    return {**_result(items, prompts, by_category), "unclear_answers": unclear, "dropped": dropped}


def _official_image_score(item: Item, answers: Sequence[str]) -> float:
    counts = {
        question.number: answer == "yes"
        for question, answer in zip(item.questions, answers, strict=True)
    }
    for question in item.questions:
        if any(not counts[parent] for parent in question.parents):
            counts[question.number] = False
    return sum(counts.values()) / len(counts)


def _result(
    items: Sequence[Item], prompts: Sequence[float], by_category: Mapping[str, Sequence[bool]]
) -> dict[str, Any]:
    if not prompts:
        raise ValueError(f"none of {len(items)} prompts could be scored")
    broad: defaultdict[str, list[bool]] = defaultdict(list)
    for category, answers in by_category.items():
        broad[category.split("-")[0].strip()] += answers
    mean = 100 * float(np.mean(prompts))
    spread = (
        196 * float(np.std(prompts, ddof=1)) / len(prompts) ** 0.5 if len(prompts) > 1 else 100.0
    )
    return {
        "dpg": mean,
        "interval": (max(0.0, mean - spread), min(100.0, mean + spread)),
        "interval_method": "95 %, normal approximation over prompts",
        "categories": {
            name: 100 * float(np.mean(answers)) for name, answers in sorted(broad.items())
        },
        "categories_detailed": {
            name: 100 * float(np.mean(answers)) for name, answers in sorted(by_category.items())
        },
        "num_prompts": len(items),
        "num_scored": len(prompts),
    }
