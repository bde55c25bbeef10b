"""Training: loss on codes only, exact resume, shards = images, a plain folder, processes."""

import functools
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from both_systems import BOTH_SYSTEMS
from processes import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from vqrae.common.files import read_json
from vqrae.common.run import read_metrics
from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.code_shards import CodeDataset
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation import extract_codes, train
from vqrae.generation.data import GenerationCollator, TrainingStream
from vqrae.generation.generator import Generator
from vqrae.generation.heads import SingleCodeHead
from vqrae.generation.modeling import PromptEncoder, VisualVocabulary
from vqrae.generation.multi_code import MultiCodeModel
from vqrae.generation.own_tokenizer import find_tokenizer
from vqrae.generation.sampling import SamplingConfig
from vqrae.generation.train import Loss, multi_code_loss, visual_loss


def require_equal_models(ours: Path, theirs: Path) -> None:
    weights, expected = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def run(train_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps of 2 micro-batches."""
    folder = tmp_path_factory.mktemp("run")
    train.main([*train_arguments, f"output_dir={folder}"])
    return folder


# ---- the loss


@pytest.fixture
def batches(vocabulary: VisualVocabulary) -> list[dict[str, torch.Tensor]]:
    """A batch of three prompts of different lengths, and each of them by itself."""
    words = build_word_tokenizer(["a photo of a red circle"])
    collate = GenerationCollator(PromptEncoder(words, vocabulary))
    samples = [
        {"codes": torch.arange(16), "caption": "a red circle"},
        {"codes": torch.arange(16).flip(0) + 40, "caption": ""},
        {"codes": torch.full((16,), 63), "caption": "a photo of a red circle"},
    ]
    return [collate(samples), *(collate([sample]) for sample in samples)]


@pytest.mark.parametrize("full_vocabulary", [False, True])
def test_visual_loss_is_that_of_transformers_over_its_rows(
    full_vocabulary: bool,
    model: Qwen3ForCausalLM,
    vocabulary: VisualVocabulary,
    batches: list[dict[str, torch.Tensor]],
) -> None:
    inputs = {**batches[0]}
    codes = vocabulary.to_ids(inputs.pop("codes"))
    labels = torch.cat([torch.full_like(inputs["input_ids"], IGNORE_INDEX), codes], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], codes], dim=1)
    logits = model(**inputs).logits
    if not full_vocabulary:
        visible = logits[..., vocabulary.code_rows]
        logits = torch.full_like(logits, -torch.inf)
        logits[..., vocabulary.code_rows] = visible
    options = {"labels": labels, "vocab_size": model.config.vocab_size}
    expected = model.loss_function(logits=logits, **options)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if not full_vocabulary:
        model.lm_head = SingleCodeHead(model.lm_head, vocabulary.code_rows)
    loss = visual_loss(model, batches[0], vocabulary, full_vocabulary=full_vocabulary)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)
    alone = [
        visual_loss(model, batch, vocabulary, full_vocabulary=full_vocabulary)
        for batch in batches[1:]
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean())  # padding changes nothing


# ---- runs


@BOTH_SYSTEMS
def test_resume_equals_uninterrupted(run: Path, train_arguments: list[str], tmp_path: Path) -> None:
    """The state after a crash at step 3: checkpoint-2 exists, the steps after it are lost.

    The images that only the resumed run shows change nothing.
    """
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    train.main([*train_arguments, "previews=2", f"output_dir={tmp_path}"])
    assert (tmp_path / "samples" / "step-4.png").is_file()
    require_equal_models(tmp_path, run)
    losses = [row["loss"] for row in read_metrics(run)]
    assert [row["loss"] for row in read_metrics(tmp_path)] == losses[2:]


@BOTH_SYSTEMS
def test_images_train_like_their_codes_and_resume(
    train_arguments: list[str], tokenizer_path: Path, pairs: Path, tmp_path: Path
) -> None:
    codes, live, resumed = (tmp_path / name for name in ("codes", "live", "resumed"))
    source = ["tiny", f"tokenizer={tokenizer_path}", f"source={pairs}"]
    extract_codes.main([*source, f"output_dir={tmp_path / 'set'}"])
    train.main([*train_arguments, f"data={tmp_path / 'set'}", f"output_dir={codes}"])
    train.main([*train_arguments, f"data={pairs}", f"output_dir={live}"])
    require_equal_models(live, codes)
    assert "pairs.jsonl" in read_json(live / "manifest.json")["fingerprints"]["data"]
    shutil.copytree(live / "checkpoint-2", resumed / "checkpoint-2")
    train.main([*train_arguments, f"data={pairs}", f"output_dir={resumed}"])
    require_equal_models(resumed, live)


def test_relaunch_of_a_finished_run_returns_at_once(
    run: Path, train_arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    train.main([*train_arguments, f"output_dir={run}"])
    assert "is finished (4 steps)" in capsys.readouterr().out
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("there", ["nothing", "checkpoint-4", "model"])
def test_another_tokenizer_is_refused(
    there: str,
    run: Path,
    train_arguments: list[str],
    other_tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    """By its codes, by a checkpoint, by the finished model."""
    if there != "nothing":
        shutil.copytree(run / there, tmp_path / there)
    artefact = "code set" if there == "nothing" else there
    with pytest.raises(ValueError, match=rf"{artefact}.* was made with tokenizer"):
        train.main(
            [*train_arguments, f"output_dir={tmp_path}", f"tokenizer={other_tokenizer_path}"]
        )


def test_full_vocabulary_loss_trains_too(train_arguments: list[str], tmp_path: Path) -> None:
    options = ["full_vocabulary_loss=true", "optimization.max_steps=1", "model.offset=600"]
    train.main([*train_arguments, *options, f"output_dir={tmp_path}"])
    assert read_metrics(tmp_path)[0]["loss"] > 6  # ln(600 + 64 rows) rather than ln(64)


def test_flash_attention_trains_and_extracts_but_not_in_fp32(
    flash_attention: str,
    train_arguments: list[str],
    extraction: list[str],
    tmp_path: Path,
) -> None:
    """Its kernels refuse fp32, in which the tokenizer encodes."""
    options = [f"model.attention={flash_attention}", "optimization.max_steps=1", "data=scenes"]
    command = [*train_arguments, *options]
    train.main([*command, f"output_dir={tmp_path / 'run'}"])
    assert Generator.from_pretrained(tmp_path / "run").images(["a circle"], seeds=[0]).shape[0] == 1
    extract_codes.main([*extraction, f"output_dir={tmp_path / 'codes'}"])
    with pytest.raises(ValueError, match="set bf16=true"):
        train.main([*command, "optimization.bf16=false", f"output_dir={tmp_path / 'fp32'}"])


@BOTH_SYSTEMS
@pytest.mark.slow
def test_two_processes_under_zero3_compute_the_visual_loss(
    train_arguments: list[str], codes_path: Path, tmp_path: Path
) -> None:
    """ZeRO-3 draws other weights: at rate 0 the saved model repeats logged loss and gradient."""
    pytest.importorskip("deepspeed")
    options = ["max_steps=2", "learning_rate=0.0", "zero=3"]
    given = [*train_arguments, *(f"optimization.{option}" for option in options)]
    given += ["model.llm_config.initializer_range=0.5", f"output_dir={tmp_path}"]
    launch(train.__name__, given, processes=2)
    generator = Generator.from_pretrained(tmp_path)
    model, vocabulary = generator.model, generator.encode_prompt.vocabulary
    compute_loss: Loss = multi_code_loss
    if isinstance(model, MultiCodeModel):
        expected = generator.tokenizer.out_proj.qkv.weight  # the start of its copy, in 16 bits
        torch.testing.assert_close(
            model.embedding.projection.qkv.weight, expected, atol=1e-3, rtol=0.01
        )
        assert torch.equal(model.embedding.code_vectors, generator.tokenizer.code_vectors())
    else:
        model.lm_head = SingleCodeHead(model.lm_head, vocabulary.code_rows)
        compute_loss = functools.partial(visual_loss, vocabulary=vocabulary)
    stream = TrainingStream(CodeDataset(codes_path), 16, caption_dropout=0.1)
    collate = GenerationCollator(generator.encode_prompt)
    for step, logged in enumerate(read_metrics(tmp_path)):
        model.zero_grad()
        batch = collate([stream[i] for i in range(8 * step, 8 * step + 8)])
        loss = compute_loss(model, batch)
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        assert logged["loss"] == pytest.approx(loss.item(), rel=0.02)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=0.05)
        assert abs(loss.item() - math.log(64)) > 0.1  # not the loss of a uniform guess


# ---- the folder


def test_folder_loads_in_plain_transformers(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert type(model) is Qwen3ForCausalLM
    assert (model.config.vocab_size, model.config.use_cache) == (640, True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.visual_vocabulary == {"offset": 512, "codebook_size": 64, "num_codes": 16}
    text_tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = text_tokenizer("a photo of a red circle", return_tensors="pt")["input_ids"]
    assert "<|unk|>" not in text_tokenizer.decode(ids[0])
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, ids.shape[1] + 4)
    assert not list((run / "model").glob("*.bin"))


@BOTH_SYSTEMS
def test_generator_makes_images(run: Path) -> None:
    generator = Generator.from_pretrained(run)
    steps: list[tuple[int, int]] = []
    prompts = ["a photo of a red circle", "a photo of two stars", "", "an unheard-of thing"]
    images = generator.images(
        prompts, seeds=[1, 2, 3, 4], batch_size=3, progress=lambda *step: steps.append(step)
    )
    assert images.shape == (4, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    assert [steps[0], steps[-1], len(steps)] == [(3, 64), (64, 64), 32]
    recommended = SamplingConfig(guidance_scale=2.0, temperature=0.5)  # by the configuration
    alone = generator.images(prompts[3:], seeds=[4], sampling=recommended)
    torch.testing.assert_close(alone[0], images[3])
    assert generator.images([], seeds=[]).shape == (0, 3, 32, 32)


def test_a_tree_of_generator_and_tokenizer_may_be_moved(
    run: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    recorded = read_json(run / "model" / "config.json")["vqrae_tokenizer"]
    assert recorded == os.path.relpath(tokenizer_path, run / "model")
    moved = tmp_path / "a" / "b" / run.name / "model"  # as deep as the relative path asks for
    shutil.copytree(run / "model", moved)
    shutil.copytree(tokenizer_path, (moved / recorded).resolve())
    found = find_tokenizer(recorded, str(moved))
    assert found.is_relative_to(tmp_path)
    assert Generator.from_pretrained(moved).images([""], seeds=[0]).shape == (1, 3, 32, 32)
    # As older generators recorded it.
    assert find_tokenizer(str(tokenizer_path), str(run / "model")) == tokenizer_path
    shutil.rmtree(found)
    missing = rf"needs the visual tokenizer {recorded} \(weights [0-9a-f]{{16}}\).*tokenizer="
    with pytest.raises(FileNotFoundError, match=missing):
        Generator.from_pretrained(moved)


def test_generator_needs_its_own_tokenizer(run: Path, other_tokenizer_path: Path) -> None:
    with pytest.raises(ValueError, match="was made with tokenizer") as error:
        Generator.from_pretrained(run, tokenizer=other_tokenizer_path)
    for name in (run, other_tokenizer_path):
        assert str(name) in str(error.value)
