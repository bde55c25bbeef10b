"""Training: the loss over all targets, resume, two processes, and what a trained model can do."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import launch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaProcessor

from vqrae.common.config import load_config
from vqrae.common.images import image_to_tensor
from vqrae.common.run import read_metrics
from vqrae.generation.data import TrainingStream, encode_images, fill_codes
from vqrae.generation.sampling import SamplingConfig
from vqrae.mllm import train
from vqrae.mllm.build import image_prompt
from vqrae.mllm.config import MLLMConfig
from vqrae.mllm.data import open_tasks
from vqrae.mllm.inference import UnifiedChat, UnifiedGenerator, open_chat, open_generator
from vqrae.mllm.modeling import UnifiedConfig
from vqrae.mllm.sequences import SequenceEncoder, UnifiedCollator
from vqrae.scripts.cli import main as vqrae
from vqrae.tokenizer.modeling import VQRAEModel

LOSSES = ("loss", "image_loss", "text_loss")
GREEDY = SamplingConfig(guidance_scale=1.0, temperature=0.0)
NAMES = ["red circle", "blue star"]
OVERFIT = {"max_steps": 160, "global_batch_size": 6, "micro_batch_size": 6, "learning_rate": 1e-2}
OVERFIT |= {"bf16": "false", "logging_steps": 20}


def losses(run: Path) -> list[list[float]]:
    return [[row[name] for name in LOSSES] for row in read_metrics(run)]


@pytest.fixture(scope="module")
def arguments_of_eight(arguments: list[str], tokenizers: dict[str, Path]) -> list[str]:
    return [*arguments, f"tokenizer={tokenizers['eight']}"]


@pytest.fixture(scope="module")
def run(arguments_of_eight: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps of 2 micro-batches."""
    folder = tmp_path_factory.mktemp("run")
    train.main([*arguments_of_eight, f"output_dir={folder}"])
    return folder


@pytest.fixture(scope="module", params=["one", "eight"])
def taught(
    request: pytest.FixtureRequest,
    arguments: list[str],
    tokenizers: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run that knows two images by heart."""
    folder = tmp_path_factory.mktemp("taught")
    given = [f"optimization.{key}={value}" for key, value in OVERFIT.items()]
    given += [f"tokenizer={tokenizers[request.param]}", "caption_dropout=0", "captioning.weight=0"]
    train.main([*arguments, *given, f"output_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def images(world: Path) -> list[Image.Image]:
    return [Image.open(world / f"{i}.png") for i in range(len(NAMES))]


def collator(config: UnifiedConfig, processor: LlavaProcessor) -> UnifiedCollator:
    prompt = image_prompt(config, processor.tokenizer)
    encode = SequenceEncoder(processor, prompt, config.end_of_image)
    return UnifiedCollator(encode, prompt.vocabulary.code_shape)


# ---- the loss


def test_loss_is_the_mean_over_codes_and_text(run: Path) -> None:
    """(n_img (CE + 5e-5 mean max²) + n_txt CE_txt) / (n_img + n_txt), whatever shares a batch."""
    chat = open_chat(run)
    model: Any = chat.model
    collate = collator(model.config, chat.processor)
    encode = collate.encode
    codes = torch.randint(16, (3, 16, 8), generator=torch.Generator().manual_seed(0))
    turns = [{"from": "human", "value": "what is it ?"}, {"from": "gpt", "value": "a star"}]
    samples = [
        {"task": "generation", "caption": "a red circle", "codes": codes[0]},
        {"task": "captioning", "answer": "a photo of two stars", "codes": codes[1]},
        {"task": "instructions", "id": "r", "conversations": turns},
        {"task": "generation", "caption": "", "codes": codes[2]},
    ]
    batch = collate(samples)
    output = model(**batch)
    vectors = model.embed(batch["input_ids"], batch["codes"], batch["image_places"])
    mask = batch["attention_mask"]
    hidden = model.llm.model(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
    image, text = [], []
    for row, sample in zip(range(4), samples, strict=True):
        encoded = encode(sample)
        places = torch.nonzero(encoded["labels"] >= 0).flatten()
        logits = model.llm.lm_head(hidden[row, places - 1])
        text.append(F.cross_entropy(logits, encoded["labels"][places], reduction="none"))
        if sample["task"] == "generation":
            first = int((encoded["input_ids"] == encode.boi).nonzero())
            logits = model.head(hidden[row, first : first + 16], sample["codes"]).flatten(0, 1)
            entropy = F.cross_entropy(logits, sample["codes"].flatten(), reduction="none")
            image.append(entropy + 5e-5 * logits.max(-1).values ** 2)
    parts = [torch.cat(image), torch.cat(text)]
    assert (batch["num_image_codes"], batch["num_targets"]) == (2 * 128, 2 * 128 + len(parts[1]))
    torch.testing.assert_close(output.loss, torch.cat(parts).mean())
    torch.testing.assert_close(output.sums, torch.stack([part.sum() for part in parts]))
    alone = [collate([sample]) for sample in samples]
    shares = [model(**each, num_items_in_batch=batch["num_targets"]).loss for each in alone]
    torch.testing.assert_close(output.loss, torch.stack(shares).sum())
    # Without an image to generate all parts still take part, with gradient 0.
    model.zero_grad()
    model(**alone[2]).loss.backward()
    assert model.head.classifier.weight.grad.abs().max() == 0
    assert model.embedding.mlp[1].weight.grad.abs().max() == 0
    assert model.llm.model.norm.weight.grad.abs().max() > 0


# ---- runs


def test_resume_equals_uninterrupted(
    run: Path, arguments_of_eight: list[str], tmp_path: Path
) -> None:
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    train.main([*arguments_of_eight, "previews=2", f"output_dir={tmp_path}"])
    assert (tmp_path / "samples" / "step-4.png").is_file()
    found, expected = (load_file(each / "model/model.safetensors") for each in (tmp_path, run))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(tmp_path) == losses(run)[2:]


@pytest.mark.slow
def test_processes_and_micro_batches_change_nothing(
    arguments_of_eight: list[str], tmp_path: Path
) -> None:
    """One process, and two that accumulate, see other numbers of targets in each micro-batch."""
    given = [*arguments_of_eight, "optimization.bf16=false", "optimization.max_steps=2"]
    launch(train.__name__, [*given, f"output_dir={tmp_path / 'one'}"], processes=1)
    given += ["optimization.micro_batch_size=2", f"output_dir={tmp_path / 'two'}"]
    launch(train.__name__, given, processes=2)
    one, two = (torch.tensor(losses(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    norms = [[row["grad_norm"] for row in read_metrics(tmp_path / n)] for n in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.slow
def test_two_processes_under_zero3_compute_the_same_loss(
    arguments_of_eight: list[str], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """ZeRO-3 draws other weights: at rate 0 the saved model must repeat the logged losses."""
    pytest.importorskip("deepspeed")
    options = ["max_steps=1", "learning_rate=0.0", "zero=3", "micro_batch_size=2"]
    given = [*arguments_of_eight, *(f"optimization.{option}" for option in options)]
    launch(train.__name__, [*given, f"output_dir={tmp_path}"], processes=2)
    generator: Any = open_generator(tmp_path)
    model, tokenizer = generator.model, VQRAEModel.from_pretrained(tokenizers["eight"])
    expected = {"code_vectors": tokenizer.code_vectors()}
    expected |= {f"projection.{k}": v for k, v in tokenizer.out_proj.state_dict().items()}
    found = model.embedding.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-2, rtol=1e-2)  # kept in bf16
    config = load_config(MLLMConfig, tmp_path / "config.yaml")
    samples = open_tasks(config, image_size=32, tokenizer_fingerprint="")
    stream = TrainingStream(samples, 8, caption_dropout=config.caption_dropout)
    processor = open_chat(tmp_path).processor
    batch = collator(model.config, processor)([stream[i] for i in range(8)])
    batch = fill_codes(batch, partial(encode_images, tokenizer))
    counts = torch.stack([batch["num_image_codes"], batch["num_targets"]])
    mean = model(**batch).sums / counts.diff(prepend=torch.zeros(1, dtype=torch.int64))
    assert losses(tmp_path)[0][1:] == pytest.approx(mean.tolist(), rel=0.02)


def test_another_tokenizer_is_refused(
    run: Path, arguments: list[str], tokenizers: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=r"generator .* was made with tokenizer"):
        train.main([*arguments, f"tokenizer={tokenizers['one']}", f"output_dir={run}"])
    with pytest.raises(ValueError, match="was made with tokenizer"):
        open_chat(run, tokenizer=tokenizers["one"])


# ---- what it can do


def test_it_generates_and_answers_what_it_was_taught(
    taught: Path, images: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chat, generator = open_chat(taught), open_generator(taught)
    assert isinstance(chat, UnifiedChat)
    assert isinstance(generator, UnifiedGenerator)
    asked = [(image, "what is it ?") for image in images]
    assert chat.answer([*asked, (None, "it ?")])[:2] == NAMES  # padded in front
    shown: Tensor = torch.stack([image_to_tensor(image) for image in images])
    prompts = [f"a {name}" for name in NAMES]
    made = generator.images(prompts, seeds=[0, 1], sampling=GREEDY)
    assert made.equal(generator.tokenizer.decode(generator.tokenizer.encode(shown)))
    with pytest.raises(ValueError, match="knows no unconditional prompt"):
        generator.images(prompts, seeds=[0, 1])  # guided, as the configuration recommends
    # The commands take the folder, too.
    images[0].save(tmp_path / "image.png")
    model = ["--model", str(taught)]
    vqrae(["chat", *model, "--image", str(tmp_path / "image.png"), "--question", "what is it ?"])
    assert capsys.readouterr().out.strip() == NAMES[0]
    sampling = ["--sampling.guidance-scale", "1", "--num-images", "1"]
    vqrae(["generate", *model, "--prompt", prompts[0], *sampling, "--out", str(tmp_path)])
    assert (tmp_path / "0000-0.png").is_file()
