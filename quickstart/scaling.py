"""What a larger generator buys: several sizes on the same codes, and their loss against compute.

    python -m vqrae.quickstart.scaling codes=CODES tokenizer=RUN output=runs/scaling

VQRAE's abstract speaks of a "promising scaling property in the autoregressive paradigm"; the paper
trains one size and leaves "efficient model scaling" to future work (appendix D). The sizes take the
same batches at a constant rate (Table 9), so that every checkpoint is a training of its own length;
a cosine's would not be (arXiv 2203.15556). No image is seen twice, and all are scored on the same
held-out images, so that these do not add to what differs between seeds.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import least_squares
from transformers import AutoTokenizer, Qwen3ForCausalLM

from vqrae.common.checkpoints import load_model, local_model, model_fingerprint
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import choose_device
from vqrae.common.errors import run_main
from vqrae.common.files import (
    atomic_path,
    markdown_table,
    weights_fingerprint,
    write_json,
    write_text,
)
from vqrae.common.run import kept, prune, run_manifest
from vqrae.common.trainer import checkpoints
from vqrae.data.code_shards import CodeDataset
from vqrae.eval.figures import ACCENT, PAPER, RIGHT, SECOND, STYLE, WRONG
from vqrae.eval.sharding import run_module
from vqrae.generation import extract_codes
from vqrae.generation import train as generation_training
from vqrae.generation.data import GenerationCollator
from vqrae.generation.generator import Generator
from vqrae.generation.heads import SingleCodeHead
from vqrae.generation.train import visual_loss

COLORS = (ACCENT, SECOND, RIGHT, WRONG)
CHECKPOINTS = 6  # of a run, evenly spaced


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Train generators of several sizes on one code set and fit their loss against compute."""

    codes: str
    """Folder of code shards, with as many images as a training shows."""
    tokenizer: str
    """The tokenizer that made them."""
    held_out: str = "scenes"
    """Captioned images whose validation split is held out; OUTPUT/held_out gets their codes."""
    output: str
    """Folder of all runs, scaling.json, scaling.md and scaling.png."""
    config: str = "tiny"
    """The generator's configuration: a name in generation/configs, or a YAML file."""
    training: list[str] = field(default_factory=list)
    """Changes to it, such as [optimization.learning_rate=3e-3]."""
    sizes: list[str] = field(default_factory=lambda: ["2x96", "4x192", "6x256"])
    """LAYERSxWIDTH, from small to large; heads stay as many, an MLP is three times as wide."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 300
    """Optimizer steps of every run."""
    batch: int = 32
    """Images of a step."""
    num_images: int = 500
    """Held-out images."""
    nproc: int = 1
    """Processes of each training."""

    def __post_init__(self) -> None:
        check_range(self, "steps", "batch", "num_images", "nproc", low=1)
        if self.steps % CHECKPOINTS:
            raise ValueError(f"steps: got {self.steps}, expected a multiple of {CHECKPOINTS}")
        if not self.seeds or not 3 <= len(self.sizes) <= len(COLORS):
            raise ValueError(
                f"got {len(self.seeds)} seeds and {len(self.sizes)} sizes, expected a seed or more "
                f"and 3 or {len(COLORS)} sizes"
            )
        for size in self.sizes:
            layers_and_width(size)

    def arguments(self, size: str, seed: int) -> list[str]:
        """The training command of one run."""
        layers, width = layers_and_width(size)
        return [
            self.config,
            f"tokenizer={self.tokenizer}",
            f"data={self.codes}",
            f"output_dir={Path(self.output) / f'{size}-{seed}'}",
            f"seed={seed}",
            "previews=0",
            "optimization.lr_scheduler_type=constant_with_warmup",
            *self.training,
            f"model.llm_config.num_hidden_layers={layers}",
            f"model.llm_config.hidden_size={width}",
            f"model.llm_config.head_dim={width // 4}",  # `tiny` has four heads
            f"model.llm_config.intermediate_size={3 * width}",
            f"optimization.max_steps={self.steps}",
            f"optimization.global_batch_size={self.batch}",
            f"optimization.micro_batch_size={self.batch}",
            f"optimization.save_steps={self.steps // CHECKPOINTS}",
            "optimization.save_total_limit=0",  # all, until they are scored
        ]


def layers_and_width(size: str) -> tuple[int, int]:
    """Of a size such as `4x192`; ValueError for another form or a width without even heads."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if match is None or int(match[2]) % 8:
        raise ValueError(
            f"sizes: got {size!r}, expected LAYERSxWIDTH such as 4x192, a multiple of 8"
        )
    return int(match[1]), int(match[2])


def measure(config: ScalingConfig) -> dict[str, Any]:
    """Train and score what is missing; returns the content of scaling.json.

    Raises:
        ValueError: when the code set is of another tokenizer, has several codebooks, or holds fewer
            images than a training shows.
    """
    fingerprint = weights_fingerprint(local_model(config.tokenizer))
    codes = CodeDataset(config.codes, tokenizer_fingerprint=fingerprint)
    if codes.manifest.num_codebooks > 1:
        raise ValueError(f"{config.codes} has several codes a position, expected one")
    shown = config.steps * config.batch
    if shown > len(codes):
        raise ValueError(
            f"{config.codes} holds {len(codes)} images, expected {shown} to train on, each once: "
            "extract more, or set fewer steps"
        )
    held_out = held_out_codes(config, fingerprint)
    samples = [held_out[i] for i in range(len(held_out))]
    sizes: dict[str, Any] = {size: {"curves": []} for size in config.sizes}
    for seed, size in itertools.product(config.seeds, config.sizes):
        run_module(generation_training, config.arguments(size, seed), config.nproc)
        run = Path(config.output) / f"{size}-{seed}"
        settings = {"model": model_fingerprint(run)}
        settings["held_out"] = CodeDataset.fingerprint(held_out.folder)
        scores = kept(run / "held_out.json", settings, partial(score_run, run, samples))
        prune(checkpoints(run), 1)
        curve = [(int(step) * config.batch, loss) for step, loss in scores["losses"].items()]
        sizes[size]["curves"].append(curve)
        sizes[size] |= {key: scores[key] for key in ("parameters", "tokens", "flops")}
    fits = []
    for place in range(len(config.seeds)):
        points = []
        for values in sizes.values():
            millions = values["parameters"] / 1e6
            points += [(millions, images / 1e3, loss) for images, loss in values["curves"][place]]
        fits.append(fit_law(points))
    rows: dict[str, dict[str, list[float]]] = {"frontier": {}, "no scaling": {}}
    rows["frontier"]["exponent"] = [fit["exponent"] for fit in fits]
    rows["no scaling"]["exponent"] = [0.0 for _ in fits]
    for size, values in sizes.items():
        rows[size] = {"loss": [curve[-1][1] for curve in values["curves"]]}
        rows[size]["compute"] = [curve[-1][0] * values["flops"] for curve in values["curves"]]
    result = {"rows": rows, "fits": fits, "sizes": sizes, "settings": dataclasses.asdict(config)}
    return {**result, "manifest": run_manifest(fingerprints={"tokenizer": fingerprint})}


def held_out_codes(config: ScalingConfig, fingerprint: str) -> CodeDataset:
    """The images that all runs are scored on, as codes of the tokenizer with this fingerprint."""
    folder = Path(config.output) / "held_out"
    arguments = [f"tokenizer={config.tokenizer}", f"source={config.held_out}", "split=validation"]
    arguments += [f"size={config.num_images}", f"output_dir={folder}"]
    run_module(extract_codes, ["tiny", *arguments], nproc=1)
    return CodeDataset(folder, tokenizer_fingerprint=fingerprint)


@torch.inference_mode()
def score_run(run: Path, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The loss of each checkpoint on samples.

    Returns:
        losses: nats per code, by step. parameters: without embeddings. tokens: ids of a prompt and
        its codes, mean. flops: of training on one image.
    """
    text_tokenizer = AutoTokenizer.from_pretrained(run / "model")
    device = choose_device("auto")
    losses, result = {}, {}
    for checkpoint in checkpoints(run):
        model = load_model(Qwen3ForCausalLM, checkpoint, attn_implementation="eager").to(device)
        encode_prompt = Generator.prompt_encoder(model.config, text_tokenizer)
        vocabulary, collate = encode_prompt.vocabulary, GenerationCollator(encode_prompt)
        model.lm_head = SingleCodeHead(model.lm_head, vocabulary.code_rows)
        total, tokens = 0.0, 0
        for start in range(0, len(samples), 50):
            rows = samples[start : start + 50]
            batch = {name: value.to(device) for name, value in collate(rows).items()}
            tokens += int(batch["attention_mask"].sum())
            with torch.autocast(device, dtype=torch.bfloat16):  # as in training
                total += visual_loss(model.eval(), batch, vocabulary).item() * len(rows)
        losses[checkpoint.name.rpartition("-")[2]] = total / len(samples)
        result = {"parameters": model.num_parameters(exclude_embeddings=True)}
        result["tokens"] = tokens / len(samples)
        result["flops"] = training_flops(model, result["tokens"])
    return {"losses": losses, **result}


def training_flops(model: Qwen3ForCausalLM, tokens: float) -> float:
    """Multiplications and additions of training on one image: 3 times those of a forward pass.

    6 N T for N parameters and T ids; 12 L H T^2 for attention of L layers, all heads together H
    wide (all T x T products are computed); 6 (M + 1) K D for logits of K codes of width D at M + 1
    positions. Padding, norms and the optimizer are left out.
    """
    config, vocabulary = model.config, model.config.visual_vocabulary
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    logits = (vocabulary["num_codes"] + 1) * vocabulary["codebook_size"] * config.hidden_size
    parameters = model.num_parameters(exclude_embeddings=True)
    return 6 * parameters * tokens + 12 * attention * tokens**2 + 6 * logits


def law(millions: Any, images: Any, fit: Sequence[float]) -> Any:
    """E + A N^-alpha + B D^-beta (arXiv 2203.15556, equation 2), N in millions, D in thousands."""
    floor, size_scale, size_exponent, data_scale, data_exponent = fit
    return floor + size_scale * millions**-size_exponent + data_scale * images**-data_exponent


def fit_law(points: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    """The law of points (millions of parameters, thousands of images, loss).

    Least squares of logarithms; the floor is below all losses, exponents may have any sign.

    Returns:
        The five numbers of `law`, and `exponent`, which they imply for the best loss of a compute:
        alpha beta / (alpha + beta).
    """
    millions, images, losses = np.array(points).T
    lowest = losses.min()

    def residuals(fit: Any) -> np.ndarray:
        return np.log(law(millions, images, fit) / losses)

    bounds = ([0, 0, -2, 0, -2], [lowest, np.inf, 2, np.inf, 2])
    starts = [(part * lowest, lowest / 4, 0.3, lowest / 4, 0.3) for part in (0.1, 0.5, 0.9)]
    options: dict[str, Any] = {"bounds": bounds, "x_scale": "jac", "max_nfev": 5000}
    found = [least_squares(residuals, start, **options) for start in starts]
    best = min(found, key=lambda each: each.cost).x.tolist()
    names = ("floor", "size_scale", "size_exponent", "data_scale", "data_exponent")
    exponent = best[2] * best[4] / (best[2] + best[4])
    return dict(zip(names, best, strict=True), exponent=exponent)


# ---- for people


def scaling_table(result: dict[str, Any]) -> str:
    """Sizes with their losses, and the fits."""
    settings, rows = result["settings"], []
    for size, found in result["sizes"].items():
        losses = result["rows"][size]["loss"]
        spread = f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        compute = result["rows"][size]["compute"][0]
        rows.append([size, f"{found['parameters'] / 1e6:.2f} M", f"{compute:.2e}", spread])
    header = ["layers x width", "parameters", "training FLOPs", "held-out loss"]
    note = (
        f"{settings['steps']} steps of {settings['batch']} images; nats a code of "
        f"{settings['num_images']} held-out images, mean and range of seeds "
        f"{settings['seeds']}; parameters without embeddings. E + A N^-alpha + B D^-beta, fitted "
        "to each seed:"
    )
    fits = []
    for fit in result["fits"]:
        values = [fit["floor"], fit["size_exponent"], fit["data_exponent"], fit["exponent"]]
        fits.append([f"{value:.3f}" for value in values])
    lines = ["# Scaling of the generator", "", *markdown_table(header, rows), "", note, ""]
    lines += markdown_table(["E", "alpha", "beta", "compute: alpha beta / (alpha + beta)"], fits)
    return "\n".join(lines) + "\n"


def draw_scaling(result: dict[str, Any], file: Path) -> None:
    """Loss against compute, both logarithmic: a colour a size, points of each seed, its fit."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), dpi=160, facecolor=PAPER, layout="constrained")
        axes = figure.subplots()
        for (size, values), color in zip(result["sizes"].items(), COLORS, strict=False):
            millions = values["parameters"] / 1e6
            for curve, fit in zip(values["curves"], result["fits"], strict=True):
                images, losses = np.array(curve).T
                axes.loglog(images * values["flops"], losses, "o", color=color, markersize=3)
                many = np.geomspace(images[0], images[-1])
                fitted = law(millions, many / 1e3, list(fit.values())[:5])
                axes.plot(many * values["flops"], fitted, color=color, linewidth=0.8)
            place = (images[0] * values["flops"], losses[0])
            axes.annotate(f"  {size}: {millions:.2f} M", place, color=color)
        exponents = [fit["exponent"] for fit in result["fits"]]
        spread = f"{np.mean(exponents):.2f} ({min(exponents):.2f} to {max(exponents):.2f})"
        axes.set_title(
            f"lines: E + A N^-alpha + B D^-beta; exponent of compute {spread}", fontsize=9
        )
        axes.set(xlabel="training FLOPs", ylabel="held-out loss, nats a code")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="png")


def main(argv: list[str] | None = None) -> None:
    """Command line: key=value …"""
    config = parse(ScalingConfig, argv)
    result, output = measure(config), Path(config.output)
    text = scaling_table(result)
    write_json(output / "scaling.json", result)
    write_text(output / "scaling.md", text)
    draw_scaling(result, output / "scaling.png")
    print(f"{text}->  {output}")


if __name__ == "__main__":
    run_main(main)
