"""Images of the quickstart's report: its charts, and the sheet `report.png`."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from PIL import Image

from vqrae.common.images import tensor_to_image
from vqrae.eval.figures import ACCENT, INK, PAPER, RIGHT, SOFT, STYLE, WRONG, draw_usage, inline_svg
from vqrae.quickstart.evidence import BUDGETS, Evidence, FigureRow, Prompt, Reconstructions

LINE = "#e4e1da"


def curve_svg(name: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """A small chart of one metric for a page; `name` keeps its ids apart from other charts'."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.2, 2.0), layout="constrained")
        draw_curve(figure.subplots(), steps, values)
        return inline_svg(figure, name)


def usage_svg(counts: np.ndarray) -> str:
    """How often each code was chosen, most frequent first, on a logarithmic scale."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.4), layout="constrained")
        draw_usage(figure.subplots(), counts)
        return inline_svg(figure, "usage")


def summary_image(
    evidence: Evidence,
    rows: Sequence[FigureRow],
    pairs: Reconstructions | None,
    prompts: dict[str, list[Prompt]],
) -> Image.Image:
    """Everything on one sheet, fit for a README: figures, reconstructions, prompts, curves."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 10.8), dpi=110, facecolor=PAPER)
        minutes = evidence.plan.get("minutes")
        budget = f", in a budget of {minutes:g} minutes" if minutes else ""
        lines: dict[str, Any] = {"va": "center", "x": 0.03}
        figure.text(y=0.965, s="One tokenizer, three jobs", fontsize=21, weight="bold", **lines)
        subtitle = f"trained from random weights on rendered scenes{budget}"
        figure.text(y=0.932, s=subtitle, fontsize=11, color=SOFT, **lines)

        place = {"left": 0.03, "right": 0.975, "top": 0.885, "bottom": 0.64}
        top = figure.add_gridspec(1, 2, width_ratios=(1, 1.4), wspace=0.06, **place)
        draw_table(figure.add_subplot(top[0]), rows, evidence.budget or 0)
        draw_pairs(figure, top[1], pairs)
        draw_prompts(figure, prompts)

        place = {"left": 0.05, "right": 0.975, "top": 0.295, "bottom": 0.04}
        grid = figure.add_gridspec(2, 4, hspace=0.75, wspace=0.25, **place)
        for i, curve in enumerate(evidence.system.curves):
            axes = figure.add_subplot(grid[i])
            title = curve.title
            axes.set_title(title, fontsize=10, pad=14, loc="left", weight="bold", color=INK)
            caption: dict[str, Any] = {"fontsize": 7.5, "color": SOFT, "va": "bottom"}
            axes.text(0, 1.03, curve.caption, transform=axes.transAxes, **caption)
            steps, values = evidence.curve(curve)
            if steps:
                draw_curve(axes, steps, values)
            else:
                draw_nothing(axes)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        return Image.open(stream).convert("RGB")


def draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    """One line; few ticks."""
    axes.plot(steps, values, color=ACCENT, linewidth=1.4, solid_joinstyle="round")
    axes.locator_params(nbins=4)
    axes.margins(x=0.01)


def draw_nothing(axes: Axes) -> None:
    """In place of what a step that has not run would show."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.text(0, 0.5, "not run yet", transform=axes.transAxes, color=SOFT)


def draw_table(axes: Axes, rows: Sequence[FigureRow], column: int) -> None:
    """The figures, next to the expectations of one budget."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(rows) + 0.5, -0.6))
    right: dict[str, Any] = {"ha": "right", "va": "center"}
    for x, text in ((0.66, "this run"), (0.97, f"expected, {BUDGETS[column]} min")):
        axes.text(x, 0, text, fontsize=9, color=SOFT, **right)
    for y, row in enumerate(rows, start=1):
        axes.axhline(y - 0.5, color=LINE, linewidth=0.8)
        axes.text(0, y, row.label, va="center", fontsize=10.5)
        axes.text(0.66, y, row.value, fontsize=12, weight="bold", **right)
        axes.text(0.97, y, row.expected[column], fontsize=10, color=SOFT, **right)
        if row.met is not None:
            mark, color = ("✓", RIGHT) if row.met else ("✗", WRONG)
            axes.text(0.7, y, mark, va="center", fontsize=11, color=color)


def draw_pairs(
    figure: Figure, place: SubplotSpec, pairs: Reconstructions | None, columns: int = 4
) -> None:
    """Originals next to their reconstructions, three rows of pairs."""
    frame = figure.add_subplot(place)
    frame.set_axis_off()
    draw_title(frame, "Reconstruction: scenes, and what is decoded from their codes")
    if pairs is None:
        draw_nothing(frame)
        return
    grid = place.subgridspec(3, columns, wspace=0.05, hspace=0.08)
    for i in range(min(3 * columns, len(pairs.originals))):
        axes = figure.add_subplot(grid[i])
        both = [np.asarray(tensor_to_image(kind[i])) for kind in (pairs.originals, pairs.copies)]
        axes.imshow(np.concatenate(both, axis=1), interpolation="nearest")
        axes.set_axis_off()


def draw_prompts(figure: Figure, prompts: dict[str, list[Prompt]], columns: int = 3) -> None:
    """The first prompt of every family with its images, framed by the scorer's verdict."""
    frame = figure.add_axes((0.03, 0.37, 0.945, 0.226))
    frame.set_axis_off()
    draw_title(
        frame, "Generation: the first prompt of each family, its images framed by the verdict"
    )
    if not prompts:
        draw_nothing(frame)
        return
    place = {"left": 0.03, "right": 0.975, "top": 0.571, "bottom": 0.366}
    num_rows = math.ceil(len(prompts) / columns)
    grid = figure.add_gridspec(num_rows, columns, wspace=0.05, hspace=0.28, **place)
    for i, (prompt, *_) in enumerate(prompts.values()):
        row = grid[i].subgridspec(1, max(4, len(prompt.images)), wspace=0.08)
        for j, (image, verdict) in enumerate(zip(prompt.images, prompt.verdicts, strict=True)):
            axes = figure.add_subplot(row[j])
            axes.imshow(np.asarray(image), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            color = {True: RIGHT, False: WRONG, None: SOFT}[verdict.get("correct")]
            axes.spines[:].set(visible=True, color=color, linewidth=2.5)
            if j == 0:
                text = prompt.text.removeprefix("a photo of ")
                axes.set_title(text, loc="left", fontsize=9.5, color=INK, pad=4)


def draw_title(axes: Axes, text: str) -> None:
    """The title of a part of the sheet."""
    axes.set_title(text, loc="left", fontsize=11, weight="bold", color=INK, pad=6)
