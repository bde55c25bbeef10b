"""Whole tiny runs through `main`: both stages, resume, finished runs, the language model."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vqrae.common.config import load_config, shipped_config
from vqrae.common.run import read_metrics
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.sprites import SPRITE_SETS
from vqrae.quickstart import train_llm
from vqrae.understanding import train
from vqrae.understanding.build import load_projector
from vqrae.understanding.chat import Chat

OPTIMIZATION = {
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "logging_steps": 1,
    "lr_scheduler_type": "constant_with_warmup",
}


def _options(prefix, **values):
    return [f"{prefix}.{key}={value}" for key, value in {**OPTIMIZATION, **values}.items()]


@pytest.fixture
def arguments(tokenizer_folder, llm_folder, tmp_path):
    """Command line of a small run in `tmp_path/run`."""

    def build(steps=2, run="run", **options):
        given = {
            "tokenizer": tokenizer_folder,
            "llm": llm_folder,
            "output_dir": tmp_path / run,
            **options,
        }
        stages = [*_options("pretrain", max_steps=steps), *_options("sft", max_steps=steps)]
        return ["tiny", *(f"{key}={value}" for key, value in given.items()), *stages]

    return build


def _weights(folder):
    return load_file(folder / "model.safetensors")


def _changed(before, after):
    """First parts of the names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_both_stages_train_what_they_should(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(arguments(stage="pretrain"))
    train.main(arguments(stage="both"))
    assert "pretrain/model is finished (2 steps)" in capsys.readouterr().out  # found finished
    assert {path.name for path in (run / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "processor_config.json",
    }
    assert not list(run.rglob(".*staging"))
    assert not list((run / "model").glob("*.bin"))
    pretrained, finished = _weights(run / "pretrain" / "model"), _weights(run / "model")
    assert _changed(pretrained, finished) == {"multi_modal_projector", "language_model"}
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["use_cache"]
    manifest = json.loads((run / "sft" / "manifest.json").read_text())
    assert manifest["fingerprints"]["tokenizer"] == config["vqrae_tokenizer_fingerprint"]
    assert [row["step"] for row in read_metrics(run / "sft")] == [1, 2]
    assert (
        len(
            Chat.from_pretrained(run, max_new_tokens=2).answer(
                [(None, "how many things are there ?")]
            )
        )
        == 1
    )
    modified = (run / "model" / "model.safetensors").stat().st_mtime_ns
    train.main(arguments(stage="both"))
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == modified


def test_pretrain_moves_the_projector_only(arguments, tmp_path):
    train.main(arguments(stage="pretrain", steps=1))
    first = _weights(tmp_path / "run" / "pretrain" / "model")
    train.main(arguments(stage="pretrain", steps=3))
    assert _changed(first, _weights(tmp_path / "run" / "pretrain" / "model")) == {
        "multi_modal_projector"
    }


def test_two_and_two_steps_equal_four(arguments, tmp_path):
    train.main(arguments(stage="sft", steps=4, run="whole"))
    train.main(arguments(stage="sft", steps=2, run="resumed"))
    train.main(arguments(stage="sft", steps=4, run="resumed"))
    assert (
        _changed(_weights(tmp_path / "whole" / "model"), _weights(tmp_path / "resumed" / "model"))
        == set()
    )
    rows = [
        [(row["step"], row["loss"]) for row in read_metrics(tmp_path / run / "sft")]
        for run in ("whole", "resumed")
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == [1, 2, 3, 4]


def test_pretrain_keeps_and_resumes_the_projector_alone(arguments, tmp_path):
    train.main(arguments(stage="pretrain", steps=4, run="whole"))
    train.main(arguments(stage="pretrain", steps=2, run="resumed"))
    checkpoint = tmp_path / "resumed" / "pretrain" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert names >= {
        "mm_projector.bin",
        "config.json",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "rng_state.pth",
    }
    assert not names & {"model.safetensors", "training_args.bin"}
    train.main(arguments(stage="pretrain", steps=4, run="resumed"))
    whole, resumed = (
        _weights(tmp_path / run / "pretrain" / "model") for run in ("whole", "resumed")
    )
    assert _changed(whole, resumed) == set()
    rows = [
        [(row["step"], row["loss"]) for row in read_metrics(tmp_path / run / "pretrain")]
        for run in ("whole", "resumed")
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == [1, 2, 3, 4]


def test_llavas_projector_file_goes_out_and_in(arguments, tmp_path):
    train.main(arguments(stage="pretrain", steps=1))
    file = tmp_path / "run" / "pretrain" / "mm_projector.bin"
    stored = torch.load(file, weights_only=True)
    assert set(stored) == {
        f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    weights = _weights(tmp_path / "run" / "pretrain" / "model")
    assert torch.equal(
        stored["model.mm_projector.2.weight"], weights["multi_modal_projector.linear_2.weight"]
    )
    # As ZeRO-3 or an older trainer of theirs names them: whatever stands in front goes.
    torch.save(
        {f"base.{name}": value + 1 for name, value in stored.items()}, tmp_path / "theirs.bin"
    )
    config = load_config(
        train.TrainConfig, shipped_config("vqrae.understanding", "tiny"), arguments()[1:]
    )
    config = dataclasses.replace(
        config, projector=str(tmp_path / "theirs.bin"), output_dir=str(tmp_path / "other")
    )
    model, _ = train.load_or_build(config, "pretrain")
    assert torch.equal(
        model.model.multi_modal_projector.linear_1.bias, stored["model.mm_projector.0.bias"] + 1
    )
    projector = model.model.multi_modal_projector
    for broken, message in (
        ({"a": torch.zeros(1)}, "no weights"),
        ({**stored, "mm_projector.4.bias": torch.zeros(1)}, "4.bias"),
    ):
        torch.save(broken, tmp_path / "broken.bin")
        with pytest.raises(ValueError, match=message):
            load_projector(projector, tmp_path / "broken.bin")
    torch.save({name: value[:2] for name, value in stored.items()}, tmp_path / "broken.bin")
    with pytest.raises(ValueError, match="another encoder or language model"):
        load_projector(projector, tmp_path / "broken.bin")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_projector(projector, tmp_path / "missing.bin")


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_batching_resumes_in_the_second_epoch(batching, arguments, tmp_path):
    records = []
    for i in range(6):
        record = SceneDataset(size=6, item="conversation", num_questions=1 + i)[i]
        record.pop("image").save(tmp_path / f"{i}.png")
        records.append({**record, "image": f"{i}.png"})
        turns = [
            {"from": "human", "value": "what color is the star ?"},
            {"from": "gpt", "value": "red " * (1 + 5 * i)},
        ]
        records.append({"id": f"t{i}", "conversations": turns})
    (tmp_path / "chat.json").write_text(json.dumps(records))
    options = {"stage": "sft", "data": tmp_path / "chat.json", "batching": batching}
    train.main(arguments(steps=6, run="whole", **options))
    train.main(arguments(steps=4, run="resumed", **options))
    train.main(arguments(steps=6, run="resumed", **options))
    assert (
        _changed(_weights(tmp_path / "whole" / "model"), _weights(tmp_path / "resumed" / "model"))
        == set()
    )


def test_another_tokenizer_is_refused(arguments, make_tokenizer, tmp_path):
    train.main(arguments(stage="pretrain"))
    other = make_tokenizer()
    with torch.no_grad():
        other.in_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for stage in ("pretrain", "sft"):
        with pytest.raises(ValueError, match="was made with tokenizer"):
            train.main(arguments(stage=stage, tokenizer=tmp_path / "other"))


def test_llava_file_trains_both_stages(arguments, tmp_path):
    records = []
    for i, record in enumerate(SceneDataset(size=4, item="conversation")):
        record.pop("image").save(tmp_path / f"{i}.png")
        records.append({**record, "image": f"{i}.png"})
        if i == 3:
            break
    text_only = [{"from": "human", "value": "how many things ?"}, {"from": "gpt", "value": "two"}]
    sft, captions = tmp_path / "sft.json", tmp_path / "captions.json"
    captions.write_text(
        json.dumps([{**r, "conversations": r["conversations"][:2]} for r in records])
    )
    sft.write_text(
        json.dumps([*records, *({"id": f"t{i}", "conversations": text_only} for i in range(8))])
    )
    train.main(arguments(data=sft, pretrain_data=captions))
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_language_model_folder_speaks_its_own_words(tmp_path):
    command = [
        "tiny_llm",
        f"output_dir={tmp_path}",
        *_options("optimization", max_steps=2),
        "model.hidden_size=32",
    ]
    train_llm.main(command)
    train_llm.main(command)  # finished: returns at once
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.use_cache
    # AutoTokenizer must not replace the word tokenizer by the architecture's own class.
    text_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "<|im_start|>user\n<image> what color is the circle?<|im_end|>"
    words = [
        "<|im_start|>",
        "user",
        "<image>",
        "what",
        "color",
        "is",
        "the",
        "circle",
        "?",
        "<|im_end|>",
    ]
    assert text_tokenizer.tokenize(text) == words
    assert model.get_input_embeddings().num_embeddings % 64 == 0
    for sprites in SPRITE_SETS:
        scenes = SceneDataset(sprites=sprites)
        for i in range(20):
            said = [scenes.caption(i), *(f"{q.text} {q.answer}" for q in scenes.questions(i))]
            assert text_tokenizer.unk_token_id not in text_tokenizer(" ".join(said))["input_ids"]


def test_language_model_trains_on_all_tokens_with_the_caption_as_context():
    texts = train_llm.SceneText(["shapes", "emoji"])
    assert texts[0][0]["role"] == "assistant"
    dialogue = texts[2]
    assert dialogue[0]["content"].startswith("a photo of")
    assert [message["role"] for message in dialogue] == ["user", "assistant"] * (len(dialogue) // 2)


def test_a_step_whose_records_are_all_too_long_changes_nothing(arguments, tmp_path):
    turns = [{"from": "human", "value": "what " * 300}, {"from": "gpt", "value": "red"}]
    (tmp_path / "long.json").write_text(
        json.dumps([{"id": i, "conversations": turns} for i in range(2)])
    )
    own = arguments(stage="sft", steps=1, data=tmp_path / "long.json", max_length=100)
    train.main([*own, "sft.global_batch_size=2", "sft.weight_decay=0", "sft.optimizer=adamw"])
    [row] = read_metrics(tmp_path / "run" / "sft")
    assert row["loss"] == row["grad_norm"] == 0
