"""The published generator: every value of VQRAE's Table 9, and a model of the right size."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from vqrae.common.checkpoints import count_parameters
from vqrae.common.config import load_config, shipped_config
from vqrae.common.trainer import training_arguments
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation import train
from vqrae.generation.config import GeneratorConfig
from vqrae.generation.dry_run import rehearsal
from vqrae.generation.modeling import VisualVocabulary, build_generator, fit_projection
from vqrae.generation.train import fit_prompts

# fmt: off
TABLE_9 = {"learning_rate": 1e-4, "lr_scheduler_type": "constant_with_warmup", "weight_decay": 0.0, "adam_beta1": 0.9,
           "adam_beta2": 0.999, "adam_epsilon": 1e-15, "warmup_steps": 4000, "bf16": True, "max_grad_norm": 1.0,
           "global_batch_size": 512, "zero": 1}
# fmt: on
QWEN3_ROWS = 151_936
VOCABULARY = {"offset": QWEN3_ROWS, "codebook_size": 16_384, "num_codes": 1024}  # section 3.5
QWEN3_PARAMETERS = 596_049_920  # of the released Qwen3-0.6B, head tied


@pytest.fixture
def config() -> GeneratorConfig:
    return load_config(GeneratorConfig, shipped_config("vqrae.generation", "qwen3_0_6b"))


def test_every_value_of_table_9(config: GeneratorConfig) -> None:
    training = config.training
    assert {name: getattr(training.optimization, name) for name in TABLE_9} == TABLE_9
    assert (
        training.optimization.global_batch_size % (8 * training.optimization.micro_batch_size) == 0
    )  # the header's hardware
    assert config.extraction.crop == "center"
    assert (training.model.llm, training.model.offset) == ("Qwen/Qwen3-0.6B", QWEN3_ROWS)
    assert (training.model.max_length, training.model.caption_dropout) == (
        1536,
        0.1,
    )  # the dropout is ours: guidance needs it


def test_the_trainer_gets_these_values(config: GeneratorConfig, tmp_path: Path) -> None:
    plain = dataclasses.replace(
        config.training.optimization, zero=0
    )  # DeepSpeed reads its values from these
    arguments = training_arguments(plain, tmp_path, seed=0)
    for name in set(TABLE_9) - {"global_batch_size", "zero"}:
        assert getattr(arguments, name) == TABLE_9[name], name
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 512
    assert arguments.gradient_checkpointing


def test_the_longest_sequence_has_1536_ids(config: GeneratorConfig) -> None:
    vocabulary = VisualVocabulary(**VOCABULARY)
    encode = fit_prompts(config.training.model, build_word_tokenizer(["a"]), vocabulary)
    assert len(encode("a " * 600)) + vocabulary.num_codes == 1536
    assert len(encode.unconditional) == encode.template_length
    short = dataclasses.replace(config.training.model, max_length=1024)
    with pytest.raises(ValueError, match=r"set a larger model\.max_length"):
        fit_prompts(short, build_word_tokenizer(["a"]), vocabulary)


def test_the_model_is_qwen3_and_its_codes(config: GeneratorConfig) -> None:
    vocabulary = VisualVocabulary(**VOCABULARY)
    with torch.device("meta"):
        model = build_generator(vocabulary, llm_config=config.training.model.llm_config)
        tied = Qwen3ForCausalLM(
            type(model.config)(**{**config.training.model.llm_config, "vocab_size": QWEN3_ROWS})
        )
    assert count_parameters(tied) == (QWEN3_PARAMETERS, QWEN3_PARAMETERS)
    added = (vocabulary.num_rows - QWEN3_ROWS) * 1024
    assert count_parameters(model)[0] == QWEN3_PARAMETERS + added == 612_958_208
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 1e6


# ---- rows that start from the codebook


@pytest.mark.parametrize(("codebook_dim", "width"), [(1536, 1024), (48, 96)])
def test_projected_codes_look_like_text_rows_and_keep_their_distances(
    codebook_dim: int, width: int
) -> None:
    """At real size, E 1536 to D 1024, and where the model is wider than the codebook."""
    torch.manual_seed(0)
    scales = torch.logspace(
        0, -2, codebook_dim
    )  # features of an encoder: few directions carry most
    vectors = 3 + torch.randn(2048, codebook_dim) * scales
    text = 0.03 * torch.randn(4096, width) + 0.01 * torch.randn(width)
    rows = fit_projection(vectors, text)
    assert rows.shape == (2048, width)
    torch.testing.assert_close(rows.mean(0), text.mean(0), atol=1e-6, rtol=0)
    expected_spread = (text - text.mean(0)).std().item()
    assert (rows - rows.mean(0)).std().item() == pytest.approx(expected_spread, rel=1e-3)
    spread = (rows - rows.mean(0)).std(0)
    assert spread.max() < 2 * spread.mean()  # no dimension holds more than another
    distances, expected = torch.pdist(rows[:200]), torch.pdist(vectors[:200])
    ratio = distances / expected
    assert (ratio / ratio.mean() - 1).abs().max() < 0.01


# ---- the dry run


def test_a_dry_run_reports_and_keeps_nothing(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "hidden_size=32 intermediate_size=64 num_hidden_layers=2 num_attention_heads=2"
    sizes += " num_key_value_heads=1 head_dim=16"
    arguments = [f"model.llm_config.{size}" for size in sizes.split()]
    arguments += ["model.llm=nobody/has-this", "model.offset=512", "optimization.zero=0"]
    arguments += [f"tokenizer={tokenizer_folder}", f"output_dir={tmp_path / 'new' / 'run'}"]
    train.main(["qwen3_0_6b", "dry_run=2", *arguments])
    printed = capsys.readouterr().out
    for line in ("2 steps of 1 sequences of", "Qwen3ForCausalLM", "peak memory", "zero=3"):
        assert line in printed
    assert "activation checkpointing on" in printed
    assert "100,000 steps of 512 = 51,200,000 sequences of" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_is_the_configuration_with_one_sequence_a_step(
    config: GeneratorConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = dataclasses.replace(config.training, dry_run=1, tokenizer=str(tokenizer_folder))
    training = rehearsal(given, tmp_path)
    assert training.model.llm is None  # known by its configuration
    assert training.model.llm_config == config.training.model.llm_config
    optimization = training.optimization
    assert (optimization.micro_batch_size, optimization.global_batch_size) == (1, 1)
    for name in set(TABLE_9) - {"global_batch_size"}:
        assert getattr(optimization, name) == TABLE_9[name]
    unknown = dataclasses.replace(config.training.model, llm="no/such", llm_config=None)
    with pytest.raises(ValueError, match="no/such: not on this machine"):
        rehearsal(dataclasses.replace(given, model=unknown), tmp_path)
