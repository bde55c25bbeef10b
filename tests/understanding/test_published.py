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
    block = 2 * width * width + width * key_value + 3 * width * mlp + 2 * width
    block += biases * (width + key_value)
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
    projector = VISION[0] * width + width + width * width + width
    llm = llm_parameters(*LLMS[name])

    def size(module, trained=False):
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    assert size(model.model.vision_tower) == vision_parameters()
    assert size(model.model.multi_modal_projector) == projector
    head = model.lm_head.weight.numel()
    assert size(model.model.language_model) + head == llm == PUBLISHED[name]
    freeze(model, "pretrain")
    assert size(model, trained=True) == projector
    freeze(model, "sft")
    assert size(model, trained=True) == projector + llm


def test_table_8(full_size):
    _, config, model = full_size
    common = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "bf16": True}
    common |= {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 1.0}
    for stage, rate, batch, zero in (("pretrain", 1e-3, 256, 2), ("sft", 2e-5, 128, 3)):
        expected = {**common, "learning_rate": rate, "global_batch_size": batch, "zero": zero}
        optimization = getattr(config, stage)
        assert {name: getattr(optimization, name) for name in expected} == expected
    for stage in (config.pretrain, config.sft):
        for gpus in (1, 2, 4, 8, 16):  # accumulation keeps the global batch
            sizes = (stage.global_batch_size, stage.micro_batch_size)
            micro_batch_size, steps = fit_batch(*sizes, gpus)
            assert steps * gpus * micro_batch_size == stage.global_batch_size
    assert config.max_length == 2048
    assert (model.config.vision_feature_layer, model.config.projector_hidden_act) == (-1, "gelu")
