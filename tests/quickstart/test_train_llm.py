"""The small language model: a folder that speaks its own words, trained on text with context."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.sprites import SPRITE_SETS
from vqrae.quickstart import train_llm

SMALL = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.intermediate_size=64",
    "model.head_dim=8",
    "optimization.max_steps=1",
    "optimization.global_batch_size=2",
    "optimization.micro_batch_size=2",
]


def test_the_folder_speaks_its_own_words(tmp_path, capsys):
    command = ["tiny_llm", f"output_dir={tmp_path}", *SMALL]
    train_llm.main(command)
    train_llm.main(command)
    assert "is finished (1 steps)" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.use_cache
    assert model.get_input_embeddings().num_embeddings % 64 == 0
    # AutoTokenizer must not replace the word tokenizer by the architecture's own class.
    text_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "<|im_start|>user\n<image> what color is the circle?<|im_end|>"
    words = "<|im_start|> user <image> what color is the circle ? <|im_end|>"
    assert text_tokenizer.tokenize(text) == words.split()
    for sprites in SPRITE_SETS:
        scenes = SceneDataset(sprites=sprites)
        for i in range(20):
            texts = [scenes.caption(i), *(f"{q.text} {q.answer}" for q in scenes.questions(i))]
            assert text_tokenizer.unk_token_id not in text_tokenizer(" ".join(texts))["input_ids"]


def test_a_caption_is_the_context_of_a_dialogue():
    texts = train_llm.SceneText(["shapes", "emoji"])
    assert texts[0][0]["role"] == "assistant"
    dialogue = texts[2]
    assert dialogue[0]["content"].startswith("a photo of")
    assert [turn["role"] for turn in dialogue] == ["user", "assistant"] * (len(dialogue) // 2)


def test_flash_attention_gets_no_fp32_work(flash_attention, tmp_path):
    options = ["tiny_llm", f"attn_implementation={flash_attention}", *SMALL]
    train_llm.main([*options, f"output_dir={tmp_path / 'half'}"])
    with pytest.raises(ValueError, match="set bf16=true"):
        train_llm.main([*options, f"output_dir={tmp_path / 'full'}", "optimization.bf16=false"])
