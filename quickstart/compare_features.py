"""The paper's central claim on scenes: which features should the language model read?

    python -m vqrae.quickstart.compare_features tokenizer=RUN llm=RUN output=runs/feature_quality
    … kinds=[distilled,quantized] seeds=[0,1,2]     claim C5 alone

One LLaVA on each of four kinds of features, all else equal (arXiv 2511.23386, Table 6, section
3.4):

    original     continuous, of the encoder before the tokenizer's training (stage 1 freezes it)
    distilled    continuous, of stage 2, which reconstructs and is distilled from the original
    undistilled  continuous, of a stage 2 from the same start without distillation, trained here
    quantized    the distilled tokenizer's quantized features, those that its decoder reads

Each training and each score is an ordinary command; the same command resumes where it stopped.
"""

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.errors import run_main
from vqrae.common.files import (
    atomic_path,
    markdown_table,
    read_json,
    weights_fingerprint,
    write_json,
    write_text,
)
from vqrae.common.run import run_manifest
from vqrae.eval.reconstruction import evaluate as reconstruction
from vqrae.eval.sharding import run_module
from vqrae.quickstart import scene_questions
from vqrae.tokenizer import train as tokenizer_training
from vqrae.understanding import train as llava_training

Kind = Literal["original", "distilled", "undistilled", "quantized"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class FeatureQualityConfig:
    """Train one LLaVA on each kind of features and compare what they answer about scenes."""

    tokenizer: str
    """Run directory of a tokenizer with both stages, the second with distillation."""
    llm: str
    """Folder or hub id of the language model."""
    output: str
    """Folder of all runs, scores.json and scores.md."""
    config: str = "tiny"
    """LLaVA's configuration: a name in understanding/configs, or a YAML file."""
    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))
    """Which to compare; without `undistilled` no tokenizer is trained."""
    training: list[str] = field(default_factory=list)
    """Changes to it, such as [sft.max_steps=1000]."""
    tokenizer_training: list[str] = field(default_factory=list)
    """Changes to the training without distillation; none keeps it comparable."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One LLaVA of each kind for each seed: their spread says which differences mean something."""
    num_images: int = 500
    """Scenes to ask about, and to reconstruct."""
    sprites: str = "shapes"
    """What the scenes are made of: shapes or emoji."""
    nproc: int = 1
    """Processes of each training and each score."""

    def __post_init__(self) -> None:
        check_range(self, "num_images", "nproc", low=1)
        for name in ("kinds", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got none, expected at least one")

    @property
    def data(self) -> str:
        """The source of scenes."""
        return "scenes" if self.sprites == "shapes" else f"scenes:{self.sprites}"


def compare(config: FeatureQualityConfig) -> dict[str, Any]:
    """Train and score what is missing; returns the content of scores.json.

    Raises:
        FileNotFoundError: when the tokenizer's run directory lacks a stage or its configuration.
    """
    tokenizers = find_tokenizers(config)
    kinds: dict[str, Any] = {}
    for kind, folder in tokenizers.items():
        # Quantized features come from the distilled tokenizer.
        psnr = score_psnr(config, "distilled" if kind == "quantized" else kind, folder)
        kinds[kind] = {"tokenizer": weights_fingerprint(folder), "psnr": psnr}
    for kind, folder in tokenizers.items():
        scores = {str(seed): score_llava(config, kind, folder, seed) for seed in config.seeds}
        kinds[kind]["seeds"] = scores
    fingerprints = {kind: values["tokenizer"] for kind, values in kinds.items()}
    rows = {kind: numbers_of(list(values["seeds"].values())) for kind, values in kinds.items()}
    manifest = run_manifest(fingerprints=fingerprints)
    result = {"rows": rows, "kinds": kinds, "manifest": manifest}
    write_json(Path(config.output) / "scores.json", result)
    return result


def numbers_of(scores: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """A number of each seed for each score, those of the kinds of questions among them."""
    columns: defaultdict[str, list[float]] = defaultdict(list)
    for score in scores:
        for name in ("accuracy", "held_out"):
            columns[name].append(score[name])
        for kind, accuracy in score["kinds"].items():
            columns[kind].append(accuracy)
    return dict(columns)


def find_tokenizers(config: FeatureQualityConfig) -> dict[str, Path]:
    """The tokenizer of each kind that is asked for; trains that of `undistilled` if missing."""
    run = Path(config.tokenizer)
    for part in ("config.yaml", "stage1/model/config.json", "stage2/model/config.json"):
        if not (run / part).is_file():
            raise FileNotFoundError(
                f"{run / part} does not exist: give the run directory of a tokenizer with "
                "both stages"
            )
    folders = {"original": run / "stage1" / "model", "distilled": run / "stage2" / "model"}
    folders["quantized"] = folders["distilled"]
    if "undistilled" in config.kinds:
        folders["undistilled"] = train_undistilled(config)
    return {kind: folders[kind] for kind in KINDS if kind in config.kinds}


def train_undistilled(config: FeatureQualityConfig) -> Path:
    """The tokenizer whose stage 2 starts from the same stage 1 but has no distillation."""
    run, undistilled = Path(config.tokenizer), Path(config.output) / "tokenizer_undistilled"
    if not (undistilled / "stage1").is_dir():
        unneeded = shutil.ignore_patterns("step-*", "events", "samples")
        with atomic_path(undistilled / "stage1") as temporary:
            shutil.copytree(run / "stage1", temporary, ignore=unneeded)
    arguments = [
        str(run / "config.yaml"),
        f"output_dir={undistilled}",
        "stage=2",
        "stage2.distillation_weight=0",
        *config.tokenizer_training,
    ]
    run_module(tokenizer_training, arguments, config.nproc)
    return undistilled / "stage2" / "model"


def score_psnr(config: FeatureQualityConfig, kind: str, tokenizer: Path) -> float:
    """PSNR of a tokenizer's reconstructions of scenes."""
    file = Path(config.output) / f"reconstruction_{kind}.json"
    arguments = [
        f"model={tokenizer}",
        f"output={file}",
        f"data={config.data}",
        f"num_images={config.num_images}",
        "frechet=[]",
        "lpips=[]",
    ]
    run_module(reconstruction, arguments, config.nproc)
    return read_json(file)["psnr"]


def score_llava(
    config: FeatureQualityConfig, kind: str, tokenizer: Path, seed: int
) -> dict[str, Any]:
    """Scores of a LLaVA on one kind of features, which is trained first if it is missing."""
    run = Path(config.output) / f"{kind}-{seed}"
    features = "quantized" if kind == "quantized" else "continuous"
    training = [
        config.config,
        f"tokenizer={tokenizer}",
        f"llm={config.llm}",
        f"output_dir={run}",
        f"seed={seed}",
        f"features={features}",
        f"data={config.data}",
        *config.training,
    ]
    run_module(llava_training, training, config.nproc)
    file = run / "questions.json"
    questions = [
        f"model={run}",
        f"output={file}",
        f"num_images={config.num_images}",
        f"sprites={config.sprites}",
    ]
    run_module(scene_questions, questions, config.nproc)
    return {
        key: value for key, value in read_json(file).items() if key not in ("examples", "settings")
    }


# ---- for people


def comparison_table(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each kind of features: mean over seeds, and the range of several."""
    seeds = list(next(iter(kinds.values()))["seeds"].values())
    names = list(seeds[0]["kinds"])
    questions = [name.replace("_", "/") for name in names]
    header = ["features", "PSNR of the tokenizer", "right", "of held-out scenes", *questions]
    rows = []
    for kind, values in kinds.items():
        numbers = numbers_of(list(values["seeds"].values()))
        rows.append([kind, f"{values['psnr']:.2f} dB", *map(spread, numbers.values())])
    count = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds (mean and range)"
    asked = (
        f"{seeds[0]['num_questions']} questions about {seeds[0]['num_images']} validation scenes"
    )
    note = f"{asked}, {count}; guessing from the question: {seeds[0]['blind_accuracy']:.1%}."
    table = markdown_table(header, rows)
    return "\n".join(["# Features for understanding", "", *table, "", note]) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean and range, or the one value."""
    text = f"{sum(values) / len(values):.1%}"
    return text if len(values) == 1 else f"{text} ({min(values):.1%} to {max(values):.1%})"


def main(argv: list[str] | None = None) -> None:
    """Command line: key=value …"""
    config = parse(FeatureQualityConfig, argv)
    text = comparison_table(compare(config)["kinds"])
    write_text(Path(config.output) / "scores.md", text)
    print(f"{text}->  {config.output}")


if __name__ == "__main__":
    run_main(main)
