"""Training: loss on codes only, exact resume, a plain folder, images at the end."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from vqrae.common.config import load_config, shipped_config
from vqrae.common.files import read_json
from vqrae.common.run import read_metrics
from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.code_shards import CodeDataset
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation import train
from vqrae.generation.config import GeneratorConfig
from vqrae.generation.data import GenerationCollator, TrainingStream
from vqrae.generation.generator import Generator, find_tokenizer
from vqrae.generation.modeling import PromptEncoder, VisualHead, VisualVocabulary, build_generator
from vqrae.generation.sampling import SamplingConfig
from vqrae.generation.train import visual_loss

SAMPLES = [
    {"codes": torch.arange(16), "caption": "a red circle"},
    {"codes": torch.arange(16).flip(0) + 40, "caption": ""},
    {"codes": torch.full((16,), 63), "caption": "a photo of a red circle"},
]


def make_batch(vocabulary: VisualVocabulary, samples: list = SAMPLES) -> dict[str, torch.Tensor]:
    text_tokenizer = build_word_tokenizer(["a photo of a red circle"])
    return GenerationCollator(PromptEncoder(text_tokenizer, vocabulary), vocabulary)(samples)


@pytest.fixture(scope="module")
def run(train_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps of 2 micro-batches."""
    folder = tmp_path_factory.mktemp("run")
    train.main([*train_arguments, "optimization.save_total_limit=2", f"output_dir={folder}"])
    return folder


# ---- batches and loss


def test_labels_are_the_codes_only(vocabulary: VisualVocabulary) -> None:
    batch = make_batch(vocabulary)
    labels = batch["labels"]
    assert (labels[:, :-16] == IGNORE_INDEX).all()
    assert torch.equal(labels[:, -16:], torch.stack([sample["codes"] for sample in SAMPLES]) + 100)
    assert torch.equal(batch["input_ids"][:, -16:], labels[:, -16:])
    assert (batch["input_ids"][:, -17] == vocabulary.begin_of_image).all()
    assert batch["attention_mask"].sum(1).tolist() == [3 + 1 + 16, 1 + 16, 6 + 1 + 16]
    assert batch["position_ids"][:, -1].tolist() == [19, 16, 22]


def test_visual_loss_is_the_full_loss_with_other_logits_masked(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    batch = make_batch(vocabulary)
    plain = model(**batch)
    masked = torch.full_like(plain.logits, -torch.inf)
    masked[..., vocabulary.code_rows] = plain.logits[..., vocabulary.code_rows]
    expected = model.loss_function(
        logits=masked, labels=batch["labels"], vocab_size=model.config.vocab_size
    )
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.lm_head = VisualHead(model.lm_head, vocabulary.code_rows)
    loss = visual_loss(model, batch, vocabulary)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert loss < plain.loss  # text ids take no share of the probability
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_the_full_softmax_is_that_of_transformers(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    batch = make_batch(vocabulary)
    expected = model(**batch).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = visual_loss(model, batch, vocabulary, full_vocabulary=True)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_padding_changes_no_loss(model: Qwen3ForCausalLM, vocabulary: VisualVocabulary) -> None:
    model.lm_head = VisualHead(model.lm_head, vocabulary.code_rows)
    alone = [visual_loss(model, make_batch(vocabulary, [sample]), vocabulary) for sample in SAMPLES]
    torch.testing.assert_close(
        visual_loss(model, make_batch(vocabulary), vocabulary), torch.stack(alone).mean()
    )


# ---- the stream


def test_stream_is_a_function_of_position(codes_path: Path) -> None:
    codes = CodeDataset(codes_path)
    stream = TrainingStream(codes, 100, caption_dropout=0.3, seed=1)
    in_order = [stream[i] for i in range(100)]
    again = TrainingStream(codes, 100, caption_dropout=0.3, seed=1)
    for i in (99, 0, 57, 20):
        assert again[i]["caption"] == in_order[i]["caption"]
        assert torch.equal(again[i]["codes"], in_order[i]["codes"])
    for epoch in range(5):
        seen = Counter(
            tuple(sample["codes"].tolist()) for sample in in_order[20 * epoch : 20 * epoch + 20]
        )
        assert seen == Counter(tuple(codes[i]["codes"].tolist()) for i in range(20))
    dropped = [sample["caption"] == "" for sample in in_order]
    assert 15 < sum(dropped) < 45
    assert dropped[:20] != dropped[20:40]
    assert all(
        sample["caption"]
        for sample in map(TrainingStream(codes, 50, caption_dropout=0).__getitem__, range(50))
    )


# ---- runs


def test_resume_equals_uninterrupted(run: Path, train_arguments: list[str], tmp_path: Path) -> None:
    """The state after a crash at step 3: checkpoint-2 exists, the steps after it are lost."""
    (run / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    train.main([*train_arguments, f"output_dir={tmp_path}"])
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = {row["step"]: row["loss"] for row in read_metrics(run)}
    assert [row["loss"] for row in read_metrics(tmp_path)] == [losses[3], losses[4]]


def test_relaunch_of_a_finished_run_returns_at_once(
    run: Path, train_arguments: list[str], other_tokenizer_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    train.main([*train_arguments, f"output_dir={run}"])
    assert capsys.readouterr().out == f"{run / 'model'} is finished (4 steps)\n"
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with tokenizer"):
        train.main([*train_arguments, f"output_dir={run}", f"tokenizer={other_tokenizer_path}"])


def test_a_checkpoint_of_another_tokenizer_is_not_resumed(
    run: Path, train_arguments: list[str], other_tokenizer_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-4 was made with tokenizer"):
        train.main(
            [*train_arguments, f"output_dir={tmp_path}", f"tokenizer={other_tokenizer_path}"]
        )


def test_folder_loads_in_plain_transformers(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert type(model) is Qwen3ForCausalLM
    assert model.config.vocab_size == 640
    assert model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.visual_vocabulary == {"offset": 512, "codebook_size": 64, "num_codes": 16}
    ids = AutoTokenizer.from_pretrained(run / "model")(
        "a photo of a red circle", return_tensors="pt"
    )["input_ids"]
    assert "<|unk|>" not in AutoTokenizer.from_pretrained(run / "model").decode(ids[0])
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (
        1,
        ids.shape[1] + 4,
    )
    assert not list((run / "model").glob("*.bin"))


def test_generator_draws_images(run: Path, tokenizer_path: Path) -> None:
    generator = Generator.from_pretrained(run)
    steps: list[tuple[int, int]] = []
    prompts = [
        "a photo of a red circle",
        "a photo of two stars",
        "",
        "a photo of an unheard-of thing",
    ]
    images = generator.images(
        prompts, seeds=[1, 2, 3, 4], batch_size=3, progress=lambda *step: steps.append(step)
    )
    assert images.shape == (4, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    assert [steps[0], steps[-1], len(steps)] == [(3, 64), (64, 64), 32]
    recommended = SamplingConfig(guidance_scale=2.0, temperature=0.5)  # by the configuration `tiny`
    alone = generator.images(prompts[3:], seeds=[4], sampling=recommended)
    torch.testing.assert_close(alone[0], images[3])
    assert generator.images([], seeds=[]).shape[0] == 0


def test_a_tree_of_generator_and_tokenizer_may_be_moved(
    run: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    recorded = read_json(run / "model" / "config.json")["vqrae_tokenizer"]
    assert recorded == os.path.relpath(tokenizer_path, run / "model")
    moved = tmp_path / "a" / "b"  # as deep as the tokenizer's way from the model asks for
    shutil.copytree(run / "model", moved / run.name / "model")
    shutil.copytree(tokenizer_path, (moved / run.name / "model" / recorded).resolve())
    found = find_tokenizer(recorded, str(moved / run.name / "model"))
    assert found.is_relative_to(tmp_path)
    assert Generator.from_pretrained(moved / run.name).images([""], seeds=[0]).shape == (
        1,
        3,
        32,
        32,
    )
    assert (
        find_tokenizer(str(tokenizer_path), str(run / "model")) == tokenizer_path
    )  # as older generators recorded it
    shutil.rmtree(found)
    with pytest.raises(
        FileNotFoundError,
        match=rf"needs the visual tokenizer {recorded} \(weights [0-9a-f]{{16}}\)",
    ):
        Generator.from_pretrained(moved / run.name)


def test_generator_needs_its_own_tokenizer(
    run: Path, other_tokenizer_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="was made with tokenizer") as error:
        Generator.from_pretrained(run, tokenizer=other_tokenizer_path)
    for name in (run, other_tokenizer_path):
        assert str(name) in str(error.value)
    with pytest.raises(FileNotFoundError, match="name its folder with tokenizer="):
        Generator.from_pretrained(run, tokenizer=tmp_path / "gone")


def test_full_vocabulary_loss_trains_too(train_arguments: list[str], tmp_path: Path) -> None:
    options = ["full_vocabulary_loss=true", "optimization.max_steps=1", "model.offset=600"]
    train.main([*train_arguments, *options, f"output_dir={tmp_path}"])
    assert read_metrics(tmp_path)[0]["loss"] > 6  # ln(600 + 64 rows) rather than ln(64)


def test_codes_of_another_tokenizer_are_refused(
    train_arguments: list[str], other_tokenizer_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"code set .* was made with tokenizer"):
        train.main(
            [*train_arguments, f"output_dir={tmp_path}", f"tokenizer={other_tokenizer_path}"]
        )
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# ---- models and configs


def test_pretrained_llm_is_extended(model: Qwen3ForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    larger = VisualVocabulary(offset=model.config.vocab_size, codebook_size=200, num_codes=4)
    extended = build_generator(larger, llm=str(tmp_path))
    assert extended.model.embed_tokens.weight.shape[0] == larger.num_rows
    assert torch.equal(
        extended.model.embed_tokens.weight[: larger.offset], model.model.embed_tokens.weight
    )
    assert torch.equal(
        extended.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    )
    with pytest.raises(ValueError, match=f"set offset to {larger.offset}"):
        build_generator(
            VisualVocabulary(offset=50, codebook_size=200, num_codes=4), llm=str(tmp_path)
        )


@pytest.mark.parametrize("options", [{}, {"llm": "a/b", "llm_config": {}}])
def test_one_source_of_weights(vocabulary: VisualVocabulary, options: dict) -> None:
    with pytest.raises(ValueError, match="expected exactly one"):
        build_generator(vocabulary, **options)


def test_the_tiny_config_builds() -> None:
    config = load_config(GeneratorConfig, shipped_config("vqrae.generation", "tiny")).training
    vocabulary = VisualVocabulary(offset=config.model.offset, codebook_size=16_384, num_codes=1024)
    with torch.device("meta"):
        model = build_generator(vocabulary, llm_config=config.model.llm_config)
    assert model.num_parameters() > vocabulary.num_rows * model.config.hidden_size
