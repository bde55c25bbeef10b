"""The paper's central claim on the embedded data: which features should a unified tokenizer show to the language model?

    python -m vqrae.quickstart.compare_features tokenizer=runs/quickstart/tokenizer llm=runs/quickstart/llm output=runs/feature_quality

One LLaVA on each of four kinds of features, everything else equal (arXiv 2511.23386, Table 6 and section 3.4):

    original     continuous, of the encoder as it was before the tokenizer touched it (stage 1 freezes it)
    distilled    continuous, of stage 2, which learns to reconstruct and is held to the original by distillation
    undistilled  continuous, of a stage 2 from the same start without distillation, which is trained here
    quantized    the distilled tokenizer's quantized features, those that its decoder reads

Each training and each score is an ordinary entry point's; the same command goes on where it was interrupted.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqrae.common.checkpoints import resolve_model
from vqrae.common.cli import parse
from vqrae.common.errors import run_main
from vqrae.common.files import atomic_path, read_json, weights_fingerprint, write_json, write_text
from vqrae.common.run import run_manifest
from vqrae.eval.reconstruction import evaluate as reconstruction
from vqrae.eval.sharding import run_module
from vqrae.eval.tables import markdown_table
from vqrae.quickstart import scene_questions
from vqrae.tokenizer import train as tokenizer_training
from vqrae.understanding import train as llava_training

KINDS = ("original", "distilled", "undistilled", "quantized")


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
        if not self.seeds or min(self.num_images, self.nproc) < 1:
            raise ValueError("give at least one seed, and a positive num_images and nproc")


def compare(config: FeatureQualityConfig) -> dict[str, Any]:
    """Train and score what is missing; returns the content of scores.json.

    Raises:
        FileNotFoundError: when the tokenizer's run directory lacks one of its stages or its configuration.
    """
    tokenizers = find_tokenizers(config)
    values: dict[str, Any] = {
        kind: {"tokenizer": weights_fingerprint(folder)} for kind, folder in tokenizers.items()
    }
    for kind, folder in tokenizers.items():
        if kind != "quantized":
            values[kind]["psnr"] = _psnr(config, kind, folder)
    values["quantized"]["psnr"] = values["distilled"]["psnr"]
    for kind, folder in tokenizers.items():
        values[kind]["seeds"] = {
            str(seed): _answers(config, kind, folder, seed) for seed in config.seeds
        }
    result = {
        "kinds": values,
        "manifest": run_manifest(fingerprints={k: v["tokenizer"] for k, v in values.items()}),
    }
    write_json(Path(config.output) / "scores.json", result)
    return result


def find_tokenizers(config: FeatureQualityConfig) -> dict[str, Path]:
    """The tokenizer of each kind; the one without distillation is trained first where it is not there."""
    run, output = Path(config.tokenizer), Path(config.output)
    for part in ("config.yaml", "stage1/model/config.json", "stage2/model/config.json"):
        if not (run / part).is_file():
            raise FileNotFoundError(
                f"{run / part} does not exist: give the run directory of a tokenizer with both stages"
            )
    undistilled = output / "tokenizer_undistilled"
    if not (undistilled / "stage1").is_dir():
        with atomic_path(undistilled / "stage1") as temporary:
            shutil.copytree(
                run / "stage1",
                temporary,
                ignore=shutil.ignore_patterns("step-*", "events", "samples"),
            )
    arguments = [
        str(run / "config.yaml"),
        f"output_dir={undistilled}",
        "stage=2",
        "stage2.distillation_weight=0",
    ]
    run_module(tokenizer_training, [*arguments, *config.tokenizer_training], config.nproc)
    distilled = run / "stage2" / "model"
    return {
        "original": run / "stage1" / "model",
        "distilled": distilled,
        "undistilled": undistilled / "stage2" / "model",
        "quantized": distilled,
    }


def _psnr(config: FeatureQualityConfig, kind: str, tokenizer: Path) -> float:
    """PSNR of a tokenizer's reconstructions of scenes."""
    file = Path(config.output) / f"reconstruction_{kind}.json"
    data = "scenes" if config.sprites == "shapes" else f"scenes:{config.sprites}"
    scored = [
        f"model={tokenizer}",
        f"output={file}",
        f"data={data}",
        f"num_images={config.num_images}",
    ]
    if not _is_current(file, tokenizer, config):
        run_module(reconstruction, [*scored, "frechet=[]", "lpips=[]"], config.nproc)
        _mark(file, tokenizer, config)
    return read_json(file)["psnr"]


def _answers(config: FeatureQualityConfig, kind: str, tokenizer: Path, seed: int) -> dict[str, Any]:
    """Scores of a LLaVA on one kind of features."""
    run = Path(config.output) / f"{kind}-{seed}"
    features = "quantized" if kind == "quantized" else "continuous"
    llava = [
        config.config,
        f"tokenizer={tokenizer}",
        f"llm={config.llm}",
        f"output_dir={run}",
        f"seed={seed}",
    ]
    data = "scenes" if config.sprites == "shapes" else f"scenes:{config.sprites}"
    run_module(
        llava_training,
        [*llava, f"features={features}", f"data={data}", *config.training],
        config.nproc,
    )
    file = run / "questions.json"
    if not _is_current(file, run, config):
        asked = [
            f"model={run}",
            f"output={file}",
            f"num_images={config.num_images}",
            f"sprites={config.sprites}",
        ]
        needed = [f"tokenizer={tokenizer}"] if features == "quantized" else []
        run_module(scene_questions, [*asked, *needed], config.nproc)
        _mark(file, run, config)
    return {key: value for key, value in read_json(file).items() if key != "examples"}


def _settings(model: Path, config: FeatureQualityConfig) -> dict[str, Any]:
    return {
        "model": weights_fingerprint(resolve_model(model)),
        "num_images": config.num_images,
        "sprites": config.sprites,
    }


def _is_current(file: Path, model: Path, config: FeatureQualityConfig) -> bool:
    """Whether a score is of these weights and scenes."""
    return file.is_file() and read_json(file).get("settings") == _settings(model, config)


def _mark(file: Path, model: Path, config: FeatureQualityConfig) -> None:
    write_json(file, read_json(file) | {"settings": _settings(model, config)})


# ---- for people


def markdown(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each kind of features: mean over seeds, and their range where there are several."""
    some = next(iter(next(iter(kinds.values()))["seeds"].values()))
    questions = list(some["kinds"])
    header = [
        "features",
        "PSNR of the tokenizer",
        "right",
        "of held-out scenes",
        *(kind.replace("_", "/") for kind in questions),
    ]
    rows = []
    for kind, values in kinds.items():
        scores = list(values["seeds"].values())
        columns = [[s["accuracy"] for s in scores], [s["held_out"] for s in scores]]
        columns += [[s["kinds"][question] for s in scores] for question in questions]
        rows.append([kind, f"{values['psnr']:.2f} dB", *(_mean(column) for column in columns)])
    seeds = len(next(iter(kinds.values()))["seeds"])
    lines = ["# Features for understanding", "", *markdown_table(header, rows), ""]
    lines.append(
        f"{some['num_questions']} questions about {some['num_images']} validation scenes, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds (mean and range)'}; guessing without eyes: {some['blind_accuracy']:.1%}."
    )
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    text = f"{sum(values) / len(values):.1%}"
    return text if len(values) == 1 else f"{text} ({min(values):.1%} to {max(values):.1%})"


def main(argv: list[str] | None = None) -> None:
    config = parse(FeatureQualityConfig, argv)
    text = markdown(compare(config)["kinds"])
    write_text(Path(config.output) / "scores.md", text)
    print(f"{text}->  {config.output}")


if __name__ == "__main__":
    run_main(main)
