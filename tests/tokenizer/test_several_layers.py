"""Features of several layers: fused before the quantizer, or predicted from what it gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizer_trainings as trainings
import torch
from transformers import AutoModel

from vqrae.common.config import ConfigError
from vqrae.tokenizer.codebook import initialize_codebook, standardize_features
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.losses import AlignmentHeads
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.vision_tower import VQRAEFeatures, tower_config

# Stage 2 alone and little of it, where clipping does not round what is divided by the norm.
QUICK = ["stage1.max_steps=0", "stage2.max_steps=2", "stage2.max_grad_norm=1e9", "save_steps=9"]
QUICK += ["stage2.perceptual_weight=0", "stage2.adversarial_weight=0", "ema_decay=0"]


@torch.no_grad()
def test_layers_are_the_encoders_hidden_states(tokenizer: VQRAEModel) -> None:
    encoder, size = tokenizer.encoder, tokenizer.config.image_size
    pixel_values = torch.randn(2, 3, size, size)
    found = encoder_features(encoder, pixel_values, "last_hidden_state", [1, 0, -1])
    states = encoder(pixel_values, output_hidden_states=True)
    expected = [states.last_hidden_state, *(states.hidden_states[i] for i in (1, 0, -1))]
    torch.testing.assert_close(found, torch.cat(expected, -1)[:, -found.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("norm", ["standardize", "layernorm"])
def test_the_quantizer_reads_layers_and_the_features_stay(
    norm: str, make_tokenizer: Callable[..., VQRAEModel], tmp_path: Path
) -> None:
    model = make_tokenizer("internvit", fused_layers=[0, -2], feature_norm=norm)
    plain = make_tokenizer("internvit", feature_norm=norm)
    plain.encoder.load_state_dict(model.encoder.state_dict())
    images = trainings.random_images(4, model.config.image_size)
    if norm == "standardize":
        standardize_features(model, images)
    initialize_codebook(model, images)
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for loaded in (model, reloaded):
        output = loaded(images)
        assert torch.equal(loaded.decode(loaded.encode(images)), output.reconstruction)
        for features in (loaded.encode_features(images), output.features):
            torch.testing.assert_close(features, plain.encode_features(images))
    if norm == "layernorm":  # of each layer by itself, whatever the size of another
        scale = torch.tensor([1.0, 5.0, 9.0]).repeat_interleave(32)
        projected = [model.project(output.fused * factor) for factor in (1, scale)]
        torch.testing.assert_close(*projected, atol=1e-3, rtol=0)
    tower = VQRAEFeatures.from_pretrained(
        tmp_path, config=tower_config(loaded.config, "quantized"), attn_implementation="eager"
    )
    states = tower(loaded.normalize(images)).hidden_states[-1]
    torch.testing.assert_close(states, loaded.quantized_features(images))
    with pytest.raises(ValueError, match=r"width 32, expected 96: those of encode_fused"):
        model.choose_codes(output.features)


def test_shallow_layers_get_a_gradient_of_their_own(
    make_tokenizer: Callable[..., VQRAEModel],
) -> None:
    model = make_tokenizer(fused_layers=[0]).train()
    with torch.no_grad():
        model.in_proj.weight[:, : model.config.feature_dim] = 0  # only the fused layer is read
    images = trainings.random_images(2, model.config.image_size)
    model(images).reconstruction.square().mean().backward()
    embeddings, *blocks = model.encoder.embeddings.parameters(), model.encoder.encoder.parameters()
    assert all(parameter.grad.abs().sum() > 0 for parameter in embeddings)
    assert not any(parameter.grad.abs().sum() > 0 for part in blocks for parameter in part)


def test_the_alignment_loss_by_hand() -> None:
    torch.manual_seed(0)
    heads = AlignmentHeads([3, -1], 8)
    quantized, first, second = torch.randn(3, 2, 5, 8).unbind()
    found = heads(quantized, [first, 100 * second])
    expected = 0.0
    for head, target in zip(heads, (first, second), strict=True):
        centred = target - target.mean(-1, keepdim=True)
        target = centred / centred.square().mean(-1, keepdim=True).sqrt()
        expected += (quantized @ head.weight.T + head.bias - target).square().mean() / 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert list(AlignmentHeads([], 8).parameters()) == []


def test_off_is_what_was_before(tmp_path: Path) -> None:
    """A loss of no weight changes no weight: heads take no random number of anything else."""
    none = ["stage2.alignment_weight=0", "stage2.alignment_layers=[]"]
    found = trainings.train(tmp_path / "on", *QUICK, "stage2.alignment_weight=1e-30")
    assert trainings.equal(found, trainings.train(tmp_path / "off", *QUICK, *none))
    rows = [trainings.metrics(tmp_path / name, 2) for name in ("off", "on")]
    for off, on in zip(*rows, strict=True):
        assert on.pop("alignment_loss") == pytest.approx(1, abs=0.1)
        assert off == pytest.approx(on, rel=1e-6)  # the norm of gradients sums in another order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stage2.alignment_layers=[]"], "give both or none"),
        (["stage2.alignment_weight=0"], "give both or none"),
        (["stage2.alignment_layers=[0, 3]"], r"\[0, 3\], expected different ones from 0.* to 2"),
        (["stage2.alignment_layers=[2, -1]"], "expected different ones"),
        (["model.fused_layers=[-1]"], r"expected layers before the last.*0 to 1"),
    ],
)
def test_mistakes_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        trainings.train(tmp_path, *options)
    assert not list(tmp_path.glob("stage1/step-*"))
