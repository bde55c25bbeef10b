"""The quickstart's report as one HTML file without outside resources; its text and looks are in `report.html.jinja`."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

from vqrae.common.run import format_duration
from vqrae.data.scenes.scene import is_held_out
from vqrae.eval.figures import data_uri
from vqrae.quickstart.evidence import (
    BUDGETS,
    CURVES,
    AskedScene,
    Evidence,
    Prompt,
    Reconstructions,
    Row,
)
from vqrae.quickstart.figures import curve_svg, usage_svg

FAMILY_LABELS = {
    "single_object": "One thing",
    "two_object": "Two things",
    "counting": "Counting",
    "colors": "Colour",
    "position": "Position",
    "color_attr": "Two things with colours",
}
KIND_LABELS = {
    "shape": "What is it?",
    "color": "What colour?",
    "count": "How many?",
    "relation": "Where?",
    "yes_no": "Is there …?",
}
SECTIONS = (
    ("idea", "The idea"),
    ("figures", "Figures"),
    ("reconstruction", "Reconstruction"),
    ("understanding", "Understanding"),
    ("generation", "Generation"),
    ("ceilings", "What bounds it"),
    ("training", "Training"),
    ("manifest", "How it was made"),
)


def render_page(
    evidence: Evidence,
    values: dict[str, Any],
    rows: Sequence[Row],
    pairs: Reconstructions | None,
    asked: Sequence[AskedScene],
    prompts: dict[str, list[Prompt]],
) -> str:
    """The page.

    Args:
        values: content of `report.json`.
        rows: the table of figures.
        pairs, asked, prompts: the examples that are shown.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        (resources.files("vqrae.quickstart") / "report.html.jinja").read_text(encoding="utf-8")
    )
    minutes = evidence.plan.get("minutes")
    return template.render(
        sections=SECTIONS,
        budgets=BUDGETS,
        minutes=f"{minutes:g}" if minutes else None,
        unjudged=evidence.budget is None,
        rows=rows,
        tiles=_tiles(rows),
        flow=_flow(pairs),
        pairs=_pairs(evidence, pairs),
        usage=_usage(evidence),
        kinds=_kinds(values.get("understanding")),
        understanding=values.get("understanding"),
        asked=_asked(evidence, asked),
        families=_families(values.get("generation", {}), prompts),
        generation=values.get("generation"),
        bounds=_bounds(values.get("generation")),
        charts=_charts(evidence),
        **_times(evidence.seconds),
        **_origin(evidence),
    )


def _tiles(rows: Sequence[Row]) -> list[dict[str, str]]:
    shown = {
        "Reconstruction, PSNR": "PSNR of reconstructions",
        "Codebook usage": "of the codebook in use",
        "Questions answered": "of questions answered right",
        "Prompts followed": "of images show what was asked for",
    }
    return [{"value": row.value, "text": shown[row.label]} for row in rows if row.label in shown]


def _flow(pairs: Reconstructions | None) -> dict[str, Any] | None:
    """The first scene, its codes as coloured cells, and its reconstruction."""
    if pairs is None:
        return None
    codes = pairs.codes[0].flatten().tolist()
    cells = [
        {"number": c, "hue": c * 137 % 360, "lightness": 30 + c * 7 % 16} for c in codes
    ]  # neighbours differ in hue
    return {
        "original": data_uri(pairs.originals[0]),
        "reconstruction": data_uri(pairs.copies[0]),
        "codes": cells,
        "grid_size": round(len(codes) ** 0.5),
        "image_size": pairs.originals.shape[-1],
        "codebook_size": pairs.codebook_size,
    }


def _pairs(evidence: Evidence, pairs: Reconstructions | None) -> list[dict[str, Any]]:
    if pairs is None:
        return []
    shown = zip(pairs.originals, pairs.copies, pairs.psnr, strict=True)
    return [
        {
            "original": data_uri(a),
            "reconstruction": data_uri(b),
            "psnr": psnr,
            "held_out": is_held_out(evidence.scenes.scene(i)),
        }
        for i, (a, b, psnr) in enumerate(shown)
    ]


def _usage(evidence: Evidence) -> dict[str, str] | None:
    counts = evidence.code_counts
    if counts is None:
        return None
    used, busiest = (
        int((counts > 0).sum()),
        sorted(counts.tolist(), reverse=True)[: max(1, len(counts) // 10)],
    )
    text = f"{used} of {len(counts)} codes occur; the busiest tenth makes up {sum(busiest) / counts.sum():.0%} of all."
    return {
        "svg": usage_svg(counts),
        "source": f"the {counts.sum():,} codes that the generator learns from",
        "text": text,
    }


def _kinds(values: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Lines of the table of questions: what, share answered right with the image, and by guessing without it."""
    if values is None:
        return []
    percent = "{:.1%}".format
    lines = [("All questions", percent(values["accuracy"]), percent(values["blind_accuracy"]))]
    for kind, accuracy in values["kinds"].items():
        lines.append(
            (KIND_LABELS.get(kind, kind), percent(accuracy), percent(values["blind_kinds"][kind]))
        )
    for key, label in (
        ("seen", "Scenes of known combinations"),
        ("held_out", "Scenes of new combinations ◆"),
    ):
        if key in values:
            lines.append((label, percent(values[key]), ""))
    return lines


def _asked(evidence: Evidence, asked: Sequence[AskedScene]) -> list[dict[str, Any]]:
    shown = []
    for scene in asked:
        held_out = is_held_out(evidence.scenes.scene(scene.index))
        shown.append(
            {
                "index": scene.index,
                "image": data_uri(scene.image),
                "held_out": held_out,
                "answers": scene.answers,
            }
        )
    return shown


def _families(values: dict[str, Any], prompts: dict[str, list[Prompt]]) -> list[dict[str, Any]]:
    """Every family with its score and its first prompts."""
    marks = {True: "yes", False: "no", None: ""}
    shown = []
    for family, chosen in prompts.items():
        cards = []
        for prompt in chosen:
            samples = [
                {"uri": data_uri(s.image), "mark": marks[s.correct], "reason": s.reason}
                for s in prompt.samples
            ]
            cards.append({"text": prompt.text, "held_out": prompt.held_out, "samples": samples})
        score = ""
        if family in values:
            low, high = values["intervals"][family]
            score = f"{values[family]:.0%} right, 95% interval {low:.0%} to {high:.0%}"
        shown.append({"label": FAMILY_LABELS.get(family, family), "score": score, "prompts": cards})
    return shown


def _bounds(values: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Score and ceilings of every family, then of all."""
    if values is None:
        return []
    ceiling = values.get("ceiling", {})
    bounds = []
    for key, label in {**FAMILY_LABELS, "overall": "Overall"}.items():
        scores = [
            source.get(key)
            for source in (values, ceiling.get("reconstruction", {}), ceiling.get("truth", {}))
        ]
        text = " / ".join("—" if score is None else f"{score:.0%}" for score in scores)
        bounds.append(
            {
                "label": label,
                "score": scores[0],
                "reconstruction": scores[1],
                "truth": scores[2],
                "text": text,
            }
        )
    return bounds


def _charts(evidence: Evidence) -> list[dict[str, str]]:
    charts = []
    for i, curve in enumerate(CURVES):
        steps, values = evidence.curve(curve)
        if steps:
            caption = f"{curve.caption}; ends at {values[-1]:.3g}"
            charts.append(
                {
                    "svg": curve_svg(f"curve{i}", steps, values),
                    "title": curve.title,
                    "caption": caption,
                }
            )
    return charts


def _times(seconds: dict[str, float]) -> dict[str, Any]:
    total, longest = sum(seconds.values()), max(seconds.values(), default=0) or 1
    times = [
        {"name": name, "share": s / longest, "text": format_duration(s)}
        for name, s in seconds.items()
    ]
    return {"times": times, "total_time": format_duration(total)}


def _origin(evidence: Evidence) -> dict[str, Any]:
    """Date, command and what it ran with."""
    plan, manifests = evidence.plan, evidence.manifests
    command = ["bash scripts/quickstart.sh"]
    if plan.get("minutes", BUDGETS[0]) != BUDGETS[0]:
        command.append(f"--minutes {plan['minutes']:g}")
    if plan.get("sprites", "shapes") != "shapes":
        command.append(f"--sprites {plan['sprites']}")
    lines = []
    if manifests:
        for label, key in (("Commit", "git_commit"), ("Seed", "seed")):
            found = {folder: manifest[key] for folder, manifest in manifests.items()}
            same = len(set(found.values())) == 1
            lines.append(
                (
                    label,
                    next(iter(found.values()))
                    if same
                    else ", ".join(f"{f}: {v}" for f, v in found.items()),
                )
            )
        versions = next(iter(manifests.values()))["packages"]
        lines.append(
            ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
        )
    if plan.get("steps"):
        lines.append(
            (
                "Optimizer steps",
                ", ".join(f"{name} {count}" for name, count in plan["steps"].items()),
            )
        )
    started = sorted(manifest["started"] for manifest in manifests.values())
    return {
        "date": started[0][:10] if started else None,
        "command": " ".join(command),
        "manifest": lines,
    }
