"""The whole system in one drawing: an image, its features and codes, an answer, and the way back.

    python -m vqrae.quickstart.overview directory=runs/quickstart output=docs/overview.svg

Everything in it is what the models of a quickstart run put out; the template overview.svg.jinja
draws it in the colours of the report, in light and dark.
"""

from dataclasses import dataclass
from importlib import resources

import jinja2
import torch
from torch import Tensor

from vqrae.common.cli import parse
from vqrae.common.errors import run_main
from vqrae.common.files import write_text
from vqrae.common.images import data_uri, tensor_to_image
from vqrae.common.run import quiet_libraries
from vqrae.generation.generator import Generator
from vqrae.generation.sampling import sample_codes
from vqrae.quickstart.evidence import read_evidence
from vqrae.understanding.chat import Chat


@dataclass(frozen=True, kw_only=True)
class OverviewConfig:
    """Draw what the models of a quickstart run make of one scene and one prompt."""

    directory: str = "runs/quickstart"
    """The run's folder."""
    output: str = "docs/overview.svg"
    """The drawing, an SVG."""
    scene: int = 2
    """Index of a validation scene."""
    question: str = "what color is the heart ?"
    """About the scene."""
    prompt: str = "a photo of a red circle left of a blue star"
    """For the generator."""
    seed: int = 7
    """Of the generated image."""


@dataclass(frozen=True)
class Overview:
    """What the drawing shows; images (3, H, W) in [0, 1], codes (N,) row by row."""

    image: Tensor
    features: Tensor
    """Three principal components of the features as colours, (3, h, w)."""
    codes: list[int]
    reconstruction: Tensor
    question: str
    answer: str
    prompt: str
    written: list[int]
    """The codes that the generator wrote for the prompt."""
    generated: Tensor

    @property
    def psnr(self) -> float:
        """Decibels of the reconstruction."""
        error = (self.image - self.reconstruction).square().mean().clamp(min=1e-10)
        return float(-10 * error.log10())


@torch.inference_mode()
def make_overview(config: OverviewConfig) -> Overview:
    """Run the three models of a quickstart.

    Raises:
        FileNotFoundError: when one of them has not been trained.
        ValueError: when the folder holds no quickstart run.
    """
    evidence = read_evidence(config.directory)
    generator = Generator.from_pretrained(
        evidence.directory / "generation", tokenizer=evidence.directory / "tokenizer"
    )
    chat = Chat.from_pretrained(evidence.directory / "understanding", dtype=torch.float32)
    tokenizer, encode_prompt = generator.tokenizer, generator.encode_prompt
    images = evidence.scenes.image(config.scene)[None].to(tokenizer.device).float() / 255
    codes = tokenizer.encode(images)
    written = sample_codes(
        generator.model,
        [encode_prompt(config.prompt)],
        encode_prompt.unconditional,
        encode_prompt.vocabulary,
        generator.sampling,
        [config.seed],
    ).to(tokenizer.device)
    return Overview(
        image=images[0].cpu(),
        features=as_colors(tokenizer.encode_features(images)[0]).cpu(),
        codes=first_codes(codes),
        reconstruction=tokenizer.decode(codes)[0].cpu(),
        question=config.question,
        answer=chat.answer([(tensor_to_image(images[0]), config.question)])[0],
        prompt=config.prompt,
        written=first_codes(written),
        generated=tokenizer.decode(written)[0].cpu(),
    )


def as_colors(features_ND: Tensor) -> Tensor:
    """The three main directions of the features of a square grid as red, green, blue: (3, h, w)."""
    centered = features_ND.float() - features_ND.float().mean(dim=0)
    _, _, directions_DD = torch.linalg.svd(centered, full_matrices=False)
    values = centered @ directions_DD[:3].T
    low, high = values.amin(dim=0), values.amax(dim=0)
    side = round(len(values) ** 0.5)
    return ((values - low) / (high - low).clamp(min=1e-6)).T.reshape(3, side, side)


def first_codes(codes: Tensor) -> list[int]:
    """The codes of one image, (1, N) or (1, N, n); of several codebooks the first."""
    return codes[0].reshape(codes.shape[1], -1)[:, 0].tolist()


def render(overview: Overview) -> str:
    """The drawing as SVG, with everything that it needs inside."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["uri"] = data_uri
    template = resources.files("vqrae.quickstart") / "overview.svg.jinja"
    return environment.from_string(template.read_text(encoding="utf-8")).render(it=overview)


def main(argv: list[str] | None = None) -> None:
    """Command line: key=value …"""
    config = parse(OverviewConfig, argv)
    quiet_libraries()
    overview = make_overview(config)
    write_text(config.output, render(overview))
    print(f"{config.output}: {overview.psnr:.1f} dB, answer {overview.answer!r}")


if __name__ == "__main__":
    run_main(main)
