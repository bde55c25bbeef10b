"""Everything that may run under flash-attention, whose kernels refuse fp32."""

import pytest
import torch
from PIL import Image

from vqrae.common.distributed import attention_implementation
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.quickstart import train_llm
from vqrae.understanding import train
from vqrae.understanding.build import build_llava
from vqrae.understanding.chat import Chat
from vqrae.understanding.conversation import ConversationCollator
from vqrae.understanding.packing import PackingCollator

STEPS = [
    f"{stage}.{key}={value}"
    for stage in ("pretrain", "sft")
    for key, value in {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 2}.items()
]


@pytest.mark.parametrize("encoder", ["siglip", "internvit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llava_is_built_and_keeps_exact_positions(
    dtype, encoder, flash_attention, make_tokenizer, llm_folder, tmp_path
):
    make_tokenizer(encoder).save_pretrained(tmp_path)
    model, _ = build_llava(tmp_path, llm_folder, flash_attention, dtype=dtype)
    layers = next(
        module
        for module in model.model.vision_tower.encoder.children()
        if isinstance(module, torch.nn.ModuleList)
    )
    parts = (layers[0], model.model.language_model.layers[0].self_attn)
    attentions = [getattr(part, "self_attn", getattr(part, "attention", part)) for part in parts]
    assert [part.config._attn_implementation for part in attentions] == [flash_attention] * 2
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_of_plain_attention(packed, flash_attention, tokenizer_folder, llm_folder):
    model, processor = build_llava(tokenizer_folder, llm_folder, "eager")
    text = {
        "id": "t",
        "conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}],
    }
    records = [text, *(SceneDataset(item="conversation", num_questions=n)[n] for n in (1, 4))]
    losses = []
    for implementation in ("eager", flash_attention):
        collator = (
            PackingCollator(processor, one_row=implementation == flash_attention)
            if packed
            else None
        )
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**(collator or ConversationCollator(processor))(records)).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("batching", ["random", "packed"])
def test_both_stages_and_chat_on_their_fp32_folder(
    batching, flash_attention, tokenizer_folder, llm_folder, tmp_path
):
    given = {
        "tokenizer": tokenizer_folder,
        "llm": llm_folder,
        "output_dir": tmp_path,
        "batching": batching,
    }
    given["attn_implementation"] = flash_attention
    train.main(["tiny", *(f"{key}={value}" for key, value in given.items()), *STEPS])
    chat = Chat.from_pretrained(
        tmp_path, attn_implementation=flash_attention, device="cpu", max_new_tokens=2
    )
    assert chat.model.dtype == torch.bfloat16
    assert chat.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    image = Image.new("RGB", (64, 64), "red")
    assert len(chat.answer([(image, "what ?"), (None, "how many things are there ?")])) == 2
    with pytest.raises(ValueError, match="flash_attention_2 in fp32"):
        Chat.from_pretrained(tmp_path, attn_implementation=flash_attention, dtype="float32")


def test_the_small_language_model_trains(flash_attention, tmp_path):
    steps = [
        f"optimization.{key}"
        for key in ("max_steps=1", "global_batch_size=2", "micro_batch_size=2")
    ]
    small = [
        f"model.{key}"
        for key in ("hidden_size=32", "num_hidden_layers=2", "intermediate_size=64", "head_dim=8")
    ]
    options = ["tiny_llm", f"attn_implementation={flash_attention}", *small, *steps]
    train_llm.main([*options, f"output_dir={tmp_path / 'half'}"])
    with pytest.raises(ValueError, match="set bf16=true"):
        train_llm.main([*options, f"output_dir={tmp_path / 'full'}", "optimization.bf16=false"])


def test_the_choice_follows_device_and_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", object())
    assert attention_implementation() == "flash_attention_2"
    assert attention_implementation(half=False) == "sdpa"
    assert attention_implementation(device="cpu") == "eager"
    assert attention_implementation("eager", half=False) == "eager"
