"""Everything that may run under flash-attention, whose kernels refuse fp32."""

import pytest
import torch
from PIL import Image

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.understanding.build import build_llava
from vqrae.understanding.chat import Chat
from vqrae.understanding.conversation import ConversationCollator
from vqrae.understanding.packing import PackingCollator


@pytest.mark.parametrize(
    ("encoder", "features"),
    [("siglip", "continuous"), ("internvit", "quantized"), ("unitok", "quantized")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llava_is_built_and_keeps_exact_positions(
    dtype, encoder, features, flash_attention, make_tokenizer, llm_folder, tmp_path
):
    make_tokenizer(encoder).save_pretrained(tmp_path)
    model, _ = build_llava(tmp_path, llm_folder, flash_attention, features=features, dtype=dtype)
    tower = model.model.vision_tower
    for part in (tower, getattr(tower, "encoder", tower), model.model.language_model):
        assert part.config._attn_implementation == flash_attention
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_of_plain_attention(packed, flash_attention, fresh_llava):
    model, processor = fresh_llava
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
    scenes = [SceneDataset(item="conversation", num_questions=n)[n] for n in (1, 4)]
    records = [{"id": "t", "conversations": turns}, *scenes]
    losses = []
    for implementation in ("eager", flash_attention):
        collator = ConversationCollator(processor)
        if packed:
            collator = PackingCollator(processor, one_row=implementation == flash_attention)
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**collator(records)).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("batching", ["random", "packed"])
def test_both_stages_and_chat_on_their_fp32_folder(batching, flash_attention, launch, tmp_path):
    features = "features=quantized" if batching == "packed" else "features=continuous"
    launch("run", 1, f"batching={batching}", features, attn_implementation=flash_attention)
    options = {"attn_implementation": flash_attention, "device": "cpu"}
    chat = Chat.from_pretrained(tmp_path / "run", max_new_tokens=2, **options)
    assert chat.model.dtype == torch.bfloat16
    assert chat.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    image = Image.new("RGB", (64, 64), "red")
    assert len(chat.answer([(image, "what ?"), (None, "how many things are there ?")])) == 2
    with pytest.raises(ValueError, match="flash_attention_2 in fp32"):
        Chat.from_pretrained(tmp_path / "run", dtype="float32", **options)
