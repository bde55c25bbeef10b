"""How much of an image survives the codes: rFID, PSNR, SSIM, LPIPS and the use of the codebook.

    python -m vqrae.eval.reconstruction.evaluate model=runs/tokenizer data=scenes output=reconstruction.json
    torchrun --standalone --nproc_per_node 8 -m vqrae.eval.reconstruction.evaluate model=… data=imagenet/val protocol=titok output=…

Images stream: nothing of an evaluation grows with their number. On several processes each scores a share, and the sums are
added, so that the numbers are those of one process. A metric whose network has no weights here is "not measured", with the
reason; it is never taken with random ones.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqrae.common.checkpoints import resolve_model
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process
from vqrae.common.errors import run_main
from vqrae.common.files import write_json, write_text
from vqrae.common.images import image_grid, save_image
from vqrae.common.run import package_versions, quiet_libraries
from vqrae.data.sources import fingerprint, source_kind
from vqrae.eval.manifest import model_fingerprint
from vqrae.eval.reconstruction.frechet import FeatureStatistics
from vqrae.eval.reconstruction.images import (
    ImageBatches,
    SplitChoice,
    is_imagenet_validation,
    open_evaluation,
    resolve_split,
)
from vqrae.eval.reconstruction.metrics import Distance, FrechetMetric, ReconstructionMetrics
from vqrae.eval.reconstruction.networks import (
    Backbone,
    EfficientNetLite0,
    Inception,
    NotMeasured,
    OriginalEncoder,
    build_lpips,
    original_tokenizer,
)
from vqrae.eval.reconstruction.protocols import Protocol, get_protocol
from vqrae.eval.sharding import processes, progress_of_main
from vqrae.eval.tables import markdown_table
from vqrae.tokenizer.modeling import VQRAEModel

EXAMPLES = 16
SCENES = 1000  # how many, when nobody says
SHOWN = ("rfid", "inception_score", "lpips_vgg", "lpips_alex")


@dataclass(frozen=True)
class Reconstructions:
    """Metrics with usage counts (G, K), and the first images beside their copies, (M, 3, H, W) in [0, 1]."""

    metrics: dict[str, Any]
    histogram: Tensor
    originals: Tensor
    copies: Tensor


@torch.inference_mode()
def evaluate_reconstruction(
    model: VQRAEModel,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    num_images: int | None = None,
    num_workers: int = 0,
    protocol: Protocol | None = None,
    frechet: tuple[FrechetMetric, ...] = (),
    lpips: dict[str, Distance] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstructions:
    """Encode and decode the first `num_images` (or all) images of a data set of {"image": uint8 (3, H, W)}.

    In a process group each process scores its share; metrics are those of all, images those of the process.

    Args:
        frechet, lpips: what else to measure than pixels and codes.
        progress: called with (images done, images in all).

    Raises:
        ValueError: when the data set holds fewer images than asked for, or than there are processes.
    """
    model = model.eval()
    available: int = len(dataset)  # type: ignore[arg-type]  # every source of ours has a length
    total = available if num_images is None else num_images
    if not 0 < total <= available:
        raise ValueError(
            f"got num_images={total}, expected 1 to {available}, the images of this data set"
        )
    batches = ImageBatches(
        dataset,
        total,
        batch_size=batch_size,
        num_workers=num_workers,
        device=model.device,
        progress=progress,
    )
    metrics = ReconstructionMetrics(
        model.config.codebook_size,
        getattr(model.quantizer, "num_codebooks", 1),
        protocol=protocol,
        frechet=frechet,
        lpips=lpips,
        device=model.device,
    )
    originals, copies, done = [torch.empty(0)], [torch.empty(0)], 0
    for images in batches:
        codes = model.encode(images)
        reconstruction = model.decode(codes)
        metrics.update(images, reconstruction, codes)
        if done < EXAMPLES:
            originals.append(images[: EXAMPLES - done].cpu())
            copies.append(reconstruction[: EXAMPLES - done].cpu())
        done += len(images)
    metrics.reduce()
    batches.reduce()
    values = {**metrics.compute(), "broken_images": int(batches.broken)}
    return Reconstructions(values, metrics.histogram.cpu(), torch.cat(originals), torch.cat(copies))


# ---- the command


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Score a tokenizer's reconstructions: rFID, Inception score, PSNR, SSIM, LPIPS, codebook usage."""

    model: str
    """Tokenizer: run directory, checkpoint folder or hub id."""
    output: str
    """JSON file of the scores; a Markdown table and a grid of examples (originals above copies) go beside it."""
    data: str = "scenes"
    """Source of images: scenes, scenes:emoji, a folder, FILE.jsonl or FILE.tar."""
    split: SplitChoice = "auto"
    """Which part of the source: its 5 % for validation, or all; auto is all of files, and validation of scenes."""
    num_images: int | None = None
    """Images to score, the first ones of the split; None: 1000 scenes, or everything that files hold."""
    protocol: Literal["standard", "titok", "vgt", "maskbit", "llamagen", "rae"] = "standard"
    """Resizing, rounding and SSIM of a public evaluator, see vqrae.eval.reconstruction.protocols."""
    frechet: tuple[Literal["inception", "efficientnet_lite0", "encoder"], ...] = ("inception",)
    """Networks to take a Fréchet distance in: inception gives rfid and inception_score, others frechet_NAME."""
    lpips: tuple[Backbone, ...] = ("vgg",)
    """Backbones of LPIPS."""
    inception_weights: str | None = None
    """File of Inception weights; None: torch's cache."""
    vgg_weights: str | None = None
    """File of VGG-16 weights; None: torch's cache."""
    alex_weights: str | None = None
    """File of AlexNet weights; None: torch's cache."""
    original_encoder: str | None = None
    """Tokenizer whose encoder is the original one, for frechet=[encoder]; None: stage 1 of the run directory."""
    reference: str | None = None
    """Folder that keeps statistics of the originals, so that the next tokenizer is scored in less time."""
    batch_size: int = 32
    """Images of one pass."""
    num_workers: int = 0
    """Processes that read images."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        check_range(self, "num_workers", low=0)
        if self.batch_size < 1 or (self.num_images is not None and self.num_images < 1):
            raise ValueError(
                f"got num_images={self.num_images}, batch_size={self.batch_size}, expected both positive"
            )
        get_protocol(self.protocol)


def build_network(name: str, config: ReconstructionConfig) -> torch.nn.Module:
    """A network for Fréchet distances.

    Raises:
        NotMeasured: when its weights are not there.
    """
    if name == "inception":
        return Inception(config.inception_weights)
    if name == "efficientnet_lite0":
        return EfficientNetLite0.from_package()
    return OriginalEncoder(original_tokenizer(config.model, config.original_encoder))


@dataclass
class Judges:
    """What measures more than pixels and codes, and for each metric that cannot be taken the reason.

    Args:
        identity: of the originals; kept statistics of them must have the same.
    """

    config: ReconstructionConfig
    identity: dict[str, Any]
    device: str

    def __post_init__(self) -> None:
        self.frechet: list[FrechetMetric] = []
        self.lpips: dict[str, Distance] = {}
        self.not_measured: dict[str, str] = {}
        for name in self.config.frechet:
            try:
                network: Any = build_network(name, self.config)
            except NotMeasured as error:
                metrics = (
                    ("rfid", "inception_score") if name == "inception" else (f"frechet_{name}",)
                )
                self.not_measured |= dict.fromkeys(metrics, str(error))
                continue
            path, identity = self._reference(network)
            known = (
                FeatureStatistics.load(path, identity)
                if path is not None and path.exists()
                else None
            )
            self.frechet.append(FrechetMetric(network, known, self.device))
        for backbone in self.config.lpips:
            try:
                self.lpips[backbone] = build_lpips(
                    backbone, getattr(self.config, f"{backbone}_weights")
                )
            except NotMeasured as error:
                self.not_measured[f"lpips_{backbone}"] = str(error)

    def _reference(self, network: Any) -> tuple[Path | None, dict[str, Any]]:
        folder = self.config.reference
        return Path(folder) / f"{network.name}.npz" if folder else None, {
            **self.identity,
            "network": network.identity,
        }

    def keep_references(self) -> None:
        """Write the statistics of the originals that were taken in this run."""
        for metric in self.frechet:
            path, identity = self._reference(metric.network)
            if path is not None and not metric.known and metric.originals.count > 1:
                metric.originals.save(path, identity)


def markdown(values: dict[str, Any]) -> str:
    """The scores as a table, with what they were measured on and what was not measured."""
    numbers = [
        (name, f"{value:.6g}") for name, value in values.items() if type(value) in (int, float)
    ]
    missing = [(name, f"not measured: {reason}") for name, reason in values["not_measured"].items()]
    settings = ", ".join(f"{name} {value}" for name, value in values["protocol"].items())
    lines = [
        "# Reconstruction",
        "",
        f"Tokenizer `{values['tokenizer']}` on `{values['data']}`, split {values['split']}. Protocol: {settings}.",
        *values["notes"],
        "",
        *markdown_table(("metric", "value"), [*missing, *numbers]),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    config = parse(ReconstructionConfig, argv)
    quiet_libraries()
    folder, protocol = resolve_model(config.model), get_protocol(config.protocol)
    with processes(config.device) as device:
        model = VQRAEModel.from_pretrained(folder).to(device)
        split = resolve_split(config.data, config.split)
        size = config.num_images or (SCENES if source_kind(config.data) == "scenes" else None)
        dataset = open_evaluation(
            config.data,
            image_size=model.config.image_size,
            split=split,
            size=size,
            protocol=protocol,
        )
        originals = {
            "data": fingerprint(config.data),
            "split": split,
            "requested_images": len(dataset),
            "image_size": model.config.image_size,
            "protocol": {"name": config.protocol, **dataclasses.asdict(protocol)},
        }
        judges = Judges(config, originals, device)
        result = evaluate_reconstruction(
            model,
            dataset,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            protocol=protocol,
            frechet=tuple(judges.frechet),
            lpips=judges.lpips,
            progress=progress_of_main("reconstruction"),
        )
    if is_main_process():
        judges.keep_references()
        origin = {
            **originals,
            "imagenet_validation": is_imagenet_validation(dataset),
            "tokenizer": model_fingerprint(folder),
            "not_measured": judges.not_measured | result.metrics["not_measured"],
        }
        write_result(config, result, origin)


def write_result(
    config: ReconstructionConfig, result: Reconstructions, origin: dict[str, Any]
) -> None:
    """Write JSON, Markdown and the grid of examples, and print the main numbers."""
    unknown = dict.fromkeys(origin["not_measured"])
    values = {**unknown, **result.metrics, **origin, "packages": package_versions()}
    output = Path(config.output)
    write_json(output, values)
    write_text(output.with_suffix(".md"), markdown(values))
    rows = [list(result.originals[:8]), list(result.copies[:8])]
    save_image(image_grid(rows, labels=["original", "copy"]), output.with_suffix(".png"))
    for name, reason in values["not_measured"].items():
        print(f"{name} not measured: {reason}")
    shown = {
        name: value for name, value in result.metrics.items() if name in SHOWN or "frechet" in name
    }
    measured = "".join(
        f"{name} {value:.4g}  " for name, value in shown.items() if value is not None
    )
    print(
        f"psnr {values['psnr']:.2f} dB  ssim {values['ssim']:.4f}  {measured}codebook usage {values['codebook_usage']:.1%}  "
        f"perplexity {values['perplexity']:.1f}  ({values['num_images']} images of {config.data}, split {values['split']}, "
        f"protocol {config.protocol})  ->  {output}"
    )


if __name__ == "__main__":
    run_main(main)
