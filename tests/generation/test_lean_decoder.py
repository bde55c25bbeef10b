"""One position at a time: the states of transformers' own forward pass, for each kind of layer."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vqrae.generation.decoding import CachedRows
from vqrae.generation.lean_decoder import has_plain_layers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 20}
SIZES |= {"num_attention_heads": 4, "initializer_range": 0.3, "pad_token_id": None}
PROMPTS = [(1, 2, 3), (4,), (1, 2, 3), (5, 6)]


def decoder_of(kind: str, **values: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES, **values)
    decoder = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    for name, weight in decoder.named_parameters():
        if weight.ndim == 1:  # norms and biases, which start as ones and zeros
            nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    return decoder


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 8}),
    ],
)
@torch.inference_mode()
def test_states_are_those_of_transformers(kind: str, values: dict[str, int]) -> None:
    """Prompts of different lengths, some equal; then three positions; then a second start."""
    decoder = decoder_of(kind, **values)
    assert has_plain_layers(decoder)
    vectors = torch.randn(3, 4, 32)
    found: list[Tensor] = []
    for lean in (True, False):
        rows = CachedRows(decoder, 4, 8)
        assert rows.lean is not None
        if not lean:
            rows.lean = None
        rows.prefill(PROMPTS)
        states = [rows.feed(each) for each in vectors]
        rows.restart()
        rows.prefill([(), (), (7,), ()])
        found.append(torch.stack([*states, rows.feed(vectors[0])]))
    assert found[1].std() > 0.3
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-5)


def test_other_layers_are_left_to_transformers() -> None:
    """Another architecture, an adapter around a layer, and a weight that ZeRO-3 has taken away."""
    assert not has_plain_layers(decoder_of("mixtral", num_key_value_heads=2))
    decoder = decoder_of("llama")
    attention = decoder.layers[1].self_attn
    plain, attention.q_proj = attention.q_proj, nn.Sequential(attention.q_proj)
    assert not has_plain_layers(decoder)
    attention.q_proj = plain
    attention.q_proj.weight = nn.Parameter(torch.empty(0))
    assert not has_plain_layers(decoder)
