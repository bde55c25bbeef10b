"""Images to codes and back: reconstruct, encode, decode, codebook."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqrae.scripts.commands.shared import (
    BATCH_SIZE,
    GRID_COLUMNS,
    ImageReader,
    add_command,
    chosen_device,
    enlarged_grid,
    output_names,
    quiet,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vqrae.tokenizer.modeling import VQRAEModel


def register(commands: Any) -> None:
    """Add this module's commands."""
    images: dict[str, Any] = {
        "required": True,
        "help": "an image, or a folder of images of any size and mode",
    }
    command = add_command(
        commands,
        "reconstruct",
        reconstruct,
        "encode images to codes and back, and measure the loss",
        model="tokenizer",
    )
    command.add_argument("--images", **images)
    command.add_argument(
        "--out",
        required=True,
        help="folder for NAME.png (original | reconstruction), grid.png, metrics.json",
    )

    command = add_command(commands, "encode", encode, "turn images into codes", model="tokenizer")
    command.add_argument("--images", **images)
    command.add_argument(
        "--out", required=True, help="FILE.npz for codes, names and the tokenizer's fingerprint"
    )

    command = add_command(commands, "decode", decode, "turn codes into images", model="tokenizer")
    command.add_argument("--codes", required=True, help="FILE.npz written by encode")
    command.add_argument("--out", required=True, help="folder for the images")

    text = "show what each code stands for, and how well the codebook is used"
    command = add_command(commands, "codebook", codebook, text, model="tokenizer")
    command.add_argument("--images", **images)
    command.add_argument(
        "--out",
        default="codebook",
        help="folder for codebook.html, .png and .json (default: %(default)s)",
    )


def _load_tokenizer(arguments: argparse.Namespace) -> tuple["VQRAEModel", str]:
    """The tokenizer and its fingerprint."""
    from vqrae.common.checkpoints import local_model, require_kind
    from vqrae.common.files import weights_fingerprint
    from vqrae.tokenizer.modeling import VQRAEModel

    quiet()
    folder = local_model(arguments.model)
    require_kind(folder, ("vqrae",), "a tokenizer (model_type vqrae)")
    model = VQRAEModel.from_pretrained(folder).eval().to(chosen_device(arguments))
    return model, weights_fingerprint(folder)


def reconstruct(arguments: argparse.Namespace) -> int:
    """Write original and reconstruction side by side for each image, a grid of the first ones, and PSNR per file."""
    import torch

    from vqrae.common.cli import progress_line
    from vqrae.common.files import write_json
    from vqrae.common.images import image_grid, save_image

    progress = progress_line("reconstruct")
    model, fingerprint = _load_tokenizer(arguments)
    reader = ImageReader(arguments.images, model.config.image_size)
    outputs = output_names(list(reader.paths))
    out, psnr = Path(arguments.out), {}
    originals: list[Tensor] = []
    copies: list[Tensor] = []
    for names, images in reader:
        with torch.inference_mode():
            decoded = model.decode(model.encode(images.to(model.device))).cpu()
        if decoded.shape != images.shape:
            decoded = torch.nn.functional.interpolate(
                decoded, images.shape[-2:], mode="bilinear", antialias=True
            )
        for name, image, copy in zip(names, images, decoded, strict=True):
            save_image(image_grid([[image, copy]], scale=1), out / outputs[name])
            psnr[name] = round(
                -10 * (image - copy).square().mean().clamp(min=1e-10).log10().item(), 3
            )
        originals, copies = [*originals, *images][:GRID_COLUMNS], [*copies, *decoded][:GRID_COLUMNS]
        progress(len(psnr), len(reader.paths))
    save_image(
        enlarged_grid([originals, copies], labels=["original", "reconstruction"]), out / "grid.png"
    )
    mean = sum(psnr.values()) / len(psnr)
    report = {
        "tokenizer": fingerprint,
        "psnr": psnr,
        "mean_psnr": round(mean, 3),
        "broken": reader.broken,
    }
    write_json(out / "metrics.json", report)
    print(f"{reader.summary()}; mean PSNR {mean:.2f} dB; see {out}/grid.png and metrics.json")
    return 0


def encode(arguments: argparse.Namespace) -> int:
    """Write the codes of all readable images to one .npz: codes (M, N), names (M,), tokenizer, codebook_size."""
    import numpy as np
    import torch

    from vqrae.common.cli import progress_line
    from vqrae.common.files import atomic_path

    progress = progress_line("encode")
    if not arguments.out.endswith(".npz"):
        raise ValueError(f"--out: got {arguments.out}, expected a name that ends in .npz")
    model, fingerprint = _load_tokenizer(arguments)
    reader = ImageReader(arguments.images, model.config.image_size)
    kept: list[str] = []
    codes: list[Tensor] = []
    for names, images in reader:
        with torch.inference_mode():
            codes.append(model.encode(images.to(model.device)).cpu())
        kept += names
        progress(len(kept), len(reader.paths))
    size = model.config.codebook_size
    array = torch.cat(codes).numpy().astype(np.uint16 if size <= 1 << 16 else np.int32)
    with atomic_path(arguments.out) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(
            stream, codes=array, names=np.array(kept), tokenizer=fingerprint, codebook_size=size
        )
    print(f"{reader.summary()}; codes {array.shape} are in {arguments.out}")
    return 0


def decode(arguments: argparse.Namespace) -> None:
    """Write the images of an .npz that `encode` made with the same tokenizer."""
    import torch

    from vqrae.common.cli import progress_line
    from vqrae.common.files import require_same_tokenizer
    from vqrae.common.images import save_image, tensor_to_image

    progress = progress_line("decode")
    names, codes, made_with = _read_codes(arguments.codes)
    model, fingerprint = _load_tokenizer(arguments)
    require_same_tokenizer(fingerprint, made_with, arguments.codes)
    outputs = output_names(names)
    for start in range(0, len(names), BATCH_SIZE):
        with torch.inference_mode():
            images = model.decode(codes[start : start + BATCH_SIZE].to(model.device)).cpu()
        for name, image in zip(names[start:], images, strict=False):
            save_image(tensor_to_image(image), Path(arguments.out) / outputs[name])
        progress(min(start + BATCH_SIZE, len(names)), len(names))
    print(f"{len(names)} images are in {arguments.out}")


def codebook(arguments: argparse.Namespace) -> None:
    """Write a page and a sheet of what each code stands for."""
    from vqrae.eval.codebook.evaluate import write_report

    model, fingerprint = _load_tokenizer(arguments)
    reader = ImageReader(arguments.images, model.config.image_size)
    batches = (images for _, images in reader)
    text = write_report(
        model, batches, arguments.out, source=arguments.images, tokenizer=fingerprint
    )
    print(f"{reader.summary()}; {text}")


def _read_codes(path: str) -> tuple[list[str], "Tensor", str]:
    """Names, codes (M, N) int64 and tokenizer fingerprint of an .npz that `encode` wrote."""
    import zipfile

    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as stored:
            names, codes, fingerprint = (
                stored["names"].tolist(),
                stored["codes"].astype(np.int64),
                str(stored["tokenizer"]),
            )
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a file that `vqrae encode` wrote, or it is damaged: {error}"
        ) from error
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside or len(names) != len(codes):
        raise ValueError(
            f"{path} cannot be trusted: {len(names)} names, {len(codes)} codes, names outside: {outside[:3]}"
        )
    return names, torch.from_numpy(codes), fingerprint
