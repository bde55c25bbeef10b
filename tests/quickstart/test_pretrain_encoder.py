import math
from pathlib import Path

import pytest
import torch
from transformers import SiglipModel

from vqrae.common.trainer import OptimizationConfig
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.scenes.sprites import load_sprites
from vqrae.data.word_tokenizer import END, build_word_tokenizer
from vqrae.quickstart import pretrain_encoder
from vqrae.quickstart.pretrain_encoder import (
    EncoderPretrainingConfig,
    GroundedCollator,
    GroundedSiglip,
    build_siglip,
)

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def collator() -> GroundedCollator:
    text_tokenizer = build_word_tokenizer(vocabulary_texts(load_sprites().names), end_with=END)
    return GroundedCollator(text_tokenizer, max_length=24, grid_size=8)


def build(collator: GroundedCollator, grounding_weight: float) -> GroundedSiglip:
    config = EncoderPretrainingConfig(
        output_dir="unused",
        vision={**SIZES, "image_size": 64, "patch_size": 8},
        text={**SIZES, "max_position_embeddings": 24, "projection_size": 16},
        optimization=OptimizationConfig(
            max_steps=1, global_batch_size=4, micro_batch_size=4, learning_rate=1e-3
        ),
        logit_bias=-3.0,
        grounding_weight=grounding_weight,
    )
    torch.manual_seed(0)
    return build_siglip(
        config, len(collator.text_tokenizer), collator.text_tokenizer.eos_token_id
    ).eval()


def test_patches_lie_in_the_boxes_of_what_their_phrases_say(collator: GroundedCollator) -> None:
    dataset = SceneDataset("train", item="grounded_pair")
    samples = [dataset[i] for i in range(6)]
    batch = collator(samples)
    phrases = sorted(
        {phrase for sample in samples for both in sample["phrases"] for phrase in both}
    )
    expected = []
    for i, sample in enumerate(samples):
        for box, both in zip((sample["boxes"] * 64).tolist(), sample["phrases"], strict=True):
            for patch in range(64):
                x, y = patch % 8 * 8 + 4, patch // 8 * 8 + 4
                if box[0] < x < box[2] and box[1] < y < box[3]:
                    expected.append((i * 64 + patch, {phrases.index(p) for p in both}))
    found = [
        (int(p), set(row.nonzero().flatten().tolist()))
        for p, row in zip(batch["patches"], batch["truth"], strict=True)
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert batch["phrase_ids"].shape == (len(phrases), 24)


def test_grounding_is_a_sigmoid_loss_of_every_patch_and_phrase(collator: GroundedCollator) -> None:
    dataset = SceneDataset("train", item="grounded_pair")
    batch = collator([dataset[i] for i in range(4)])
    plain, grounded = build(collator, 0.0), build(collator, 2.0)
    with torch.no_grad():
        output = plain(**batch)
        siglip = SiglipModel.forward(
            plain, batch["input_ids"], batch["pixel_values"], return_loss=True
        )
        torch.testing.assert_close(output.loss, siglip.loss)
        hidden = output.vision_model_output.last_hidden_state.flatten(0, 1)
        phrases = plain.get_text_features(input_ids=batch["phrase_ids"]).pooler_output
        total = 0.0
        for patch, truth in zip(batch["patches"], batch["truth"], strict=True):
            for phrase, is_true in zip(phrases, truth, strict=True):
                logit = 10 * torch.cosine_similarity(hidden[patch], phrase, dim=0).item() - 3
                total -= math.log(1 / (1 + math.exp(-logit if is_true else logit)))
        expected = siglip.loss + 2 * total / len(batch["patches"])
        torch.testing.assert_close(grounded(**batch).loss, expected)


def test_flash_attention_gets_no_fp32_work(flash_attention: str, tmp_path: Path) -> None:
    sizes = "{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2"
    arguments = [
        "tiny_encoder",
        f"output_dir={tmp_path}",
        f"vision={sizes}, image_size: 64, patch_size: 16}}",
        f"text={sizes}, max_position_embeddings: 24, projection_size: 32}}",
        f"attention={flash_attention}",
        *(
            f"optimization.{pair}"
            for pair in ("max_steps=1", "global_batch_size=2", "micro_batch_size=2")
        ),
    ]
    with pytest.raises(ValueError, match="set bf16=true"):
        pretrain_encoder.main([*arguments, "optimization.bf16=false"])
    pretrain_encoder.main([*arguments, "optimization.bf16=true"])
    assert (tmp_path / "model" / "config.json").is_file()
