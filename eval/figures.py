"""Figures of pages: SVG charts in the page's colours."""

import io
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#22262b"
SOFT = "#646b73"
ACCENT = "#1f6f8b"
SECOND = "#c2762b"
RIGHT = "#2d7d4a"
WRONG = "#b8452f"
PAPER = "#fcfbf8"
_PAGE_COLORS = {
    INK: "currentColor",
    SOFT: "var(--soft)",
    ACCENT: "var(--accent)",
    SECOND: "var(--accent-2)",
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "vqrae",  # the same figure gives the same file
}


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as SVG in the page's colours; ids start with `name`, so that figures never mix."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for color, variable in _PAGE_COLORS.items():
        text = text.replace(color, variable)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # the page's font
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)


def draw_usage(axes: Axes, counts: np.ndarray) -> None:
    """Sorted counts of the codes, and the count that all would have in equal use."""
    ranked = np.sort(counts)[::-1]
    used = int((counts > 0).sum())
    heights = np.maximum(ranked[:used], 0.5)
    axes.fill_between(np.arange(used), heights, 0.5, color=ACCENT, step="post", linewidth=0)
    axes.axhline(counts.mean(), color=SECOND, linewidth=1, linestyle=(0, (4, 3)))
    text = axes.text(len(counts), counts.mean(), "equal use ", ha="right", va="bottom")
    text.set(color=SECOND, fontsize=8)
    axes.set(yscale="log", xlim=(0, len(counts)), ylim=(0.5, None))
    axes.set(xlabel="codes, most frequent first", ylabel="times chosen")
