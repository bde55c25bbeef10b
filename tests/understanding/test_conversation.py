"""Exact answer masks with three kinds of text tokenizer, refused records, batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.samples import TooManyBrokenSamples
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.understanding.build import (
    build_llava,
    build_processor,
    for_pretraining,
)
from vqrae.understanding.conversation import (
    ConversationCollator,
    encode_conversation,
    examine_length,
    images_of,
    load_template,
    to_messages,
)
from vqrae.understanding.packing import PackingCollator


def _processor(text_tokenizer, chat_template="chatml"):
    encoder = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8}
    return build_processor(VQRAEConfig(encoder_config=encoder), text_tokenizer, chat_template)


@pytest.fixture
def processor(llm_folder):
    return _processor(AutoTokenizer.from_pretrained(llm_folder))


def _image(seed=0, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def _record(*turns, image=True, **extra):
    speakers = ("human", "gpt") * len(turns)
    shown = {"image": _image()} if image else {}
    said = [{"from": who, "value": value} for who, value in zip(speakers, turns, strict=False)]
    return {"id": "r1", "conversations": said, **shown, **extra}


QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TWO_ROUNDS = _record(
    "<image>\nwhat color is the star ?", "red", "and the circle ?", "two blue stars"
)


def _answers(sample, processor):
    """Text and start of each trained span."""
    trained = (sample["labels"] != IGNORE_INDEX).int()
    edges = torch.cat([trained[:1], trained.diff(), -trained[-1:]])
    starts, ends = ((edges == side).nonzero().flatten().tolist() for side in (1, -1))
    pieces = [sample["input_ids"][start:end] for start, end in zip(starts, ends, strict=True)]
    return [processor.tokenizer.decode(piece).strip() for piece in pieces], starts


def with_images(record):
    """The messages of a record as a chat at inference has them."""
    messages, images = to_messages(record), iter(images_of(record))
    for part in (part for message in messages for part in message["content"]):
        if part["type"] == "image":
            part["image"] = next(images)
    return messages


def _check_masks(processor, end):
    sample = encode_conversation(TWO_ROUNDS, processor)
    spans, starts = _answers(sample, processor)
    assert [span.replace(f" {end}", end) for span in spans] == [f"red{end}", f"two blue stars{end}"]
    assert int((sample["input_ids"] == processor.image_token_id).sum()) == 64
    # What training sees before an answer is what inference prompts with.
    messages = with_images(TWO_ROUNDS)
    for start, turns in zip(starts, (1, 3), strict=True):
        prompt = processor.apply_chat_template(
            messages[:turns], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert prompt["input_ids"][0] == sample["input_ids"][:start].tolist()
    return sample


def test_masks_with_the_word_tokenizer(processor):
    _check_masks(processor, "<|im_end|>")


def test_masks_with_byte_level_bpe(qwen_like):
    processor = _processor(qwen_like)
    sample = _check_masks(processor, "<|im_end|>")
    text = processor.tokenizer.decode(sample["input_ids"]).replace("<image>" * 64, "<image>")
    user, assistant, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    first = f"{user}<image>\nwhat color is the star ?{end}{assistant}red{end}"
    assert text == f"{first}{user}and the circle ?{end}{assistant}two blue stars{end}"
    assert sample["labels"][-1] == IGNORE_INDEX  # the newline after the end token


def test_vicuna_masks_and_a_single_bos(vicuna_like):
    processor = _processor(vicuna_like, "vicuna_v1")
    sample = _check_masks(processor, "</s>")
    assert int((sample["input_ids"] == processor.tokenizer.bos_token_id).sum()) == 1
    assert sample["input_ids"][0] == processor.tokenizer.bos_token_id
    text = processor.apply_chat_template(to_messages(TWO_ROUNDS), tokenize=False)
    assert text.startswith("<s> A chat between a curious user and an artificial intelligence")
    turns = "USER: <image> \nwhat color is the star ? ASSISTANT: red</s>"
    assert text.endswith(f"{turns}USER: and the circle ? ASSISTANT: two blue stars</s>")
    asked = processor.apply_chat_template(
        to_messages(TWO_ROUNDS)[:1], add_generation_prompt=True, tokenize=False
    )
    assert asked.endswith("ASSISTANT:")


@pytest.mark.parametrize("legacy", [False, True])
def test_tokens_and_labels_of_vicuna_are_llavas(legacy, train_llama_tokenizer):
    """Against LLaVA's own preprocess_plain and preprocess_v1, see golden/llava_tokens.py."""
    text_tokenizer = train_llama_tokenizer(legacy)
    assert "Llama" in type(text_tokenizer).__name__
    file = Path(__file__).parent / "golden" / "llava_tokens.json"
    golden = json.loads(file.read_text())[f"legacy={legacy}"]
    processor = _processor(text_tokenizer, "vicuna_v1")
    _check_masks(processor, "</s>")
    for name, template in (("plain", load_template("plain", text_tokenizer)), ("v1", None)):
        record = _record(*golden[name]["turns"])
        sample = encode_conversation(record, processor, chat_template=template)
        tokens = text_tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())
        labels = sample["labels"].tolist()
        trained = ["*" * (label != IGNORE_INDEX) for label in labels]
        expected = []
        for token in golden[name]["tokens"]:
            expected += [token] * (64 if token == "<image>" else 1)
        assert [mark + token for mark, token in zip(trained, tokens, strict=True)] == expected
        for shorter in (0, 1):
            options = {"max_length": len(tokens) - shorter, "chat_template": template}
            assert (examine_length(record, processor, **options) is None) == (shorter == 0)
    # What a server does, which adds no special tokens to a rendered chat.
    text = processor.apply_chat_template(
        to_messages(_record("what ?", "red", image=False))[:1], add_generation_prompt=True
    )
    served = text_tokenizer(text, add_special_tokens=False).input_ids
    assert text_tokenizer.convert_ids_to_tokens(served)[:9] == golden["v1"]["tokens"][:9]
    assert text_tokenizer.pad_token == "<unk>"


def test_qwen_masks_with_the_qwen_class(qwen_like, tmp_path):
    """A folder as Qwen publishes it, read by transformers' own Qwen2 class."""
    qwen_like.backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokens = {}
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        number = qwen_like.convert_tokens_to_ids(token)
        tokens[str(number)] = {"content": token, "special": True}
    described = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": tokens}
    described |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    described |= {"bos_token": None, "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    text_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert "Qwen2" in type(text_tokenizer).__name__
    sample = _check_masks(_processor(text_tokenizer), "<|im_end|>")
    assert sample["labels"][-1] == IGNORE_INDEX


def test_plain_drops_the_question_and_trains_the_caption(qwen_like):
    processor = _processor(qwen_like)
    record = _record("describe it briefly\n<image>", "a red circle")
    sample = encode_conversation(record, processor, chat_template=load_template("plain"))
    text = processor.tokenizer.decode(sample["input_ids"]).replace("<image>" * 64, "<image>")
    assert text == "<image>a red circle\n"
    assert (sample["labels"][:64] == IGNORE_INDEX).all()
    assert (sample["labels"][64:] != IGNORE_INDEX).all()


def test_image_goes_to_the_front_of_its_turn(processor):
    first = encode_conversation(_record("what is this ? <image>", "red"), processor)
    second = encode_conversation(_record("<image>\nwhat is this ?", "red"), processor)
    assert first["input_ids"].tolist() == second["input_ids"].tolist()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (_record("what is this ?", "red"), "'r1'.*1 image, but 0 <image>"),
        (_record("<image>\nwhat is this ?", "red", image=False), "'r1'.*no image, but 1 <image>"),
        (_record("<image> <image> what ?", "red"), "'r1'.*1 image, but 2 <image>"),
        (_record("what ?", "<image> red"), "'r1'.*<image> .* in an answer"),
        (_record("<image> what ?"), "'r1'.*no question with an answer"),
        (
            {"id": "r1", "conversations": [{"from": "human", "value": text} for text in "ab"]},
            "'r1': human and gpt must take turns",
        ),
    ],
)
def test_bad_records_are_refused_by_name(record, message, processor):
    with pytest.raises(ValueError, match=message):
        encode_conversation(record, processor)


def test_truncation_cuts_text_but_never_the_image(processor):
    whole = encode_conversation(TWO_ROUNDS, processor)
    cut = encode_conversation(TWO_ROUNDS, processor, max_length=len(whole["labels"]) - 4)
    assert torch.equal(cut["labels"], whole["labels"][:-4])
    with pytest.raises(ValueError, match=r"'r1' has an image beyond max_length 40"):
        encode_conversation(TWO_ROUNDS, processor, max_length=40)
    with pytest.raises(ValueError, match=r"'r1' has no answer within max_length 70"):
        encode_conversation(TWO_ROUNDS, processor, max_length=70)


def test_several_images_in_their_turns(processor):
    images = [_image(i) for i in range(3)]
    turns = ("<image>\n<image>\nwhat ?", "red", "<image> and this ?", "blue")
    record = {**_record(*turns), "image": images}
    sample = encode_conversation(record, processor)
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(sample["pixel_values"], expected)
    is_image = (sample["input_ids"] == processor.image_token_id).tolist()
    assert sum(is_image) == 3 * 64
    spans, starts = _answers(sample, processor)
    assert [span.split()[0] for span in spans] == ["red", "blue"]
    assert sum(is_image[: starts[0]]) == 2 * 64


def test_lengths_are_known_without_opening_a_image(processor):
    record = {**TWO_ROUNDS, "image": "no/such/file.png"}
    whole = len(encode_conversation(TWO_ROUNDS, processor)["labels"])
    assert examine_length(record, processor, max_length=whole) is None
    cut = examine_length(record, processor, max_length=whole - 1)
    assert cut[:2] == (f"conversations longer than max_length {whole - 1}, whose end is cut", False)
    for max_length in (60, 70):
        assert examine_length(record, processor, max_length=max_length).unusable
        with pytest.raises(ValueError, match="max_length"):
            encode_conversation(TWO_ROUNDS, processor, max_length=max_length)
    late = {**_record("what ?", "red", "<image> and this ?", "blue"), "image": "x.png"}
    assert "image beyond" in examine_length(late, processor, max_length=60).what


def test_padding_keeps_the_whole_image_and_pretraining_crops_it(qwen_like):
    encoder = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8}
    padding = build_processor(VQRAEConfig(encoder_config=encoder), qwen_like, aspect_ratio="pad")

    def pixels(processor, image):
        return processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]

    white = pixels(padding, Image.new("RGB", (128, 64), "white"))
    assert white.shape == (1, 3, 64, 64)
    assert white[0, :, 32].min() > 0.99
    assert white[0, :, :12].abs().max() < 0.02  # the mean colour is 0 after normalisation
    square, wide = _image(), _image(size=(60, 130))
    plain = _processor(qwen_like)
    torch.testing.assert_close(pixels(padding, square), pixels(plain, square))
    cropped = pixels(for_pretraining(padding), wide)
    torch.testing.assert_close(cropped, pixels(plain, wide), atol=1e-6, rtol=0)
    assert not torch.allclose(cropped, pixels(padding, wide), atol=0.1)


def test_unknown_template_is_refused():
    with pytest.raises(ValueError, match="chatml"):
        load_template("chatlm")


def test_batch_of_images_text_and_captions(processor):
    text_only = _record("how many things ?", "two", image=False)
    caption = {"image": SceneDataset()[0]["image"], "caption": "a photo of a star"}
    batch = ConversationCollator(processor)([TWO_ROUNDS, text_only, caption])
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    alone = [encode_conversation(record, processor) for record in (TWO_ROUNDS, text_only)]
    lengths = [len(sample["labels"]) for sample in alone]
    assert batch["attention_mask"].sum(1)[:2].tolist() == lengths
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    assert (batch["attention_mask"][1, : lengths[1]] == 1).all()


def test_text_only_batch_reaches_the_projector_without_changing_anything(
    tokenizer_folder, llm_folder
):
    model, processor = build_llava(tokenizer_folder, llm_folder)
    collator = ConversationCollator(processor)
    asked = (("how many things ?", "two"), ("color ?", "red"))
    batch = collator([_record(*turns, image=False) for turns in asked])
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    loss, gradients = _loss_and_gradients(model, batch)
    assert gradients["model.multi_modal_projector.linear_1.weight"].abs().max() == 0
    width = int(batch["attention_mask"].sum(1).max())
    bare = {name: batch[name][:, :width] for name in ("input_ids", "attention_mask", "labels")}
    expected_loss, expected = _loss_and_gradients(model, bare)
    torch.testing.assert_close(loss, expected_loss)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], msg=name)


@pytest.mark.parametrize("collator_class", [ConversationCollator, PackingCollator])
def test_records_that_cannot_be_trained_on_are_left_out_and_counted(
    collator_class, tokenizer_folder, llm_folder, capsys
):
    model, processor = build_llava(tokenizer_folder, llm_folder)
    collator = collator_class(processor, max_length=100)
    long = {**_record("<image>\n" + "what " * 100, "red"), "id": "long"}
    good = [TWO_ROUNDS, _record("how many things ?", "two", image=False)]
    batch = collator([good[0], long, good[1]])
    expected = collator_class(processor, max_length=100)(good)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), name
    assert "of the conversations so far): record 'long' has no answer" in capsys.readouterr().err
    empty = {**collator([long]), "num_items_in_batch": torch.tensor(1)}
    loss, gradients = _loss_and_gradients(model, empty)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())
    assert collator.broken.found == {"long"}
    with pytest.raises(TooManyBrokenSamples, match="6 of the 9 samples read so far are broken"):
        collator([{**long, "id": i} for i in range(6)])


@pytest.mark.parametrize("collator_class", [ConversationCollator, PackingCollator])
def test_logits_of_trained_tokens_alone_give_the_whole_loss(
    collator_class, tokenizer_folder, llm_folder
):
    model, processor = build_llava(tokenizer_folder, llm_folder)
    records = [TWO_ROUNDS, _record("how many things ?", "two", image=False)]
    batch = collator_class(processor)(records)
    loss, gradients = _loss_and_gradients(model, batch)
    output = model(**batch)
    assert output.logits.shape == (len(batch["shift_labels"]), model.config.text_config.vocab_size)
    del batch["logits_to_keep"], batch["shift_labels"]
    expected_loss, expected = _loss_and_gradients(model, batch)
    torch.testing.assert_close(loss, expected_loss)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], msg=name)


def _loss_and_gradients(model: LlavaForConditionalGeneration, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return loss.detach(), {name: gradient.clone() for name, gradient in trained}
