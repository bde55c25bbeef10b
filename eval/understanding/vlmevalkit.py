"""Score a grafted InternVL3 (or any image-text folder) with VLMEvalKit, as the paper does (B.3).

    git clone https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit
    python -m vqrae.eval.understanding.vlmevalkit root=VLMEvalKit model=runs/internvl3 output=OUT
    torchrun --nproc_per_node 8 -m vqrae.eval.understanding.vlmevalkit root=VLMEvalKit …

VLMEvalKit has no plug-ins: the model is entered into its table of models, then its own `run.py`
does the rest. Prompts and the number of tiles are those of its InternVL class, so that scores
compare with InternVL's. Written against VLMEvalKit at e8e78f05 (2026-08), whose `run.py` was run
with it."""

import os
import runpy
import sys
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from vqrae.common.checkpoints import local_model
from vqrae.common.cli import parse
from vqrae.common.distributed import is_main_process, world_size
from vqrae.common.errors import run_main
from vqrae.common.files import read_json, weights_fingerprint, write_json
from vqrae.common.images import open_image
from vqrae.common.run import hold_folder, run_manifest
from vqrae.understanding.chat import Chat

PAPER = ("MMBench_DEV_EN", "MME", "SEEDBench_IMG", "MMMU_DEV_VAL", "AI2D_TEST")


@dataclass(frozen=True, kw_only=True)
class VLMEvalKitConfig:
    """Score a model with VLMEvalKit."""

    root: str
    """Clone of VLMEvalKit, which is installed too."""
    model: str
    """Grafted InternVL3: folder or hub id."""
    output: str
    """VLMEvalKit's work folder; `manifest.json` goes there, too."""
    data: list[str] = field(default_factory=lambda: list(PAPER))
    """VLMEvalKit's names of the benchmarks; without OPENAI_API_KEY rules match the choices."""
    name: str = "vqrae"
    """What VLMEvalKit calls the model in its files."""
    max_new_tokens: int = 1024
    """Longest answer."""
    options: list[str] = field(default_factory=list)
    """Further options of run.py, such as [--reuse, --mode, infer]."""


def model_class() -> type:
    """A VLMEvalKit model: its InternVL class with our weights and generation; its prompts stay."""
    # By name: it comes from a clone and is not a dependency of ours.
    base = import_module("vlmeval.vlm.internvl").InternVLChat
    reorganize_prompt = import_module("vlmeval.vlm.internvl.utils").reorganize_prompt

    class VQRAEInternVL(base):  # type: ignore[misc, valid-type]
        """Prompts of `InternVLChat`, answers of `Chat`."""

        def __init__(self, model_path: str, max_new_tokens: int) -> None:
            # Its own constructor, without the weights that it would load: prompts need its
            # attributes.
            weights = {"AutoModel": mock.DEFAULT, "AutoTokenizer": mock.DEFAULT}
            with mock.patch.multiple(base.__module__, **weights):
                super().__init__(model_path, version="V2.0", max_new_tokens=max_new_tokens)
            self.model = self.tokenizer = None
            self.chat_model = Chat.from_pretrained(model_path, max_new_tokens=max_new_tokens)

        def chat(self, messages: Any, dataset: str | None = None) -> str:
            raise NotImplementedError(f"{dataset} has several turns, which are not offered")

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            """The answer to images (paths) and text."""
            paths = [part["value"] for part in message if part["type"] == "image"]
            self.set_max_num(dataset)
            image_processor = self.chat_model.processor.image_processor
            if hasattr(image_processor, "max_patches"):
                tiles = min(self.max_num, self.total_max_num // max(len(paths), 1))
                image_processor.max_patches = max(1, tiles)
            prompt = reorganize_prompt(message, len(paths), dataset=dataset)
            # As InternVL does where the prompt names no image.
            prompt = "<image>\n" * (len(paths) - prompt.count("<image>")) + prompt
            first, *others = prompt.split("<image>", len(paths))
            content = [{"type": "text", "text": first}] if first else []
            for i, text in enumerate(others):
                image = open_image(paths[i])
                if i == 0 and "MMMU" in (dataset or ""):
                    # As InternVLChat does: a larger image gets more tiles.
                    size = (2 * image.width, 2 * image.height)
                    image = image.resize(size, Image.Resampling.BILINEAR)
                content.append({"type": "image", "image": image})
                text = text.removeprefix("\n")  # the chat template has one after each image
                content += [{"type": "text", "text": text}] if text else []
            return self.chat_model.generate([[{"role": "user", "content": content}]])[0]

    return VQRAEInternVL


def failed_benchmarks(output: Path, name: str) -> dict[str, str]:
    """Benchmarks that failed in the newest run in VLMEvalKit's work folder, with the reason."""
    runs = sorted((output / name).glob("*/status.json"), key=lambda path: path.stat().st_mtime)
    benchmarks: dict[str, Any] = read_json(runs[-1]).get("datasets", {}) if runs else {}
    failed = {}
    for benchmark, found in benchmarks.items():
        if found.get("error_message"):
            failed[benchmark] = found["error_message"]
        elif found.get("skip_reason") == "invalid_dataset":
            failed[benchmark] = "unknown"
    return failed


def main(argv: list[str] | None = None) -> None:
    config = parse(VLMEvalKitConfig, argv)
    run, output = Path(config.root) / "run.py", Path(config.output).resolve()
    if not run.is_file():
        raise SystemExit(
            f"{run} does not exist: set root to a clone of github.com/open-compass/VLMEvalKit"
        )
    try:
        supported_models = import_module("vlmeval.config").supported_VLM
    except ImportError as error:
        raise SystemExit(
            f"VLMEvalKit cannot be imported ({error}): pip install -e {config.root}"
        ) from None
    folder = local_model(config.model)
    supported_models[config.name] = partial(
        model_class(), model_path=str(folder), max_new_tokens=config.max_new_tokens
    )
    hold_folder(output)
    if is_main_process():
        manifest = run_manifest(fingerprints={"model": weights_fingerprint(folder)})
        write_json(output / "manifest.json", manifest)
    if world_size() > 1 and torch.cuda.is_available():
        # run.py sets CUDA_VISIBLE_DEVICES for each process: too late where an import has asked for
        # CUDA.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    arguments = ["--model", config.name, "--data", *config.data, "--work-dir", str(output)]
    with mock.patch.object(sys, "argv", [str(run), *arguments, *config.options]):
        runpy.run_path(str(run), run_name="__main__")
    # run.py goes on after every error.
    if is_main_process() and (failed := failed_benchmarks(output, config.name)):
        raise SystemExit("\n".join(f"{name} failed: {reason}" for name, reason in failed.items()))


if __name__ == "__main__":
    run_main(main)
