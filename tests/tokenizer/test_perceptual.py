"""Perceptual losses against references: values, gradients, and weights that cannot be reached."""

import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import lpips as reference
import pytest
import torch
from tokenizer_trainings import read
from torch import Tensor, nn
from torchvision.models import convnext_small, vgg16
from torchvision.transforms.v2.functional import normalize

from vqrae.common.config import ConfigError
from vqrae.tokenizer import perceptual
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.perceptual import LPIPS, build_perceptual


@pytest.fixture(scope="module")
def vgg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random VGG16 weights under torchvision's name, with a classifier that LPIPS ignores."""
    torch.manual_seed(0)
    with torch.device("meta"):
        layers = vgg16().features
    layers.to_empty(device="cpu")
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    folder = tmp_path_factory.mktemp("weights")
    state = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, folder / "vgg16-397923af.pth")
    return folder


@pytest.fixture(scope="module")
def lpips(vgg_folder: Path) -> nn.Module:
    return build_perceptual("lpips", folder=str(vgg_folder))


def random_images(size: int = 64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images = torch.rand(2, 3, size, size)
    return (images + 0.1 * torch.randn_like(images)).requires_grad_(), images


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_is_that_of_its_package(backbone: Literal["vgg", "alex"]) -> None:
    """Random layers; the heads are trained, and each package has its own copy of them."""
    torch.manual_seed(0)
    ours = LPIPS(backbone)
    ours.load_backbone(ours.state_dict())
    with torch.device("meta"):  # the classifier is not needed, and slow to initialise
        theirs = reference.LPIPS(net=backbone, pnet_rand=True, pretrained=False, verbose=False)
    theirs.to_empty(device="cpu").eval()
    heads = Path(reference.__file__).parent / "weights" / "v0.1" / f"{backbone}.pth"
    theirs.load_state_dict(torch.load(heads, map_location="cpu", weights_only=True), strict=False)
    theirs.scaling_layer = reference.ScalingLayer()
    layers = {key: value for part in theirs.net.children() for key, value in part.named_children()}
    for key, layer in ours.features.named_children():
        layers[key].load_state_dict(layer.state_dict())
    reconstruction, images = random_images()
    expected = theirs(reconstruction, images, normalize=True).flatten()
    torch.testing.assert_close(ours.per_image(reconstruction, images), expected)
    found = ours(reconstruction, images)
    torch.testing.assert_close(found, expected.mean())
    (gradient,) = torch.autograd.grad(found, reconstruction)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.mean(), reconstruction)[0])


def test_convnext_compares_logits_at_224() -> None:
    loss = build_perceptual("convnext_s", random=True)
    torch.manual_seed(0)
    network = convnext_small().eval()
    for layer in network.modules():
        if hasattr(layer, "layer_scale"):
            layer.layer_scale.data.fill_(
                0.5
            )  # at its start of 1e-6 the blocks would hardly be seen
    loss.network.load_state_dict(network.state_dict())
    reconstruction, images = (x[:1] for x in random_images(96))

    def logits(x: Tensor) -> Tensor:
        x = nn.functional.interpolate(
            x, (224, 224), mode="bilinear", antialias=True, align_corners=False
        )
        return network(normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    with torch.no_grad():
        expected = (logits(reconstruction) - logits(images)).square().sum() / 1000
    found = loss(reconstruction, images)
    torch.testing.assert_close(found, expected)
    assert loss(images, images) == 0


def test_published_mix_is_one_lpips_and_a_tenth_of_the_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perceptual.LPIPS, "forward", lambda self, x, y: 3 * (x - y).mean())
    monkeypatch.setattr(perceptual.ConvNeXtLogits, "forward", lambda self, x, y: 5 * (x - y).mean())
    reconstruction, images = random_images()
    mixed = build_perceptual("lpips+convnext_s", (1.0, 0.1), random=True)(reconstruction, images)
    error = (reconstruction - images).mean()
    torch.testing.assert_close(1.1 * mixed, 1.0 * 3 * error + 0.1 * 5 * error)


@pytest.mark.parametrize(
    ("network", "mix"),
    [("lpips+convnext_s", "[]"), ("lpips+convnext_s", "[1.0]"), ("lpips", "[1.0]")],
)
def test_a_mix_has_one_weight_for_each_network(network: str, mix: str) -> None:
    with pytest.raises(ConfigError, match="give one weight for each of several networks"):
        read("tiny", f"stage1.perceptual_network={network}", f"stage1.perceptual_mix={mix}")


def test_gradient_reaches_only_the_reconstruction(
    lpips: LPIPS, make_tokenizer: Callable[..., VQRAEModel]
) -> None:
    model = make_tokenizer()
    encoder = build_perceptual("encoder", teacher=model.encoder, normalize=model.normalize)
    for loss in (lpips, encoder):
        reconstruction, images = random_images()
        images.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(reconstruction, images)
        assert found.dtype == torch.float32
        if loss is lpips:  # which leaves autocast
            assert torch.equal(found, lpips(reconstruction, images))
        found.backward()
        assert reconstruction.grad.abs().sum() > 0
        assert images.grad is None
        assert not any(parameter.requires_grad for parameter in loss.parameters())
        assert not any(module.training for module in loss.modules())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Neither a cache nor a way out; returns where torch would keep its weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    # `urlopen` keeps the first proxies that it sees: what follows in this process has its own.
    monkeypatch.setattr(urllib.request, "_opener", None)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_unreachable_weights_are_an_error_that_helps(no_network: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        build_perceptual("convnext_s")
    file = "convnext_small-0c510722.pth"
    for part in (f"https://download.pytorch.org/models/{file}", str(no_network / file)):
        assert part in str(error.value)
    for setting in ("perceptual_weights=FOLDER", "random_perceptual_weights=true"):
        assert setting in str(error.value)


def test_damaged_weights_are_named(vgg_folder: Path, tmp_path: Path) -> None:
    whole = (vgg_folder / "vgg16-397923af.pth").read_bytes()
    (tmp_path / "vgg16-397923af.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth cannot be read"):
        build_perceptual("lpips", folder=str(tmp_path))
