"""How much of an image survives the codes: rFID, PSNR, SSIM, LPIPS and the use of the codebook.

    python -m vqrae.eval.reconstruction.evaluate model=runs/tokenizer data=scenes output=scores.json
    torchrun --standalone --nproc_per_node 8 -m vqrae.eval.reconstruction.evaluate \
        model=… data=imagenet/val protocol=titok output=…

Images stream: memory does not grow with their number. Several processes share the batches and add
up their sums, so that the numbers are those of one process. A metric whose network has no weights
here is "not measured", with the reason.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqrae.common import cli, run
from vqrae.common.checkpoints import model_fingerprint, resolve_model
from vqrae.common.config import check_range
from vqrae.common.distributed import is_main_process, sum_over_processes
from vqrae.common.errors import run_main
from vqrae.common.files import markdown_table, write_text
from vqrae.common.images import image_grid, image_to_uint8, open_image, save_image
from vqrae.common.run import package_versions, quiet_libraries
from vqrae.data.image_files import ImageFolder
from vqrae.data.samples import BrokenSamples, FileSplit, TolerantDataset
from vqrae.data.sources import Samples, fingerprint, open_images, source_kind
from vqrae.data.stream import Draw
from vqrae.eval.reconstruction.frechet import FrechetMetric
from vqrae.eval.reconstruction.metrics import ReconstructionMetrics
from vqrae.eval.reconstruction.networks import (
    Backbone,
    Distance,
    Inception,
    NotMeasured,
    OriginalEncoder,
    build_lpips,
    original_tokenizer,
)
from vqrae.eval.reconstruction.protocols import PROTOCOLS, Protocol, resize_image
from vqrae.eval.sharding import batch_indices, processes, progress_of_main
from vqrae.tokenizer.modeling import VQRAEModel

EXAMPLES = 8  # originals and reconstructions in the grid
SCENES = 1000  # scored when num_images is not given
IMAGENET_VALIDATION = 50_000  # images


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Score reconstructions: rFID, Inception score, PSNR, SSIM, LPIPS, codebook usage."""

    model: str
    """Tokenizer: run directory, checkpoint folder or hub id."""
    output: str
    """JSON file of the scores; a Markdown table and a grid of examples are written next to it."""
    data: str = "scenes"
    """Source of images: scenes, scenes:emoji, a folder, FILE.jsonl or FILE.tar."""
    split: Literal["auto", "validation", "all"] = "auto"
    """Which part of the source: its 5 % for validation, or all; auto is all of files, and
    validation of scenes."""
    num_images: int | None = None
    """Images to score, the first ones of the split; None: 1000 scenes, or all that files hold."""
    protocol: Literal["standard", "titok", "vgt", "maskbit", "llamagen", "rae"] = "standard"
    """Resizing, rounding and SSIM of a public evaluator, see eval/reconstruction/protocols.py."""
    frechet: tuple[Literal["inception", "encoder"], ...] = ("inception",)
    """Networks to take a Fréchet distance in: inception gives rfid and inception_score, encoder
    gives frechet_encoder."""
    lpips: tuple[Backbone, ...] = ("vgg",)
    """Backbones of LPIPS."""
    inception_weights: str | None = None
    """File of Inception weights; None: torch's cache."""
    vgg_weights: str | None = None
    """File of VGG-16 weights; None: torch's cache."""
    alex_weights: str | None = None
    """File of AlexNet weights; None: torch's cache."""
    original_encoder: str | None = None
    """Tokenizer with the original encoder, for frechet=[encoder]; None: stage 1 of the run."""
    reference: str | None = None
    """Folder that keeps statistics of the originals, which the next tokenizer is scored against."""
    batch_size: int = 32
    """Images of one pass."""
    num_workers: int = 0
    """Processes that read images."""
    device: str = "auto"
    """cpu, cuda, …; auto takes CUDA when there is one."""

    def __post_init__(self) -> None:
        check_range(self, "num_workers", low=0)
        check_range(self, "batch_size", "num_images", low=1)


# ---- data


class ProtocolFolder(ImageFolder):
    """Images of a folder, resized by a protocol."""

    def __init__(self, folder: str, *, protocol: Protocol, **options: Any) -> None:
        super().__init__(folder, **options)
        self.protocol = protocol

    def read(self, index: int) -> dict[str, Any]:
        image = resize_image(open_image(self.paths[index]), self.image_size, self.protocol.resize)
        return {"image": image_to_uint8(image)}


def open_evaluation(config: ReconstructionConfig, image_size: int) -> tuple[Samples, FileSplit]:
    """The images to score, {"image": uint8 (3, H, W)} each, and the split that they are.

    Raises ValueError for a protocol that resizes otherwise than the source does: only folders keep
    the size of their images.
    """
    kind = source_kind(config.data)
    protocol = PROTOCOLS[config.protocol]
    size = config.num_images or (SCENES if kind == "scenes" else None)
    split: FileSplit = "all" if kind in ("folder", "jsonl", "tar", "hf") else "validation"
    if config.split != "auto":
        split = config.split
    options: dict[str, Any] = {"image_size": image_size, "size": size, "split": split}
    if kind == "folder":
        return ProtocolFolder(config.data, protocol=protocol, **options), split
    if kind != "scenes" and protocol.resize != Protocol.resize:  # scenes are rendered at their size
        raise ValueError(
            f"{config.data} is resized by {Protocol.resize} when it is read, but this protocol "
            f"wants {protocol.resize}: unpack it into a folder"
        )
    return open_images(config.data, **options), split


def is_imagenet_validation(dataset: object) -> bool:
    """Whether a data set is ImageNet's 50,000 validation images, whose names number them."""
    if not isinstance(dataset, ImageFolder) or len(dataset) != IMAGENET_VALIDATION:
        return False
    expected = {f"ILSVRC2012_val_{i:08d}" for i in range(1, IMAGENET_VALIDATION + 1)}
    return {path.stem for path in dataset.paths} == expected


class ReadableSamples(Dataset):
    """(index, image), or (index, error) for a broken one.

    Training puts the next sample in place of a broken one; an evaluation would count it twice.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Tensor | ValueError]:
        try:
            if isinstance(self.dataset, TolerantDataset):
                return index, self.dataset.read(Draw(index, 0))["image"]
            return index, self.dataset[index]["image"]
        except ValueError as error:
            return index, ValueError(str(error))  # without a traceback, which no worker can send


# ---- networks


def build_metrics(
    config: ReconstructionConfig, originals: dict[str, Any], device: str
) -> tuple[list[FrechetMetric], dict[str, Distance], dict[str, str]]:
    """Fréchet distances, LPIPS by backbone, and the reason for each metric that cannot be taken.

    `originals` identify the original images, whose kept statistics must have the same.
    """
    frechet: list[FrechetMetric] = []
    lpips: dict[str, Distance] = {}
    not_measured: dict[str, str] = {}
    for name in config.frechet:
        try:
            network: torch.nn.Module
            if name == "inception":
                keys = ["rfid", "inception_score"]
                network = Inception(config.inception_weights)
            else:
                keys = ["frechet_encoder"]
                network = OriginalEncoder(original_tokenizer(config.model, config.original_encoder))
            frechet.append(FrechetMetric(network, device, config.reference, originals))
        except NotMeasured as error:
            not_measured |= dict.fromkeys(keys, str(error))
    for backbone in config.lpips:
        weights = getattr(config, f"{backbone}_weights")
        try:
            lpips[backbone] = build_lpips(backbone, weights, device)
        except NotMeasured as error:
            not_measured[f"lpips_{backbone}"] = str(error)
    return frechet, lpips, not_measured


# ---- scores


@torch.inference_mode()
def evaluate_reconstruction(
    model: VQRAEModel,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    num_images: int | None = None,
    num_workers: int = 0,
    protocol: Protocol | None = None,
    frechet: Sequence[FrechetMetric] = (),
    lpips: dict[str, Distance] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Encode and decode the first `num_images` (or all) samples {"image": uint8 (3, H, W)}.

    Returns the metrics of all processes, and the first images of this one with their
    reconstructions, (M, 3, H, W) in [0, 1]. Raises ValueError when the data set holds fewer images
    than asked for; TooManyBrokenSamples when more of them cannot be read than a sound source has.
    """
    model.eval()
    available: int = len(dataset)  # type: ignore[arg-type]  # every source of ours has a length
    total = available if num_images is None else num_images
    if not 0 < total <= available:
        raise ValueError(
            f"got num_images={total}, expected 1 to {available}, the images of this data set"
        )
    metrics = ReconstructionMetrics(
        model.config.codebook_size,
        num_codebooks=model.config.num_codebooks,
        protocol=protocol,
        frechet=frechet,
        lpips=lpips,
        device=model.device,
    )
    loader = DataLoader(
        ReadableSamples(dataset),
        batch_sampler=batch_indices(total, batch_size),
        num_workers=num_workers,
        collate_fn=list,  # errors do not stack
    )
    broken = BrokenSamples("the images")
    originals: list[Tensor] = []
    reconstructions: list[Tensor] = []
    for samples in loader:
        broken.seen += len(samples)
        for index, sample in samples:
            if isinstance(sample, ValueError):
                broken.note(index, sample)
        sound = [sample for _, sample in samples if isinstance(sample, Tensor)]
        if sound:
            images = torch.stack(sound).to(model.device, non_blocking=True).float() / 255
            codes = model.encode(images)
            reconstruction = model.decode(codes)
            metrics.update(images, reconstruction, codes)
            if len(originals) < EXAMPLES:
                originals += images[: EXAMPLES - len(originals)].cpu()
                reconstructions += reconstruction[: EXAMPLES - len(reconstructions)].cpu()
        progress(min(samples[-1][0] + 1, total), total)

    metrics.reduce()
    count = torch.tensor(len(broken.found), device=model.device)
    values = {**metrics.compute(), "broken_images": int(sum_over_processes(count))}
    return values, torch.stack(originals), torch.stack(reconstructions)


# ---- the command


def reconstruction_table(values: dict[str, Any]) -> str:
    """The scores as a table, with what they were measured on and what was not measured."""
    rows = [(name, f"not measured: {reason}") for name, reason in values["not_measured"].items()]
    for name, value in values.items():
        if type(value) in (int, float):
            rows.append((name, f"{value:.6g}"))
    protocol = ", ".join(f"{name} {value}" for name, value in values["protocol"].items())
    lines = [
        "# Reconstruction",
        "",
        f"Tokenizer `{values['tokenizer']}` on `{values['data']}`, split {values['split']}. "
        f"Protocol: {protocol}.",
        *values["notes"],
        "",
        *markdown_table(("metric", "value"), rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(ReconstructionConfig, argv)
    quiet_libraries()
    output = Path(config.output)
    protocol = PROTOCOLS[config.protocol]
    with processes(config.device) as device:
        model = VQRAEModel.from_pretrained(resolve_model(config.model)).to(device)
        dataset, split = open_evaluation(config, model.config.image_size)
        originals = {
            "data": fingerprint(config.data),
            "split": split,
            "requested_images": len(dataset),
            "image_size": model.config.image_size,
            "protocol": {"name": config.protocol, **dataclasses.asdict(protocol)},
        }
        tokenizer = model_fingerprint(config.model)
        frechet, lpips, not_measured = build_metrics(config, originals, device)

        def score() -> dict[str, Any]:
            metrics, images, reconstructions = evaluate_reconstruction(
                model,
                dataset,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                protocol=protocol,
                frechet=frechet,
                lpips=lpips,
                progress=progress_of_main("reconstruction"),
            )
            if is_main_process():
                for metric in frechet:
                    metric.keep_reference()
                grid = image_grid(
                    [list(images), list(reconstructions)], labels=["original", "reconstruction"]
                )
                save_image(grid, output.with_suffix(".png"))
            reasons = not_measured | metrics["not_measured"]
            return {
                **dict.fromkeys(reasons),
                **metrics,
                **originals,
                "imagenet_validation": is_imagenet_validation(dataset),
                "tokenizer": tokenizer,
                "not_measured": reasons,
                "packages": package_versions(),
            }

        networks = [metric.identity["network"] for metric in frechet]
        settings = {**originals, "tokenizer": tokenizer, "networks": [*networks, *lpips]}
        values = run.kept(output, settings, score)
    if is_main_process():
        text = reconstruction_table(values)
        write_text(output.with_suffix(".md"), text)
        print(f"{text}->  {output}")


if __name__ == "__main__":
    run_main(main)
