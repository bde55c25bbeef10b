"""The `vqrae` command: a trained model at work on pictures, questions and prompts.

Heavy imports stay inside the commands, so that `vqrae --help` answers at once.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vqrae.tokenizer import VQRAEModel

BATCH_SIZE = 32
GRID_COLUMNS, GRID_ROWS = 16, 32


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 when `check-data` found a problem, 2 for a mistake in the call."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (ValueError, OSError) as error:
        print(f"vqrae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqrae",
        description="One visual tokenizer: reconstruct, encode, chat, generate. `vqrae COMMAND --help` lists the options.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str, model: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        command.add_argument("--model", required=True, help=f"{model}: run directory, model folder or hub id")
        command.add_argument("--device", help="cpu, cuda, … (default: cuda when there is one)")
        return command

    command = add("reconstruct", reconstruct, "encode pictures to codes and back, and measure the loss", "tokenizer")
    command.add_argument("--images", required=True, help="a picture, or a folder of pictures of any size and mode")
    command.add_argument("--out", required=True, help="folder for NAME.png (original | reconstruction), grid.png, metrics.json")

    command = add("encode", encode, "turn pictures into codes", "tokenizer")
    command.add_argument("--images", required=True, help="a picture, or a folder of pictures of any size and mode")
    command.add_argument("--out", required=True, help="FILE.npz for codes, names and the tokenizer's fingerprint")

    command = add("decode", decode, "turn codes into pictures", "tokenizer")
    command.add_argument("--codes", required=True, help="FILE.npz written by encode")
    command.add_argument("--out", required=True, help="folder for the pictures")

    command = add("chat", chat, "ask about pictures", "understanding model")
    command.add_argument("--image", action="append", default=[], help="a picture; may be given several times")
    command.add_argument("--question", help="ask once; without it, ask interactively")
    command.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")

    command = add("generate", generate, "draw pictures from prompts", "generator")
    command.add_argument("--prompt", action="append", default=[], help="may be given several times")
    command.add_argument("--prompts-file", help="a text file with one prompt per line")
    command.add_argument("--num-images", type=int, default=4, help="pictures per prompt (default: %(default)s)")
    command.add_argument("--out", required=True, help="folder for the pictures, a JSON side-car for each, and grid.png")
    command.add_argument("--tokenizer", help="the visual tokenizer, where it has moved since training")
    command.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt (default: %(default)s)")
    for option, kind in {"guidance-scale": float, "temperature": float, "top-k": int, "top-p": float, "min-p": float}.items():
        command.add_argument(f"--{option}", type=kind, help="sampling; see vqrae.generation.sampling for the default")

    command = commands.add_parser(
        "check-data", help="read a whole data source before training on it", description=check_data.__doc__
    )
    command.set_defaults(run=check_data)
    command.add_argument(
        "source", help="scenes, emoji, a folder, FILE.jsonl, FILE.tar (or a glob), hf:NAME, FILE.json, a mixture"
    )
    command.add_argument("--image-folder", help="where the pictures of a FILE.json lie (default: beside it)")
    command.add_argument("--limit", type=int, help="read so many samples, evenly spread (default: all)")
    command.add_argument("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    command.add_argument("--json", metavar="FILE", help="write the whole report there, too")
    return parser


# ---- pictures in, codes between, pictures out


def _load_tokenizer(arguments: argparse.Namespace) -> tuple["VQRAEModel", str]:
    """The tokenizer and its fingerprint."""
    from vqrae.common.checkpoints import local_model
    from vqrae.common.files import read_json, weights_fingerprint
    from vqrae.tokenizer import VQRAEModel

    _quiet()
    folder = local_model(arguments.model)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "vqrae":
        raise ValueError(f"{folder} holds a {config.get('model_type')} model, expected a tokenizer (model_type vqrae)")
    model = VQRAEModel.from_pretrained(folder).eval().to(_device(arguments))
    return model, weights_fingerprint(folder)


def _quiet() -> None:
    """No progress bars of weights that load in a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _device(arguments: argparse.Namespace) -> str:
    import torch

    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


class PictureReader:
    """Batches of the readable pictures of a file or folder; broken ones are reported, remembered and left out."""

    def __init__(self, source: str, image_size: int) -> None:
        from vqrae.data.images import list_pictures

        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist: give a picture or a folder of pictures")
        root = path if path.is_dir() else path.parent
        self.paths = {p.relative_to(root).as_posix(): p for p in (list_pictures(path) if path.is_dir() else [path])}
        self.image_size = image_size
        self.broken: list[str] = []

    def __iter__(self) -> Iterator[tuple[list[str], "Tensor"]]:
        """Yield (names relative to the source, images (B, 3, H, W) in [0, 1])."""
        import torch

        from vqrae.common.pictures import open_picture, picture_to_tensor, resize_and_crop

        batch: dict[str, Tensor] = {}
        for name, path in self.paths.items():
            try:
                batch[name] = picture_to_tensor(resize_and_crop(open_picture(path), self.image_size))
            except ValueError as error:
                print(f"vqrae: skipped {error}", file=sys.stderr)
                self.broken.append(name)
            if len(batch) == BATCH_SIZE:
                yield list(batch), torch.stack(list(batch.values()))
                batch = {}
        if batch:
            yield list(batch), torch.stack(list(batch.values()))
        if len(self.broken) == len(self.paths):
            raise ValueError(f"none of the {len(self.paths)} pictures could be read")

    def summary(self) -> str:
        """How many pictures were read."""
        return f"{len(self.paths) - len(self.broken)} pictures, {len(self.broken)} broken and skipped"


def _output_names(names: Sequence[str]) -> dict[str, str]:
    """A PNG name below the output folder for each input: `a/b.jpg` -> `a/b.png`, or `a/b.jpg.png` where two would meet."""
    stems = Counter(str(Path(name).with_suffix("")) for name in names)
    return {name: f"{name if stems[stem] > 1 else stem}.png" for name in names for stem in [str(Path(name).with_suffix(""))]}


def reconstruct(arguments: argparse.Namespace) -> int:
    """Write original and reconstruction side by side for each picture, a grid of the first ones, and PSNR per file."""
    import torch

    from vqrae.common.cli import progress_line
    from vqrae.common.files import write_json
    from vqrae.common.pictures import picture_grid, save_picture

    progress = progress_line("reconstruct")
    model, fingerprint = _load_tokenizer(arguments)
    reader = PictureReader(arguments.images, model.config.image_size)
    outputs = _output_names(list(reader.paths))
    out, psnr = Path(arguments.out), {}
    originals: list[Tensor] = []
    copies: list[Tensor] = []
    for names, images in reader:
        with torch.inference_mode():
            decoded = model.decode(model.encode(images.to(model.device))).cpu()
        if decoded.shape != images.shape:
            decoded = torch.nn.functional.interpolate(decoded, images.shape[-2:], mode="bilinear", antialias=True)
        for name, image, copy in zip(names, images, decoded, strict=True):
            save_picture(picture_grid([[image, copy]], scale=1), out / outputs[name])
            psnr[name] = round(-10 * (image - copy).square().mean().clamp(min=1e-10).log10().item(), 3)
        originals, copies = [*originals, *images][:GRID_COLUMNS], [*copies, *decoded][:GRID_COLUMNS]
        progress(len(psnr), len(reader.paths))
    save_picture(_grid([originals, copies], labels=["original", "reconstruction"]), out / "grid.png")
    mean = sum(psnr.values()) / len(psnr)
    report = {"tokenizer": fingerprint, "psnr": psnr, "mean_psnr": round(mean, 3), "broken": reader.broken}
    write_json(out / "metrics.json", report)
    print(f"{reader.summary()}; mean PSNR {mean:.2f} dB; see {out}/grid.png and metrics.json")
    return 0


def encode(arguments: argparse.Namespace) -> int:
    """Write the codes of all readable pictures to one .npz: codes (M, N), names (M,), tokenizer, codebook_size."""
    import numpy as np
    import torch

    from vqrae.common.cli import progress_line
    from vqrae.common.files import atomic_path

    progress = progress_line("encode")
    if not arguments.out.endswith(".npz"):
        raise ValueError(f"--out: got {arguments.out}, expected a name that ends in .npz")
    model, fingerprint = _load_tokenizer(arguments)
    reader = PictureReader(arguments.images, model.config.image_size)
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
        np.savez_compressed(stream, codes=array, names=np.array(kept), tokenizer=fingerprint, codebook_size=size)
    print(f"{reader.summary()}; codes {array.shape} are in {arguments.out}")
    return 0


def decode(arguments: argparse.Namespace) -> None:
    """Write the pictures of an .npz that `encode` made with the same tokenizer."""
    import torch

    from vqrae.common.cli import progress_line
    from vqrae.common.files import require_same_tokenizer
    from vqrae.common.pictures import save_picture, tensor_to_picture

    progress = progress_line("decode")
    names, codes, made_with = _read_codes(arguments.codes)
    model, fingerprint = _load_tokenizer(arguments)
    require_same_tokenizer(fingerprint, made_with, arguments.codes)
    outputs = _output_names(names)
    for start in range(0, len(names), BATCH_SIZE):
        with torch.inference_mode():
            images = model.decode(codes[start : start + BATCH_SIZE].to(model.device)).cpu()
        for name, image in zip(names[start:], images, strict=False):
            save_picture(tensor_to_picture(image), Path(arguments.out) / outputs[name])
        progress(min(start + BATCH_SIZE, len(names)), len(names))
    print(f"{len(names)} pictures are in {arguments.out}")


def _read_codes(path: str) -> tuple[list[str], "Tensor", str]:
    """Names, codes (M, N) int64 and tokenizer fingerprint of an .npz that `encode` wrote."""
    import zipfile

    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as stored:
            names, codes, fingerprint = stored["names"].tolist(), stored["codes"].astype(np.int64), str(stored["tokenizer"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not a file that `vqrae encode` wrote, or it is damaged: {error}") from error
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside or len(names) != len(codes):
        raise ValueError(f"{path} cannot be trusted: {len(names)} names, {len(codes)} codes, names outside: {outside[:3]}")
    return names, torch.from_numpy(codes), fingerprint


# ---- language


def chat(arguments: argparse.Namespace) -> None:
    """Answer one question, or talk until the input ends."""
    from vqrae.common.pictures import open_picture
    from vqrae.understanding.chat import Chat

    _quiet()
    pictures = [open_picture(path) for path in arguments.image]
    model = Chat.from_pretrained(arguments.model, device=arguments.device, max_new_tokens=arguments.max_new_tokens)
    if arguments.question:
        print(model.answer([(pictures, arguments.question)])[0])
        return
    print("Ask about the picture. `/image FILE` shows another one, an empty line ends.")
    session = model.session()
    while line := _ask():
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                pictures.append(open_picture(rest.strip()))
                continue
            print(session.ask(line, pictures))
            pictures = []  # the session remembers them
        except ValueError as error:
            print(f"vqrae: {error}", file=sys.stderr)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def generate(arguments: argparse.Namespace) -> None:
    """Draw `--num-images` pictures of each prompt, each with a JSON side-car that says how to draw it again."""
    from vqrae.common.cli import progress_line
    from vqrae.common.files import write_json
    from vqrae.common.pictures import save_picture, tensor_to_picture
    from vqrae.generation.generator import Generator
    from vqrae.generation.sampling import SamplingConfig

    progress = progress_line("generate")
    prompts = _read_prompts(arguments)
    given = {name: getattr(arguments, name) for name in ("guidance_scale", "temperature", "top_k", "top_p", "min_p")}
    sampling = SamplingConfig(**{name: value for name, value in given.items() if value is not None})
    _quiet()
    generator = Generator.from_pretrained(arguments.model, tokenizer=arguments.tokenizer, device=arguments.device)
    fingerprint = generator.model.config.vqrae_tokenizer_fingerprint
    jobs = [(i, prompt, arguments.seed + j) for i, prompt in enumerate(prompts) for j in range(arguments.num_images)]
    out = Path(arguments.out)
    rows: dict[int, list[Tensor]] = {i: [] for i in range(min(len(prompts), GRID_ROWS))}
    for start in range(0, len(jobs), BATCH_SIZE):
        batch = jobs[start : start + BATCH_SIZE]
        images = generator.images([prompt for _, prompt, _ in batch], seeds=[seed for *_, seed in batch], sampling=sampling)
        for (i, prompt, seed), image in zip(batch, images, strict=True):
            name = f"{i:04d}-{seed}"
            save_picture(tensor_to_picture(image), out / f"{name}.png")
            record = {"prompt": prompt, "seed": seed, "sampling": asdict(sampling), "generator": arguments.model}
            write_json(out / f"{name}.json", record | {"tokenizer": fingerprint})
            if i in rows and len(rows[i]) < GRID_COLUMNS:
                rows[i].append(image)
        progress(start + len(batch), len(jobs))
    save_picture(_grid(list(rows.values()), labels=prompts[: len(rows)]), out / "grid.png")
    print(f"{len(jobs)} pictures are in {out}; see grid.png")


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file:
        text = Path(arguments.prompts_file).read_text(encoding="utf-8")
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE with one prompt per line")
    if arguments.num_images < 1:
        raise ValueError(f"--num-images: got {arguments.num_images}, expected at least 1")
    return prompts


# ---- data


def check_data(arguments: argparse.Namespace) -> int:
    """Read a source before training on it: sizes, broken and missing pictures, captions, duplicates. Exit code 1: problems."""
    from vqrae.common.cli import progress_line
    from vqrae.common.files import write_json
    from vqrae.data.checks import check_source
    from vqrae.data.mixture import parse_mixture

    if min(arguments.limit or 1, arguments.workers + 1) < 1:
        raise ValueError(f"got --limit {arguments.limit} --workers {arguments.workers}, expected positive numbers")
    reports = []
    for source in [name for name, _ in parse_mixture(arguments.source)] or [arguments.source]:
        progress = progress_line("check-data")
        options = {"image_folder": arguments.image_folder, "limit": arguments.limit, "workers": arguments.workers}
        reports.append(check_source(source, progress=progress, **options))
        print(reports[-1].text())
    if arguments.json:
        write_json(arguments.json, [asdict(report) for report in reports])
    return 1 if any(report.problems for report in reports) else 0


def _grid(rows: list[list["Tensor"]], labels: Sequence[str]) -> "Image":
    """A picture grid whose small images are enlarged."""
    from vqrae.common.pictures import picture_grid

    return picture_grid(rows, labels=labels, scale=max(1, 128 // rows[0][0].shape[-1]))


if __name__ == "__main__":
    sys.exit(main())
