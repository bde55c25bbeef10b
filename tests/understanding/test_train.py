"""Whole tiny runs through `main`: what is trained, resume, what is refused, LoRA, LLaVA's files."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from vqrae.common.config import load_config, shipped_config
from vqrae.common.run import read_metrics
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.understanding import train
from vqrae.understanding.build import build_llava
from vqrae.understanding.chat import Chat
from vqrae.understanding.projector import load_projector
from vqrae.understanding.trainer import LoraSettings, add_lora, merge_lora


def changed(before, after):
    """First parts of the names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def chat_file(tmp_path):
    """Twelve records in LLaVA's format, half of them text, of very different lengths."""
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
    return tmp_path / "chat.json"


def test_both_stages_train_what_they_should(launch, tmp_path, capsys):
    run = tmp_path / "run"
    first = launch("run", 1, stage="pretrain")
    finished = launch("run", 2, stage="both")
    pretrained = load_file(run / "pretrain" / "model" / "model.safetensors")
    assert changed(first, pretrained) == {"multi_modal_projector"}
    assert changed(pretrained, finished) == {"multi_modal_projector", "language_model"}
    assert not list(run.rglob(".*staging"))
    assert not list((run / "model").glob("*.bin"))
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["use_cache"]
    manifest = json.loads((run / "sft" / "manifest.json").read_text())
    assert manifest["fingerprints"]["tokenizer"] == config["vqrae_tokenizer_fingerprint"]
    assert [row["step"] for row in read_metrics(run / "sft")] == [1, 2]
    chat = Chat.from_pretrained(run, max_new_tokens=2)
    assert len(chat.answer([(None, "how many things are there ?")])) == 1
    modified = (run / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    launch("run", 2, stage="both")
    assert "pretrain/model is finished (2 steps)" in capsys.readouterr().out
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == modified


LORA = (
    "lora.rank=4",
    "lora.learning_rate=1e-2",
    "lora.projector_learning_rate=1e-3",
)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("pretrain", ()),
        ("sft", ()),
        ("sft", ("batching=grouped",)),
        ("sft", ("batching=packed",)),
        ("sft", (*LORA, "features=quantized")),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(stage, options, chat_file, launch, tmp_path):
    pytest.importorskip("peft")
    given = {"stage": stage, "data": chat_file}
    whole = launch("whole", 5, *options, **given)
    launch("resumed", 4, *options, **given)  # in the second epoch
    checkpoint = tmp_path / "resumed" / stage / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    if stage == "pretrain":
        assert names >= {"mm_projector.bin", "config.json", "optimizer.pt", "scheduler.pt"}
        assert not names & {"model.safetensors", "training_args.bin"}
    assert changed(whole, launch("resumed", 5, *options, **given)) == set()
    runs = [read_metrics(tmp_path / run / stage) for run in ("whole", "resumed")]
    losses = [[(row["step"], row["loss"]) for row in run] for run in runs]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5]


def test_another_tokenizer_is_refused(launch, make_tokenizer, tmp_path):
    launch("run", 1, stage="pretrain")
    other = make_tokenizer()
    with torch.no_grad():
        other.in_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for stage in ("pretrain", "sft"):
        with pytest.raises(ValueError, match="was made with tokenizer"):
            launch("run", 1, stage=stage, tokenizer=tmp_path / "other")


def test_captions_of_another_file_train_the_projector(chat_file, launch, tmp_path):
    records = json.loads(chat_file.read_text())[::2]
    for record in records:
        record["conversations"] = record["conversations"][:2]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    launch("run", 1, stage="both", data=chat_file, pretrain_data=tmp_path / "captions.json")
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_step_whose_records_are_all_too_long_changes_nothing(launch, tmp_path):
    turns = [{"from": "human", "value": "what " * 300}, {"from": "gpt", "value": "red"}]
    records = [{"id": i, "conversations": turns} for i in range(4)]
    (tmp_path / "long.json").write_text(json.dumps(records))
    launch("run", 1, "max_length=100", stage="sft", data=tmp_path / "long.json")
    [row] = read_metrics(tmp_path / "run" / "sft")
    assert row["loss"] == row["grad_norm"] == 0


def test_llavas_projector_file_goes_out_and_in(launch, tokenizer_folder, llm_folder, tmp_path):
    weights = launch("run", 1, stage="pretrain")
    file = tmp_path / "run" / "pretrain" / "mm_projector.bin"
    stored = torch.load(file, weights_only=True)
    names = {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(stored) == names
    ours = weights["multi_modal_projector.linear_2.weight"]
    assert torch.equal(stored["model.mm_projector.2.weight"], ours)
    # As ZeRO-3 or an older trainer of theirs names them.
    theirs = {f"base.{name}": value + 1 for name, value in stored.items()}
    torch.save(theirs, tmp_path / "theirs.bin")
    given = [f"tokenizer={tokenizer_folder}", f"llm={llm_folder}", f"output_dir={tmp_path / 'x'}"]
    config = load_config(train.TrainConfig, shipped_config("vqrae.understanding", "tiny"), given)
    config = dataclasses.replace(config, projector=str(tmp_path / "theirs.bin"))
    projector = train.load_or_build(config, "pretrain")[0].model.multi_modal_projector
    assert torch.equal(projector.linear_1.bias, stored["model.mm_projector.0.bias"] + 1)
    for broken, message in (
        ({"a": torch.zeros(1)}, "no weights"),
        ({**stored, "mm_projector.4.bias": torch.zeros(1)}, "4.bias"),
        ({name: value[:2] for name, value in stored.items()}, "another encoder or language model"),
    ):
        torch.save(broken, tmp_path / "broken.bin")
        with pytest.raises(ValueError, match=message):
            load_projector(projector, tmp_path / "broken.bin")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_projector(projector, tmp_path / "missing.bin")


# ---- LoRA


def test_llavas_settings_and_a_rate_for_the_projector(tokenizer_folder, llm_folder, tmp_path):
    pytest.importorskip("peft")
    model, _ = build_llava(tokenizer_folder, llm_folder, dtype=torch.bfloat16)
    adapted = add_lora(model, LoraSettings())
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (128, 256, 0.05)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    # Every linear layer of the two blocks, and nothing of tower or head.
    assert len(adapters) == 2 * 2 * 7
    assert all("language_model.layers" in name for name in adapters)
    assert all("multi_modal_projector" in name for name in trained.keys() - adapters)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    optimization = train.OptimizationConfig(
        max_steps=1, global_batch_size=1, micro_batch_size=1, learning_rate=2e-4
    )
    arguments = train.training_arguments(optimization, tmp_path, seed=0)
    trainer = train.LlavaTrainer(model=adapted, args=arguments, projector_learning_rate=2e-5)
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        rates |= dict.fromkeys(map(id, group["params"]), group["lr"])
    assert len(rates) == len(trained)
    for name, parameter in trained.items():
        assert rates[id(parameter)] == (2e-5 if "multi_modal_projector" in name else 2e-4)


def test_merging_gives_the_outputs_of_the_adapter(tokenizer_folder, llm_folder, tmp_path):
    pytest.importorskip("peft")
    model, _ = build_llava(tokenizer_folder, llm_folder)
    torch.manual_seed(0)
    adapted = add_lora(model, LoraSettings(rank=4, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = adapted(**inputs).logits
        features = adapted.get_base_model().get_image_features(images).pooler_output
    fresh, _ = build_llava(tokenizer_folder, llm_folder)
    merged = merge_lora(fresh, tmp_path / "adapter")
    assert type(merged) is LlavaForConditionalGeneration
    assert not any("lora" in name for name in merged.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(merged.get_image_features(images).pooler_output, features)
