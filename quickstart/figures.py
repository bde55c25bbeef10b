"""Images of the quickstart's report: its charts, and the summary `report.png`."""

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from PIL import Image

from vqrae.common.images import tensor_to_image
from vqrae.eval.figures import ACCENT, INK, PAPER, RIGHT, SOFT, STYLE, WRONG, draw_usage, inline_svg
from vqrae.quickstart.evidence import BUDGETS, CURVES, Curve, Evidence, Prompt, Reconstructions, Row

# ---- pieces of the page


def curve_svg(name: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """A small chart of one metric."""
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


# ---- charts


def draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    """One line; few ticks."""
    axes.plot(steps, values, color=ACCENT, linewidth=1.4, solid_joinstyle="round")
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.01)


# ---- report.png


def summary_image(
    evidence: Evidence,
    rows: Sequence[Row],
    pairs: Reconstructions | None,
    prompts: dict[str, list[Prompt]],
) -> Image.Image:
    """Everything on one sheet, fit for a README: figures, reconstructions, curves, prompts with their images.

    Args:
        rows: the table of figures.
        pairs, prompts: the examples that are shown.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 10.8), dpi=110, facecolor=PAPER)
        minutes = evidence.plan.get("minutes")
        budget = f", in a budget of {minutes:g} minutes" if minutes else ""
        figure.text(
            0.03, 0.965, "One tokenizer, three jobs", fontsize=21, weight="bold", va="center"
        )
        figure.text(
            0.03,
            0.932,
            f"trained from random weights on rendered scenes{budget}",
            fontsize=11,
            color=SOFT,
            va="center",
        )
        top = figure.add_gridspec(
            1, 2, left=0.03, right=0.975, top=0.885, bottom=0.64, width_ratios=(1, 1.4), wspace=0.06
        )
        _draw_table(figure.add_subplot(top[0]), rows, evidence.budget or 0)
        _draw_pairs(figure, top[1], pairs)
        _draw_prompts(figure, prompts)
        curves = figure.add_gridspec(
            2, 4, left=0.05, right=0.975, top=0.295, bottom=0.04, hspace=0.75, wspace=0.25
        )
        for i, curve in enumerate(CURVES):
            _draw_named_curve(figure.add_subplot(curves[i]), curve, *evidence.curve(curve))
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        return Image.open(stream).convert("RGB")


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, weight="bold", color=INK, pad=6)


def _draw_named_curve(axes: Axes, curve: Curve, steps: list[int], values: list[float]) -> None:
    axes.set_title(curve.title, loc="left", fontsize=10, weight="bold", color=INK, pad=14)
    axes.text(
        0, 1.03, curve.caption, transform=axes.transAxes, fontsize=7.5, color=SOFT, va="bottom"
    )
    if steps:
        draw_curve(axes, steps, values)
    else:
        _blank(axes, "not run yet")


def _blank(axes: Axes, text: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.text(0, 0.5, text, transform=axes.transAxes, color=SOFT)


def _draw_table(axes: Axes, rows: Sequence[Row], column: int) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(rows) + 0.5, -0.6))
    for x, text in ((0.66, "this run"), (0.97, f"expected, {BUDGETS[column]} min")):
        axes.text(x, 0, text, ha="right", va="center", fontsize=9, color=SOFT)
    for y, row in enumerate(rows, start=1):
        axes.axhline(y - 0.5, color="#e4e1da", linewidth=0.8)
        axes.text(0, y, row.label, va="center", fontsize=10.5)
        axes.text(0.66, y, row.value, ha="right", va="center", fontsize=12, weight="bold")
        axes.text(0.97, y, row.expected[column], ha="right", va="center", fontsize=10, color=SOFT)
        if row.met is not None:
            mark, color = ("✓", RIGHT) if row.met else ("✗", WRONG)
            axes.text(0.7, y, mark, va="center", fontsize=11, color=color)


def _draw_pairs(
    figure: Figure, place: SubplotSpec, pairs: Reconstructions | None, columns: int = 4
) -> None:
    """Originals beside reconstructions, three bands of pairs."""
    frame = figure.add_subplot(place)
    frame.set_axis_off()
    _title(frame, "Reconstruction: scenes, and what is painted from their codes")
    if pairs is None:
        _blank(frame, "not run yet")
        return
    grid = place.subgridspec(3, columns, wspace=0.05, hspace=0.08)
    for i in range(min(3 * columns, len(pairs.originals))):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        both = [
            np.asarray(tensor_to_image(images[i])) for images in (pairs.originals, pairs.copies)
        ]
        axes.imshow(np.concatenate(both, axis=1), interpolation="nearest")
        axes.set_axis_off()


def _draw_prompts(
    figure: Figure, prompts: dict[str, list[Prompt]], per_family: int = 1, columns: int = 3
) -> None:
    """The first prompt of every family with its images, framed by the scorer's verdict."""
    shown = [prompt for family in prompts.values() for prompt in family[:per_family]]
    frame = figure.add_axes((0.03, 0.37, 0.945, 0.226))
    frame.set_axis_off()
    _title(
        frame,
        "Generation: the first prompt of each family, its images framed by what the scorer says",
    )
    if not shown:
        _blank(frame, "not run yet")
        return
    grid = figure.add_gridspec(
        math.ceil(len(shown) / columns),
        columns,
        left=0.03,
        right=0.975,
        top=0.571,
        bottom=0.366,
        wspace=0.05,
        hspace=0.28,
    )
    for i, prompt in enumerate(shown):
        row = grid[i // columns, i % columns].subgridspec(
            1, max(4, len(prompt.samples)), wspace=0.08
        )
        for j, sample in enumerate(prompt.samples):
            axes = figure.add_subplot(row[j])
            axes.imshow(np.asarray(sample.image), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            color = SOFT if sample.correct is None else RIGHT if sample.correct else WRONG
            axes.spines[:].set(visible=True, color=color, linewidth=2.5)
            if j == 0:
                axes.set_title(
                    prompt.text.removeprefix("a photo of "),
                    loc="left",
                    fontsize=9.5,
                    color=INK,
                    pad=4,
                )
