"""LoRA: what is trained, resume, and a merged folder that needs no peft."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from vqrae.common.run import read_metrics
from vqrae.common.trainer import OptimizationConfig, training_arguments
from vqrae.understanding import train
from vqrae.understanding.build import build_llava
from vqrae.understanding.trainer import LlavaTrainer, LoraSettings, add_lora, merge_lora

pytest.importorskip("peft")


def test_llavas_settings(tokenizer_folder, llm_folder):
    model, _ = build_llava(tokenizer_folder, llm_folder, dtype=torch.bfloat16)
    adapted = add_lora(model, LoraSettings())
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (128, 256, 0.05)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    # Every linear layer of the two blocks, and nothing of tower, projector or head.
    assert len(adapters) == 2 * 2 * 7
    assert all("language_model.layers" in name for name in adapters)
    assert {name.rpartition("default.")[2] for name in trained - adapters} == {
        f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_projector_has_a_rate_of_its_own(tokenizer_folder, llm_folder, tmp_path):
    model, _ = build_llava(tokenizer_folder, llm_folder)
    adapted = add_lora(model, LoraSettings(rank=4))
    optimization = OptimizationConfig(
        max_steps=1, global_batch_size=1, micro_batch_size=1, learning_rate=2e-4
    )
    arguments = training_arguments(optimization, tmp_path, seed=0)
    trainer = LlavaTrainer(model=adapted, args=arguments, projector_learning_rate=2e-5)
    rates = {
        id(p): group["lr"]
        for group in trainer.create_optimizer().param_groups
        for p in group["params"]
    }
    assert len(rates) == sum(p.requires_grad for p in adapted.parameters())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (2e-5 if "multi_modal_projector" in name else 2e-4)


def test_merging_gives_the_outputs_of_the_adapter(tokenizer_folder, llm_folder, tmp_path):
    model, _ = build_llava(tokenizer_folder, llm_folder)
    torch.manual_seed(0)
    adapted = add_lora(model, LoraSettings(rank=4, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
    }
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


def test_a_run_resumes_and_leaves_a_whole_folder(tokenizer_folder, llm_folder, tmp_path):
    options = [
        "global_batch_size=2",
        "micro_batch_size=2",
        "logging_steps=1",
        "lr_scheduler_type=constant_with_warmup",
    ]

    def launch(run, steps):
        given = [
            f"tokenizer={tokenizer_folder}",
            f"llm={llm_folder}",
            f"output_dir={tmp_path / run}",
            "stage=sft",
        ]
        lora = ["lora.rank=4", "lora.learning_rate=1e-2", "lora.projector_learning_rate=1e-3"]
        train.main(
            [
                "tiny",
                *given,
                *lora,
                *(
                    f"sft.{option}"
                    for option in [*options, "optimizer=adamw", f"max_steps={steps}"]
                ),
            ]
        )
        return load_file(tmp_path / run / "model" / "model.safetensors")

    whole = launch("whole", 4)
    first = launch("resumed", 2)
    resumed = launch("resumed", 4)
    assert first.keys() == whole.keys()
    assert {name.split(".")[0] for name in whole if not torch.equal(whole[name], first[name])} == {
        "language_model",
        "multi_modal_projector",
    }
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert [r["loss"] for r in read_metrics(tmp_path / "whole" / "sft")] == [
        r["loss"] for r in read_metrics(tmp_path / "resumed" / "sft")
    ]
    assert (tmp_path / "whole" / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (
        "llava",
        ["LlavaForConditionalGeneration"],
    )
    _, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "whole" / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        report
    )
