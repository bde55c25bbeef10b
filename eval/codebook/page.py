"""The report of codebooks as one self-contained page; its text and looks are in the template.

Shapes: R codes that are shown, n codebooks, P side of a patch.
"""

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vqrae.common.images import data_uri, tensor_to_uint8
from vqrae.eval.codebook.evaluate import BINS, EXAMPLES, CodebookStatistics
from vqrae.eval.figures import ACCENT, INK, SECOND, SOFT, STYLE, draw_usage, inline_svg
from vqrae.tokenizer.modeling import VQRAEModel

# Codes that are shown: the most frequent ones, from a third of the ranking on, from two thirds on.
# Several codebooks share these numbers.
SHOWN = (48, 24, 24)
ZOOM = 4  # pixels of the page for one of a patch


def codebook_page(
    model: VQRAEModel, statistics: Sequence[CodebookStatistics], summary: dict[str, Any]
) -> str:
    """The page as HTML.

    Args:
        statistics: of each codebook.
        summary: `summarize` of them, with source and tokenizer.
    """
    of_each = summary.get("codebooks", [summary])
    sections = []
    for number, values in enumerate(of_each):
        section = {
            "title": f"Codebook {number + 1} of {len(of_each)}" if len(of_each) > 1 else "",
            "tiles": tiles(values),
            "charts": charts(statistics[number], values, f"chart{number}"),
            "groups": groups(model, statistics, number),
            "summary": values,
        }
        sections.append(section)
    template = resources.files("vqrae.eval.codebook") / "codebook.html.jinja"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    look = resources.files("vqrae.eval") / "look.css"
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        look=look.read_text(encoding="utf-8"),
        subtitle=f"tokenizer {summary['tokenizer'][:12]}, {summary['num_images']:,} images, "
        f"{summary['tokens']:,} tokens",
        source=summary["source"],
        tiles=tiles(summary) if len(of_each) > 1 else {},
        sections=sections,
    )


def tiles(summary: dict[str, Any]) -> dict[str, str]:
    """The main figures of a codebook, or of all."""
    codes = summary["used_codes"] + summary["dead_codes"]
    each = " of a codebook" if "codebooks" in summary else ""
    return {
        f"{summary['used_codes']:,} of {codes:,} codes in use": f"{summary['usage']:.1%}",
        f"perplexity{each}: codes in equal use": f"{summary['perplexity']:,.0f}",
        "of the tokens in 1 % of the codes": f"{summary['top_share']:.1%}",
        "of the variance is lost in the codes": f"{summary['error_share']:.1%}",
        "median margin to the next code": f"{summary['median_margin']:.2f}",
    }


def groups(
    model: VQRAEModel, statistics: Sequence[CodebookStatistics], number: int
) -> dict[str, list[dict[str, Any]]]:
    """The cards of the codes that are shown of codebook `number`, by title."""
    counts = statistics[number].counts.cpu()
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    found = {}
    rank = 1
    for part, shown in zip(order.tensor_split(3), SHOWN, strict=True):
        if len(part) > 0:
            title = "Most frequent codes" if rank == 1 else f"Codes from rank {rank:,} on"
            shown = -(-shown // len(statistics))
            found[title] = code_cards(model, statistics, number, part[:shown])
            rank += len(part)
    return found


@torch.inference_mode()
def code_cards(
    model: VQRAEModel, statistics: Sequence[CodebookStatistics], number: int, codes: Tensor
) -> list[dict[str, Any]]:
    """What the page shows of each code (R,) of codebook `number`: figures, patches, and what it
    decodes to next to the most frequent code of every other codebook.
    """
    grid = model.config.grid_size
    own = statistics[number]
    neighbors, spacing = own.neighbors
    frequent = torch.stack([each.counts.argmax() for each in statistics])
    cards = []
    for block in codes.split(32):
        repeated = frequent.repeat(len(block), grid**2, 1)
        repeated[..., number] = block[:, None].to(repeated.device)
        decoded = model.decode(repeated.view(-1, *model.config.code_shape))
        images = tensor_to_uint8(decoded).permute(0, 2, 3, 1).cpu().numpy()
        size = images.shape[1] // grid
        start = grid // 2 * size  # the middle, where every neighbour is the same code
        alone = images[:, start : start + size, start : start + size]
        for code, patch in zip(block.tolist(), alone, strict=True):
            card = {
                "code": code,
                "count": int(own.counts[code]),
                "neighbor": int(neighbors[code]),
                "spacing": spacing[code].item(),
                "alone": data_uri(enlarged(patch)),
                "strip": data_uri(enlarged(strip(own.patches[code]))),
            }
            cards.append(card)
    return cards


def strip(patches: Sequence[np.ndarray]) -> np.ndarray:
    """Patches (P, P, 3) in a row on a transparent strip with room for `EXAMPLES`, uint8 RGBA."""
    side, gap = patches[0].shape[0], 1
    canvas = np.zeros((side, EXAMPLES * (side + gap) - gap, 4), dtype=np.uint8)
    for i, patch in enumerate(patches):
        left = i * (side + gap)
        canvas[:, left : left + side, :3] = patch
        canvas[:, left : left + side, 3] = 255
    return canvas


def enlarged(pixels: np.ndarray) -> Image.Image:
    """An image whose pixels stay squares."""
    image = Image.fromarray(pixels)
    return image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)


# ---- charts


def charts(
    statistics: CodebookStatistics, summary: dict[str, Any], name: str
) -> list[dict[str, str]]:
    """Titles and SVG of a codebook's three charts, whose ids start with `name`."""
    counts = statistics.counts.cpu().numpy()
    margins = statistics.margins.cpu().numpy()
    spacing = statistics.neighbors[1].cpu().numpy()
    drawn: dict[str, Callable[[Axes], None]] = {
        "How often each code is chosen": lambda axes: draw_usage(axes, counts),
        "How clear the choice is": lambda axes: draw_margins(
            axes, margins, summary["median_margin"]
        ),
        "How far apart codes are": lambda axes: draw_spacing(
            axes, spacing, counts > 0, summary["rms_error"]
        ),
    }
    found = []
    with matplotlib.rc_context(STYLE):
        for i, (title, draw) in enumerate(drawn.items()):
            figure = Figure(figsize=(4.2, 2.3), layout="constrained")
            draw(figure.subplots())
            found.append({"title": title, "svg": inline_svg(figure, f"{name}{i}")})
    return found


def draw_margins(axes: Axes, margins: np.ndarray, median: float) -> None:
    """Histogram of the margins between the chosen code and the next."""
    shares = margins / margins.sum()
    axes.bar((np.arange(BINS) + 0.5) / BINS, shares, width=1 / BINS, color=ACCENT, linewidth=0)
    mark(axes, median, f"median {median:.2f}")
    right = min(1.0, (np.flatnonzero(shares > 1e-4)[-1] + 2) / BINS)
    label = "1 - distance to the code / to the nearest other"
    axes.set(xlim=(0, right), xlabel=label, ylabel="share of the tokens")
    axes.locator_params(nbins=5)


def draw_spacing(axes: Axes, spacing: np.ndarray, used: np.ndarray, error: float) -> None:
    """Histogram of the distances between codes, dead ones on top, with the quantization error."""
    edges = np.linspace(0, max(spacing.max(), error) * 1.02, 41)
    groups = {"in use": (spacing[used], ACCENT), "dead": (spacing[~used], SOFT)}
    values = [group for group, _ in groups.values() if len(group)]
    colors = [color for group, color in groups.values() if len(group)]
    names = [name for name, (group, _) in groups.items() if len(group)]
    axes.hist(values, edges.tolist(), stacked=True, color=colors, label=names, linewidth=0)
    mark(axes, error, "rms error")
    label = "distance of a code to its nearest other"
    axes.set(xlim=(0, edges[-1]), xlabel=label, ylabel="codes")
    axes.legend(frameon=False, fontsize=8, loc="upper left", labelcolor=INK, handlelength=1)
    axes.locator_params(nbins=5)


def mark(axes: Axes, value: float, text: str) -> None:
    """A labelled line at `value`."""
    axes.axvline(value, color=SECOND, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        text,
        (value, 1),
        (4, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        color=SECOND,
        fontsize=8,
    )
