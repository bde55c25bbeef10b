"""The full-size configurations: Table 8 of the paper, and models whose parameters add up."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import fit_batch
from vqrae.common.dry_run import known_config
from vqrae.tokenizer.dry_run import tokenizer_config
from vqrae.understanding.build import llava_config
from vqrae.understanding.train import TrainConfig, freeze

VISION = 1152, 4304, 27  # SigLIP2-so400m: width, MLP, layers
PATCHES, TOKENS = 16 * 16 * 3, 1024
# width, MLP, layers, width of keys and values together, words, biases on queries, keys and values
LLMS = {
    "vicuna_7b": (4096, 11008, 32, 2 * 4096, 32000, False),
    "vicuna_13b": (5120, 13824, 40, 2 * 5120, 32000, False),
    "qwen2_5_7b": (3584, 18944, 28, 2 * 512, 152064, True),
}
# Their model cards.
PUBLISHED = {"vicuna_7b": 6_738_415_616, "vicuna_13b": 13_015_864_320, "qwen2_5_7b": 7_615_616_512}


def vision_parameters():
    width, mlp, layers = VISION
    block = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    return layers * block + PATCHES * width + width + TOKENS * width + 2 * width


def llm_parameters(width, mlp, layers, key_value, words, biases):
    block = (
        2 * width * width
        + width * key_value
        + 3 * width * mlp
        + 2 * width
        + biases * (width + key_value)
    )
    return layers * block + 2 * words * width + width


@pytest.fixture(scope="module", params=list(LLMS))
def full_size(request):
    config = load_config(TrainConfig, shipped_config("vqrae.understanding", request.param))
    text_config = known_config(config.llm)
    last_id = text_config.vocab_size - 1
    llava = llava_config(tokenizer_config(config.tokenizer), text_config, image_token_id=last_id)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(llava, dtype=torch.bfloat16)
    return request.param, config, model


def test_parameters_add_up(full_size):
    name, _, model = full_size
    width = LLMS[name][0]
    assert all(p.is_meta for p in model.parameters())
    sizes = {
        part: sum(p.numel() for p in getattr(model.model, part).parameters())
        for part in ("vision_tower", "multi_modal_projector", "language_model")
    }
    expected = {
        "encoder": vision_parameters(),
        "projector": VISION[0] * width + width + width * width + width,
        "llm": llm_parameters(*LLMS[name]),
    }
    assert sizes["vision_tower"] == expected["encoder"]
    assert sizes["multi_modal_projector"] == expected["projector"]
    assert (
        sizes["language_model"] + model.lm_head.weight.numel() == expected["llm"] == PUBLISHED[name]
    )
    freeze(model, "pretrain")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["projector"]
    freeze(model, "sft")
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == expected["projector"] + expected["llm"]
    )


def test_table_8(full_size):
    _, config, model = full_size
    given = {
        stage: (
            o.learning_rate,
            o.global_batch_size,
            o.zero,
            o.lr_scheduler_type,
            o.warmup_steps,
            o.bf16,
            o.weight_decay,
        )
        for stage, o in (("pretrain", config.pretrain), ("sft", config.sft))
    }
    assert given == {
        "pretrain": (1e-3, 256, 2, "cosine", 0.03, True, 0.0),
        "sft": (2e-5, 128, 3, "cosine", 0.03, True, 0.0),
    }
    for stage in (config.pretrain, config.sft):
        assert (stage.adam_beta1, stage.adam_beta2, stage.max_grad_norm) == (0.9, 0.999, 1.0)
        for gpus in (1, 2, 4, 8, 16):  # accumulation keeps the global batch
            micro_batch_size, steps = fit_batch(
                stage.global_batch_size, stage.micro_batch_size, gpus
            )
            assert steps * gpus * micro_batch_size == stage.global_batch_size
    assert config.max_length == 2048
    assert (model.config.vision_feature_layer, model.config.projector_hidden_act) == (-1, "gelu")
