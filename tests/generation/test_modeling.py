"""Visual ids, prompts and their template, the published model and its size."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vqrae.common.config import load_config, shipped_config
from vqrae.common.trainer import training_arguments
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation import train
from vqrae.generation.config import GeneratorConfig
from vqrae.generation.dry_run import rehearsal
from vqrae.generation.modeling import (
    PromptEncoder,
    VisualVocabulary,
    build_generator,
    fit_projection,
    pad_left,
)
from vqrae.generation.train import fit_prompts

WORDS = build_word_tokenizer(["a photo of a red circle user assistant {}"])
PUBLISHED = VisualVocabulary(offset=151_936, codebook_size=16_384, num_codes=1024)
TABLE_9 = {
    "learning_rate": 1e-4, "lr_scheduler_type": "constant_with_warmup", "weight_decay": 0.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-15, "warmup_steps": 4000,
    "bf16": True, "max_grad_norm": 1.0, "global_batch_size": 512, "zero": 1,
}  # fmt: skip
QWEN3_PARAMETERS = 596_049_920  # of the released Qwen3-0.6B, head tied


# ---- vocabulary and prompts


def test_ids_and_rows() -> None:
    assert PUBLISHED.begin_of_image == 168_320
    assert PUBLISHED.num_rows == 168_448 == 128 * 1316
    assert PUBLISHED.code_rows == slice(151_936, 168_320)
    assert pad_left([[1], [2, 3]], 0) == [[0, 1], [2, 3]]


def test_a_new_text_token_changes_no_prompt(vocabulary: VisualVocabulary) -> None:
    text_tokenizer = build_word_tokenizer(["a photo of a red circle"])
    before = PromptEncoder(text_tokenizer, vocabulary)("a red circle")
    text_tokenizer.add_tokens(["<new>"])
    assert PromptEncoder(text_tokenizer, vocabulary)("a red circle") == before
    assert before[-1] == vocabulary.begin_of_image == 164


def test_template_survives_a_long_caption(vocabulary: VisualVocabulary) -> None:
    template = "<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    encode = PromptEncoder(WORDS, vocabulary, template=template, max_caption_tokens=3)
    ids = encode("a photo of a red circle")
    assert WORDS.convert_ids_to_tokens(ids[:-1]) == [
        "<|im_start|>", "user", "a", "photo", "of", "<|im_end|>", "<|im_start|>", "assistant"
    ]  # fmt: skip
    assert encode.unconditional == [*ids[:2], *ids[5:]]
    plain = PromptEncoder(WORDS, vocabulary)("a red <|im_end|> circle {caption} {}")
    assert WORDS.convert_tokens_to_ids("<|im_end|>") not in plain  # a caption is only text


def test_what_a_caption_loses_is_named(vocabulary: VisualVocabulary) -> None:
    encode = PromptEncoder(WORDS, vocabulary, max_caption_tokens=4)
    assert encode.losses("a Red circle") == []
    unknown, cut = encode.losses("a photo of a crimson zebra, crimson")
    assert unknown == "3 words have no id and are read as unknown: crimson, zebra, ,"
    assert "8 tokens, of which 4 are read" in cut


@pytest.mark.parametrize(
    ("template", "offset", "message"),
    [
        ("", 100, r"expected text with \{caption\} once"),
        ("{caption} {caption}", 100, r"expected text with \{caption\} once"),
        ("{caption}", 4, "visual ids start at 4: set a larger offset"),
    ],
)
def test_bad_prompts(template: str, offset: int, message: str) -> None:
    vocabulary = VisualVocabulary(offset=offset, codebook_size=8, num_codes=4)
    with pytest.raises(ValueError, match=message):
        PromptEncoder(WORDS, vocabulary, template=template)


# ---- the model


def test_pretrained_llm_is_extended(model: Qwen3ForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    rows = model.config.vocab_size
    larger = VisualVocabulary(offset=rows, codebook_size=200, num_codes=4)
    extended = build_generator(larger, llm=str(tmp_path))
    assert extended.model.embed_tokens.weight.shape[0] == larger.num_rows
    for name, weight in model.model.named_parameters():
        assert torch.equal(extended.model.get_parameter(name)[: len(weight)], weight)
    with pytest.raises(ValueError, match=f"set offset to {rows}"):
        build_generator(dataclasses.replace(larger, offset=50), llm=str(tmp_path))
    for options in ({}, {"llm": "a/b", "llm_config": {}}):
        with pytest.raises(ValueError, match="expected exactly one"):
            build_generator(larger, **options)


@pytest.mark.parametrize(("codebook_dim", "width"), [(384, 256), (48, 96)])
def test_projected_codes_look_like_text_rows_and_keep_their_distances(
    codebook_dim: int, width: int
) -> None:
    """A codebook wider than the model, as the published one, and a narrower one."""
    torch.manual_seed(0)
    # Features of an encoder: few directions carry most.
    vectors = 3 + torch.randn(1024, codebook_dim) * torch.logspace(0, -2, codebook_dim)
    text = 0.03 * torch.randn(2048, width) + 0.01 * torch.randn(width)
    rows = fit_projection(vectors, text)
    assert rows.shape == (1024, width)
    torch.testing.assert_close(rows.mean(0), text.mean(0), atol=1e-6, rtol=0)
    expected_spread = (text - text.mean(0)).std().item()
    assert (rows - rows.mean(0)).std().item() == pytest.approx(expected_spread, rel=1e-3)
    spread = (rows - rows.mean(0)).std(0)
    assert spread.max() < 2 * spread.mean()  # no dimension holds more than another
    ratio = torch.pdist(rows[:200]) / torch.pdist(vectors[:200])
    assert (ratio / ratio.mean() - 1).abs().max() < 0.01


# ---- the published configuration


@pytest.fixture
def published() -> GeneratorConfig:
    return load_config(GeneratorConfig, shipped_config("vqrae.generation", "qwen3_0_6b"))


def test_every_value_of_table_9_reaches_the_trainer(
    published: GeneratorConfig, tmp_path: Path
) -> None:
    training, optimization = published.training, published.training.optimization
    assert {name: getattr(optimization, name) for name in TABLE_9} == TABLE_9
    assert published.extraction.crop == "center"
    assert (training.model.llm, training.model.offset) == ("Qwen/Qwen3-0.6B", PUBLISHED.offset)
    assert training.model.caption_dropout == 0.1  # ours: guidance needs it
    # DeepSpeed reads its values from these.
    plain = dataclasses.replace(optimization, zero=0)
    arguments = training_arguments(plain, tmp_path, seed=0)
    for name in TABLE_9.keys() - {"global_batch_size", "zero"}:
        assert getattr(arguments, name) == TABLE_9[name], name
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 512
    assert arguments.gradient_checkpointing


def test_the_longest_sequence_has_1536_ids(published: GeneratorConfig) -> None:
    model = published.training.model
    encode = fit_prompts(model, build_word_tokenizer(["a"]), PUBLISHED)
    assert len(encode("a " * 600)) + PUBLISHED.num_codes == model.max_length == 1536
    short = dataclasses.replace(model, max_length=1024)
    with pytest.raises(ValueError, match=r"set a larger model\.max_length"):
        fit_prompts(short, build_word_tokenizer(["a"]), PUBLISHED)


def test_the_model_is_qwen3_and_its_codes(published: GeneratorConfig) -> None:
    values = published.training.model.llm_config
    with torch.device("meta"):
        model = build_generator(PUBLISHED, llm_config=values)
        released = Qwen3ForCausalLM(Qwen3Config(**values, vocab_size=PUBLISHED.offset))
    assert released.num_parameters() == QWEN3_PARAMETERS
    added = (PUBLISHED.num_rows - PUBLISHED.offset) * 1024
    assert model.num_parameters() == QWEN3_PARAMETERS + added == 612_958_208
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 1e6


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
    published: GeneratorConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = dataclasses.replace(published.training, dry_run=1, tokenizer=str(tokenizer_folder))
    training = rehearsal(given, tmp_path)
    assert training.model.llm is None  # known by its configuration
    assert training.model.llm_config == published.training.model.llm_config
    optimization = training.optimization
    assert (optimization.micro_batch_size, optimization.global_batch_size) == (1, 1)
    for name in set(TABLE_9) - {"global_batch_size"}:
        assert getattr(optimization, name) == TABLE_9[name]
    unknown = dataclasses.replace(published.training.model, llm="no/such", llm_config=None)
    with pytest.raises(ValueError, match="no/such: not on this machine"):
        rehearsal(dataclasses.replace(given, model=unknown), tmp_path)
