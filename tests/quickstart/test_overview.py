"""The drawing of the whole system, drawn of any image, codes and words."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

from vqrae.quickstart.overview import Overview, as_colors, first_codes, render

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def overview() -> Overview:
    image = torch.rand(3, 16, 16)
    return Overview(
        image=image,
        features=torch.rand(3, 4, 4),
        codes=list(range(16)),
        reconstruction=(image + 0.1).clamp(max=1),
        question="is a < b & what is <c> ?",
        answer="no",
        prompt="a photo of a very long list of things that needs more than one line",
        written=list(range(16, 32)),
        generated=torch.rand(3, 16, 16),
    )


def test_the_drawing_is_whole(overview: Overview) -> None:
    root = ET.fromstring(render(overview))  # a `<` that is not escaped would be an error here
    images = [image.get("href", "") for image in root.iter(f"{SVG}image")]
    assert len(images) == 4
    assert all(uri.startswith("data:image/png;base64,") for uri in images)
    texts = ["".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")]
    assert {str(code) for code in range(32)} <= set(texts)
    assert "is a < b & what is <c> ?".replace(" ", "") in {text.replace(" ", "") for text in texts}
    assert f"from the codes alone, {overview.psnr:.1f} dB" in texts


def test_long_lists_of_codes_are_colours_alone(overview: Overview) -> None:
    root = ET.fromstring(render(replace(overview, codes=list(range(1000, 1256)))))
    texts = ["".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")]
    assert "1000" not in texts


def test_features_become_colours() -> None:
    features = torch.randn(16, 8) * torch.tensor([9.0, 3, 2, 1, 1, 1, 1, 1])
    colors = as_colors(features)
    assert colors.shape == (3, 4, 4)
    assert colors.amin(dim=(1, 2)).tolist() == [0, 0, 0]
    assert torch.allclose(colors.amax(dim=(1, 2)), torch.ones(3))
    main = torch.stack([colors[0].flatten(), features[:, 0]])
    assert torch.corrcoef(main)[0, 1].abs() > 0.95


def test_of_several_codebooks_the_first_is_shown() -> None:
    assert first_codes(torch.tensor([[1, 2, 3]])) == [1, 2, 3]
    assert first_codes(torch.tensor([[[1, 7], [2, 8], [3, 9]]])) == [1, 2, 3]
