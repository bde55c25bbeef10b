"""Ablations as data: the rows of a table, each a few overrides of one tokenizer configuration.

A suite is a YAML file in `configs/`, or one of the user's own. Every row is trained in every recipe
that it names.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vqrae.common.config import did_you_mean, load_config, shipped_config
from vqrae.eval.verdicts import Claim

VQRAE_SUITES = ("width", "collapse", "size", "table6", "quantizers", "locality", "layers")
UNITOK_SUITES = ("codebooks", "residual", "objectives", "systems")
SUITES = VQRAE_SUITES + UNITOK_SUITES


Evaluator = Literal["reconstruction", "features", "zeroshot", "codes"]


class Metric(NamedTuple):
    """How a number is shown, and who measures it."""

    heading: str
    format: str
    evaluator: Evaluator = "reconstruction"


METRICS = {
    "psnr": Metric("PSNR, dB", ".2f"),
    "ssim": Metric("SSIM", ".3f"),
    "frechet": Metric("Fréchet", ".1f"),  # the table has the distance's own name, with its network
    "codebook_usage": Metric("usage", ".1%"),
    "codebook_usage_min": Metric("usage of the least used codebook", ".1%"),
    "perplexity": Metric("perplexity", ".0f"),
    "teacher_cosine": Metric("cosine to the original features", ".3f", "features"),
    "linear_continuous": Metric("linear probe, continuous", ".1%", "features"),
    "linear_quantized": Metric("linear probe, code vectors", ".1%", "features"),
    "object_quantized": Metric("zero-shot objects, quantized", ".1%", "zeroshot"),
    "caption_quantized": Metric("captions found, quantized", ".1%", "zeroshot"),
    "known_share": Metric("what codes know of the thing", ".1%", "codes"),
    "code_given_patch": Metric("nats of a code, given its patch", ".2f", "codes"),
    "seen": Metric("GenEval's rules, seen combinations", ".1%", "codes"),
    "held_out": Metric("GenEval's rules, unseen combinations", ".1%", "codes"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to train that all rows are compared in."""

    name: str
    note: str
    """What the name means, said below the table."""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of the table."""

    name: str
    labels: dict[str, Any]
    """What tells it from the others, by the heading of its column."""
    config: str = ""
    """Name or YAML file of its tokenizer's configuration, where it is not the suite's."""
    overrides: tuple[str, ...] = ()
    paper: str = ""
    """What the paper reports for it."""
    recipes: tuple[str, ...] | None = None
    """None: all of the suite's."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A table."""

    title: str
    config: str = "tiny"
    """Name or YAML file of the tokenizer's configuration that everything is an override of."""
    overrides: tuple[str, ...] = ()
    """Of every row. A recipe's come after these, a row's after a recipe's."""
    columns: tuple[str, ...]
    """Names of `METRICS`."""
    recipes: tuple[Recipe, ...]
    rows: tuple[TableRow, ...]
    claims: tuple[Claim, ...] = ()
    codes_evaluator: str = ""
    """Module whose `main` scores what codes know of scenes, for the columns that ask it."""

    def __post_init__(self) -> None:
        rows = [row.name for row in self.rows]
        recipes = [recipe.name for recipe in self.recipes]
        for kind, names in {"row": rows, "recipe": recipes}.items():
            if len(set(names)) < len(names) or not names:
                raise ValueError(f"{kind} names: got {names}, expected one or more, all different")
        for name in self.columns:
            _require_known("metric", name, METRICS)
        for row in self.rows:
            for name in row.recipes or ():
                _require_known("recipe", name, recipes)
        for claim in self.claims:
            _require_known("metric", claim.metric, METRICS)
            _require_known("row", claim.higher, rows)
            _require_known("row", claim.lower, rows)

    def needs(self, evaluator: Evaluator) -> bool:
        """Whether any column is measured by this evaluator."""
        return any(METRICS[name].evaluator == evaluator for name in self.columns)

    def trials(self) -> list[tuple[Recipe, TableRow]]:
        """Every row in each of its recipes."""
        pairs = itertools.product(self.recipes, self.rows)
        return [
            (recipe, row) for recipe, row in pairs if recipe.name in (row.recipes or [recipe.name])
        ]


def load_suite(name: str) -> Suite:
    """The suite of a shipped name or of a YAML file."""
    return load_config(Suite, shipped_config("vqrae.eval.ablations", name))


def _require_known(kind: str, name: str, known: Any) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}. {did_you_mean(name, known)}")
