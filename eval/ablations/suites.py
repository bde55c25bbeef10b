"""Ablations as data: the rows of a table, each a few overrides on one configuration of the tokenizer.

A suite is a YAML file in `configs/`, or one of the user's own. Every row is trained in every recipe that it names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqrae.common.config import did_you_mean, load_config, shipped_config

SUITES = ("table5", "table6", "quantizers", "locality")


@dataclass(frozen=True)
class Metric:
    """How a number is shown. `of_features` ones need labelled images, `of_codes` ones need scenes."""

    heading: str
    format: str
    of_features: bool = False
    of_codes: bool = False


METRICS = {
    "psnr": Metric("PSNR, dB", ".2f"),
    "ssim": Metric("SSIM", ".3f"),
    "frechet": Metric(
        "Fréchet", ".1f"
    ),  # the heading is the distance's own key, which names its network
    "codebook_usage": Metric("usage", ".1%"),
    "perplexity": Metric("perplexity", ".0f"),
    "teacher_cosine": Metric("cosine to the original features", ".3f", of_features=True),
    "linear_continuous": Metric("linear probe, continuous", ".1%", of_features=True),
    "linear_quantized": Metric("linear probe, code vectors", ".1%", of_features=True),
    "known_share": Metric("what codes know of the thing", ".1%", of_codes=True),
    "seen": Metric("GenEval's rules, seen combinations", ".1%", of_codes=True),
    "held_out": Metric("GenEval's rules, unseen combinations", ".1%", of_codes=True),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to train that all rows are compared in."""

    name: str
    note: str
    """What the name stands for, said below the table."""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    labels: dict[str, Any]
    """What tells it from the others, by the heading of its column."""
    overrides: tuple[str, ...] = ()
    paper: str = ""
    """What the paper reports for it."""
    recipes: tuple[str, ...] | None = None
    """None: all of the suite's."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that the paper found, as an order of two rows."""

    text: str
    metric: str
    higher: str
    """Name of the row whose metric is the larger number."""
    lower: str


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
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    codes_evaluator: str = ""
    """Module whose `main` scores what codes know of scenes, for the columns that ask it."""

    def __post_init__(self) -> None:
        rows, recipes = [row.name for row in self.rows], [recipe.name for recipe in self.recipes]
        for kind, names in {"row": rows, "recipe": recipes}.items():
            if len(set(names)) < len(names) or not names:
                raise ValueError(f"{kind} names: got {names}, expected one or more, all different")
        metrics = [*self.columns, *(claim.metric for claim in self.claims)]
        named = [name for row in self.rows for name in row.recipes or ()]
        compared = [name for claim in self.claims for name in (claim.higher, claim.lower)]
        for kind, names, known in (
            ("metric", metrics, METRICS),
            ("recipe", named, recipes),
            ("row", compared, rows),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"unknown {kind} {name!r}. {did_you_mean(name, known)}")

    @property
    def of_features(self) -> bool:
        """Whether labelled images are needed."""
        return any(METRICS[name].of_features for name in self.columns)

    @property
    def of_codes(self) -> bool:
        """Whether scenes are needed."""
        return any(METRICS[name].of_codes for name in self.columns)

    def trials(self) -> list[tuple[Recipe, Row]]:
        """Every row in each of its recipes."""
        return [
            (recipe, row)
            for recipe in self.recipes
            for row in self.rows
            if row.recipes is None or recipe.name in row.recipes
        ]


def load_suite(name: str) -> Suite:
    """The suite of a shipped name or of a YAML file."""
    return load_config(Suite, shipped_config("vqrae.eval.ablations", name))


def suite_names(choice: str) -> dict[str, str]:
    """The suites of the argument `suite=` by the name of their results: `all`, a shipped name or a YAML file."""
    return {Path(name).stem: name for name in (SUITES if choice == "all" else (choice,))}
