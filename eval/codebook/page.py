"""The report of a codebook as one sheet (PNG) and as one self-contained page (HTML, `codebook.html.jinja`)."""

import io
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vqrae.eval.codebook.evaluate import BINS, EXAMPLES, Code, CodebookStatistics
from vqrae.eval.figures import (
    ACCENT,
    INK,
    PAPER,
    SECOND,
    SOFT,
    STYLE,
    data_uri,
    draw_usage,
    inline_svg,
)

SHOWN = (
    48,
    24,
    24,
)  # codes on the page: the most frequent ones, from a third of the ranking on, and from two thirds on
SHEET_ROWS = 12  # codes of each group on the sheet
ZOOM = 4  # pixels of the sheet and the page for one of a patch


class CodebookPage:
    """Both forms of the report.

    Args:
        summary: `CodebookStatistics.summary`, with source and tokenizer.
        describe: codes (R,) -> their descriptions.
    """

    def __init__(
        self,
        summary: dict[str, Any],
        statistics: CodebookStatistics,
        describe: Callable[[Tensor], Sequence[Code]],
    ) -> None:
        self.summary = summary
        self.counts = statistics.counts.cpu()
        self.margins = statistics.margins.cpu().numpy()
        self.spacing = statistics.neighbors[1].cpu().numpy()
        order = self.counts.argsort(descending=True, stable=True)[: summary["used_codes"]]
        self.groups: dict[str, Sequence[Code]] = {}
        rank = 1
        for part, shown in zip(order.tensor_split(3), SHOWN, strict=True):
            if len(part) > 0:
                title = "Most frequent codes" if rank == 1 else f"Codes from rank {rank:,} on"
                self.groups[title] = describe(part[:shown])
                rank += len(part)

    # ---- the sheet

    def image(self) -> Image.Image:
        """Figures, charts and some codes on one sheet."""
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(13, 12), dpi=110, facecolor=PAPER)
            figure.text(
                0.03, 0.966, "What the codes stand for", fontsize=21, weight="bold", va="center"
            )
            figure.text(0.03, 0.938, self.subtitle(), fontsize=11, color=SOFT, va="center")
            for i, (value, label) in enumerate(self.tiles()):
                x = 0.03 + i * 0.96 / len(self.tiles())
                figure.text(x, 0.893, value, fontsize=20, weight="bold", va="center")
                figure.text(x, 0.866, label, fontsize=9, color=SOFT, va="center")
            charts = figure.add_gridspec(
                1, 3, left=0.05, right=0.97, top=0.815, bottom=0.655, wspace=0.22
            )
            for i, (title, draw) in enumerate(self.charts().items()):
                axes = figure.add_subplot(charts[i])
                axes.set_title(title, loc="left", fontsize=10, weight="bold", pad=8)
                draw(axes)
            self._draw_codes(figure)
            stream = io.BytesIO()
            figure.savefig(stream, format="png")
            return Image.open(stream).convert("RGB")

    def _draw_codes(self, figure: Figure) -> None:
        legend = "framed: what the decoder paints from the code alone; then patches of different images that became it"
        figure.text(0.03, 0.585, legend, fontsize=9, color=SOFT, va="center")
        shape = {
            "left": 0.03,
            "right": 0.985,
            "top": 0.54,
            "bottom": 0.015,
            "wspace": 0.04,
            "hspace": 0.22,
        }
        grid = figure.add_gridspec(SHEET_ROWS, 3, **shape)
        for column, (title, codes) in enumerate(self.groups.items()):
            x = grid[0, column].get_position(figure).x0
            figure.text(x, 0.558, title, fontsize=11, weight="bold", va="center")
            for row, code in enumerate(codes[:SHEET_ROWS]):
                cell = grid[row, column].subgridspec(
                    1, 3, width_ratios=(1.3, 0.85, EXAMPLES), wspace=0.03
                )
                label, alone, patches = (figure.add_subplot(cell[j]) for j in range(3))
                label.text(0, 0.65, f"{code.index}", fontsize=10, weight="bold", va="center")
                times = (
                    f"{code.count:,} x"
                    if code.count < 1000
                    else f"{code.count / self.summary['tokens']:.1%}"
                )
                label.text(0, 0.2, times, fontsize=8, color=SOFT, va="center")
                label.set_axis_off()
                alone.imshow(code.alone, interpolation="nearest")
                alone.set(xticks=[], yticks=[])
                alone.spines[:].set(visible=True, color=ACCENT, linewidth=1.6)
                patches.imshow(strip(code.patches), interpolation="nearest")
                patches.set_anchor("W")
                patches.set_axis_off()

    # ---- the page

    def html(self) -> str:
        """The page; its text and looks are in `codebook.html.jinja`."""
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        template = resources.files("vqrae.eval.codebook") / "codebook.html.jinja"
        dead = (self.counts == 0).nonzero().flatten()
        charts = []
        with matplotlib.rc_context(STYLE):
            for name, (title, draw) in zip(
                ("usage", "margin", "spacing"), self.charts().items(), strict=True
            ):
                figure = Figure(figsize=(4.2, 2.3), layout="constrained")
                draw(figure.subplots())
                charts.append({"title": title, "svg": inline_svg(figure, name)})
        return environment.from_string(template.read_text(encoding="utf-8")).render(
            subtitle=self.subtitle(),
            tiles=self.tiles(),
            charts=charts,
            groups={title: self.cards(codes) for title, codes in self.groups.items()},
            dead=ranges(dead.tolist()),
            summary=self.summary,
        )

    def cards(self, codes: Sequence[Code]) -> list[dict[str, Any]]:
        """Codes for the template, images as data URIs."""
        images = ((code, enlarged(code.alone), enlarged(strip(code.patches))) for code in codes)
        return [
            {"code": code, "alone": data_uri(alone), "strip": data_uri(patches)}
            for code, alone, patches in images
        ]

    # ---- what both show

    def subtitle(self) -> str:
        """What was measured on what."""
        summary = self.summary
        return f"tokenizer {summary['tokenizer'][:12]}, {summary['num_images']:,} images, {summary['tokens']:,} tokens"

    def tiles(self) -> list[tuple[str, str]]:
        """The main figures with their labels."""
        summary = self.summary
        return [
            (
                f"{summary['usage']:.1%}",
                f"{summary['used_codes']:,} of {summary['codebook_size']:,} codes in use",
            ),
            (f"{summary['perplexity']:,.0f}", "perplexity: codes in equal use"),
            (f"{summary['top_share']:.1%}", "of the tokens in 1 % of the codes"),
            (f"{summary['error_share']:.1%}", "of the variance is lost in the codes"),
            (f"{summary['median_margin']:.2f}", "median margin to the next code"),
        ]

    def charts(self) -> dict[str, Callable[[Axes], None]]:
        """Titles and drawings."""
        return {
            "How often each code is chosen": lambda axes: draw_usage(axes, self.counts.numpy()),
            "How clear the choice is": self._draw_margins,
            "How far codes lie apart": self._draw_spacing,
        }

    def _draw_margins(self, axes: Axes) -> None:
        shares = self.margins / self.margins.sum()
        axes.bar((np.arange(BINS) + 0.5) / BINS, shares, width=1 / BINS, color=ACCENT, linewidth=0)
        median = self.summary["median_margin"]
        _mark(axes, median, f"median {median:.2f}")
        right = min(1.0, (np.flatnonzero(shares > 1e-4)[-1] + 2) / BINS)
        axes.set(
            xlim=(0, right),
            xlabel="1 - distance to the code / to the nearest other",
            ylabel="share of the tokens",
        )
        axes.locator_params(nbins=5)

    def _draw_spacing(self, axes: Axes) -> None:
        used, error = (self.counts > 0).numpy(), self.summary["rms_error"]
        edges = np.linspace(0, max(self.spacing.max(), error) * 1.02, 41)
        groups = {"in use": (self.spacing[used], ACCENT), "dead": (self.spacing[~used], SOFT)}
        bottom = np.zeros(len(edges) - 1)
        for name, (values, color) in groups.items():
            heights = np.histogram(values, edges)[0]
            if len(values):
                axes.bar(
                    edges[:-1],
                    heights,
                    np.diff(edges),
                    bottom,
                    align="edge",
                    color=color,
                    linewidth=0,
                    label=name,
                )
            bottom += heights
        _mark(axes, error, "rms error")
        axes.set(
            xlim=(0, edges[-1]), xlabel="distance of a code to its nearest other", ylabel="codes"
        )
        axes.legend(frameon=False, fontsize=8, loc="upper left", labelcolor=INK, handlelength=1)
        axes.locator_params(nbins=5)


def _mark(axes: Axes, value: float, text: str) -> None:
    """A labelled line at `value`, the label on the side with more room."""
    axes.axvline(value, color=SECOND, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        text, (value, 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
        color=SECOND, fontsize=8,
    )  # fmt: skip


def strip(patches: Sequence[np.ndarray]) -> np.ndarray:
    """Patches (P, P, 3) side by side on a transparent strip with room for `EXAMPLES`, uint8 RGBA."""
    side, gap = patches[0].shape[0], 1
    canvas = np.zeros((side, EXAMPLES * (side + gap) - gap, 4), dtype=np.uint8)
    for i, patch in enumerate(patches):
        canvas[:, i * (side + gap) : i * (side + gap) + side] = np.dstack(
            [patch, np.full((side, side), 255, np.uint8)]
        )
    return canvas


def enlarged(pixels: np.ndarray) -> Image.Image:
    """An image whose pixels stay squares."""
    image = Image.fromarray(pixels)
    return image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)


def ranges(numbers: Sequence[int]) -> str:
    """`[1, 2, 3, 7]` -> `1-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
