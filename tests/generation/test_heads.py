"""Prediction heads and embeddings of several codes: UniTok's numbers, and one step at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from unitok_weights import (
    CODEBOOK_SIZE,
    GRID,
    LLAMA,
    NUM_CLASSES,
    NUM_CODEBOOKS,
    inputs,
    named_numbers,
)

from vqrae.common.distributed import FullPrecisionLinear
from vqrae.generation.embedding import TokenizerEmbedding
from vqrae.generation.heads import DepthHead
from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.multi_code import MultiCodeConfig, MultiCodeModel
from vqrae.generation.sampling import SamplingConfig, sample_codes
from vqrae.tokenizer.projections import AttentionProjection

WIDTH, BOOKS = LLAMA["hidden_size"], range(NUM_CODEBOOKS)
GREEDY = SamplingConfig(guidance_scale=1, temperature=0)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    path = Path(__file__).parent / "golden" / "unitok_heads.json"
    found = json.loads(path.read_text())
    return {name: torch.tensor(v) if "weights" not in name else v for name, v in found.items()}


def weight(name: str, *shape: int) -> Tensor:
    """What the published module has under that name."""
    return named_numbers(name, shape) + ("norm" in name and name.endswith("weight"))


def fill(module: nn.Module, names: dict[str, str]) -> None:
    """Give each weight of ours that of the published name that begins likewise."""
    for ours, parameter in module.named_parameters():
        theirs = ours
        for beginning, published in names.items():
            if ours.startswith(beginning):
                theirs = published + ours.removeprefix(beginning)
        parameter.data = weight(theirs, *parameter.shape)


# ---- against UniTok's code


@pytest.fixture
def head() -> DepthHead:
    config = LlamaConfig(**LLAMA, attn_implementation="eager")
    head = DepthHead(config, NUM_CODEBOOKS, CODEBOOK_SIZE).eval()
    fill(head, {"decoder.": "", "classifier.": "linear_head."})
    tables = [weight(f"codebooks.{i}.weight", CODEBOOK_SIZE, WIDTH) for i in BOOKS[:-1]]
    head.embedding.weight.data = torch.cat(tables)
    return head


@torch.no_grad()
def test_the_depth_head_is_that_of_unitok(head: DepthHead, golden: dict[str, Tensor]) -> None:
    given = inputs()
    logits = head(given["hidden"], given["codes"])
    torch.testing.assert_close(logits, golden["depth_logits"], atol=1e-5, rtol=1e-5)
    entropy = nn.functional.cross_entropy(
        golden["depth_logits"].flatten(0, 1), given["codes"].flatten()
    )
    drift = 5e-5 * golden["depth_logits"].max(-1).values.square().mean()
    torch.testing.assert_close(head.loss(given["hidden"], given["codes"]), entropy + drift)
    head.positions = False
    assert not torch.allclose(head(given["hidden"], given["codes"]), logits, atol=0.1)


def test_a_classifier_may_start_at_zero() -> None:
    llm = {**LLAMA, "model_type": "llama", "vocab_size": 8, "num_hidden_layers": 1}
    for zero_start in (False, True):
        head = {"num_layers": 1, "zero_start": zero_start}
        model = MultiCodeModel(MultiCodeConfig(llm_config=llm, head=head, codebook_size=16))
        assert model.head.classifier.weight.any() == (not zero_start)
        assert model.head.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("positions", [True, False])
def test_cached_sub_steps_equal_those_at_once(head: DepthHead, positions: bool) -> None:
    """The logits of every sub-step, for two rows that share their codes."""
    head.positions = positions
    hidden = inputs()["hidden"][:2]
    seen: list[Tensor] = []

    def draw(book: int, logits: Tensor) -> Tensor:
        assert book == len(seen)
        seen.append(logits)
        return (logits[:1] + 2 * logits[1:]).argmax(-1)

    codes = head.sample(hidden, draw)
    assert codes.shape == (1, NUM_CODEBOOKS)
    expected = head(hidden, codes.repeat(2, 1))
    torch.testing.assert_close(torch.stack(seen, dim=1), expected, atol=1e-5, rtol=1e-5)


PROJECTION = {
    "linear_norm.": "norm3.", "linear.": "proj.", "attention_norm.": "norm1.", "qkv.": "attn.qkv.",
    "q_bias": "attn.q_bias", "v_bias": "attn.v_bias", "attention_out.": "attn.proj.",
    "mlp_norm.": "norm2.", "mlp.gate.": "mlp.w0.", "mlp.up.": "mlp.w1.", "mlp.down.": "mlp.w2.",
    "mlp.norm.": "mlp.norm.",
}  # fmt: skip


@pytest.fixture
def embedding() -> TokenizerEmbedding:
    tables = [weight(f"quantizer.codebooks.{i}.codebook.weight", CODEBOOK_SIZE, 4) for i in BOOKS]
    vectors = nn.functional.normalize(torch.stack(tables), dim=-1)
    projection = AttentionProjection(16, 32, 4, causal=True)
    embedding = TokenizerEmbedding(vectors, projection, 32, WIDTH).eval()
    names = {f"projection.{ours}": f"attn_projection.{p}" for ours, p in PROJECTION.items()}
    fill(embedding, {**names, "mlp.": "mm_projector."})
    return embedding


@torch.no_grad()
def test_the_embedding_is_that_of_unitok_and_sees_no_later_code(
    embedding: TokenizerEmbedding, golden: dict[str, Tensor]
) -> None:
    codes = inputs()["images"]
    torch.testing.assert_close(embedding(codes), golden["embedding"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        embedding(codes[:, :4]), golden["embedding"][:, :4], atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_cached_vectors_equal_those_at_once(embedding: TokenizerEmbedding) -> None:
    codes = inputs()["images"]
    cache = embedding.start(len(codes), GRID**2)
    steps = [embedding(codes[:, i : i + 1], cache) for i in range(GRID**2)]
    torch.testing.assert_close(torch.cat(steps, dim=1), embedding(codes), atol=1e-5, rtol=1e-5)
    # What UniTok's own sampling feeds: each code without the others.
    alone = [embedding(codes[:, i : i + 1]) for i in range(GRID**2)]
    assert not torch.allclose(torch.cat(alone, dim=1), embedding(codes), atol=0.1)


@pytest.mark.parametrize(("code_dim", "names"), [(4, "joined"), (16, "added")])
def test_code_vectors_are_joined_or_added(code_dim: int, names: str) -> None:
    vectors = torch.randn(NUM_CODEBOOKS, CODEBOOK_SIZE, code_dim)
    embedding = TokenizerEmbedding(vectors, FullPrecisionLinear(16, 8), 8, WIDTH)
    codes = inputs()["images"]
    parts = [vectors[i][codes[..., i]] for i in BOOKS]
    expected = torch.cat(parts, dim=-1) if names == "joined" else torch.stack(parts).sum(0)
    torch.testing.assert_close(embedding.quantized(codes), expected)
    assert embedding.start(2, 9) is None


# ---- the class-conditional form


@pytest.fixture
def class_model(golden: dict[str, Any]) -> MultiCodeModel:
    """Ours with the weights of UniTok's LlamaGen."""
    model = MultiCodeModel._from_config(
        MultiCodeConfig(
            llm_config={
                **LLAMA, "model_type": "llama", "vocab_size": NUM_CLASSES + 1,
                "intermediate_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": True,
            },
            num_codebooks=NUM_CODEBOOKS,
            codebook_size=CODEBOOK_SIZE,
            head={"num_layers": 2, "positions": False, "z_loss": 0.0},
            grid_size=GRID,
        ),
        attn_implementation="sdpa",
    ).eval()  # fmt: skip
    shapes = golden["class_weights"]
    published = {name: weight(name, *shape) for name, shape in shapes.items()}
    classes = published.pop("cls_embedding.embedding_table.weight")
    model.llm.get_input_embeddings().weight.data[:NUM_CLASSES] = classes
    for ours, theirs, count in (
        (model.embedding.tables, "tok_embeddings", NUM_CODEBOOKS),
        (model.head.embedding, "output", NUM_CODEBOOKS - 1),
    ):
        names = [f"{theirs}.codebooks.{i}.weight" for i in range(count)]
        ours.weight.data = torch.cat([published.pop(name) for name in names])
    for decoder, prefix in ((model.llm.model, ""), (model.head.decoder, "output.")):
        decoder.norm.weight.data = published.pop(f"{prefix}norm.weight")
        for i, layer in enumerate(decoder.layers):
            place = f"{prefix}layers.{i}"
            query, key, value = published.pop(f"{place}.attention.wqkv.weight").chunk(3)
            attention, mlp = layer.self_attn, layer.mlp
            attention.q_proj.weight.data, attention.k_proj.weight.data = halves(query), halves(key)
            attention.v_proj.weight.data = value
            attention.o_proj.weight.data = published.pop(f"{place}.attention.wo.weight")
            names = {"w1": mlp.gate_proj, "w3": mlp.up_proj, "w2": mlp.down_proj}
            for name, ours in names.items():
                ours.weight.data = published.pop(f"{place}.feed_forward.{name}.weight")
            layer.input_layernorm.weight.data = published.pop(f"{place}.attention_norm.weight")
            layer.post_attention_layernorm.weight.data = published.pop(f"{place}.ffn_norm.weight")
    model.head.classifier.weight.data = published.pop("output.linear_head.weight")
    model.head.classifier.bias.data = published.pop("output.linear_head.bias")
    assert not published
    return model


def halves(rows: Tensor) -> Tensor:
    """LlamaGen turns channels 2 i and 2 i + 1 together, transformers i and i + half."""
    heads = LLAMA["num_attention_heads"]
    return rows.view(heads, -1, 2, WIDTH).transpose(1, 2).reshape(rows.shape)


@torch.no_grad()
def test_the_class_conditional_model_is_that_of_llamagen(
    class_model: MultiCodeModel, golden: dict[str, Any]
) -> None:
    given = inputs()
    places = torch.arange(GRID**2 + 1).expand(2, -1)
    batch = {"attention_mask": torch.ones_like(places), "position_ids": places}
    loss = class_model(given["classes"][:, None], codes=given["images"], **batch).loss
    torch.testing.assert_close(loss, golden["class_loss"], atol=1e-5, rtol=1e-5)
    vocabulary = VisualVocabulary(
        offset=NUM_CLASSES + 1,
        codebook_size=CODEBOOK_SIZE,
        num_codes=GRID**2,
        num_codebooks=NUM_CODEBOOKS,
        num_classes=NUM_CLASSES,
    )
    prompts = given["classes"][:, None].tolist()
    codes = sample_codes(class_model, prompts, [NUM_CLASSES], vocabulary, GREEDY, [0, 0])
    assert torch.equal(codes, golden["class_greedy"].long())
