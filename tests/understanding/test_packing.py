"""Packed batches: the loss and gradients of every sample are those of the sample alone."""

import random

import pytest
import torch
import torch.nn.functional as F

from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.understanding.build import build_llava
from vqrae.understanding.conversation import ConversationCollator, samples_of
from vqrae.understanding.packing import (
    PackingCollator,
    SeparateCollator,
    encode_turns,
    lay_out,
    visible,
)


def _text(words, name="text"):
    turns = [
        {"from": "human", "value": "what color is the star ?"},
        {"from": "gpt", "value": " ".join(["red"] * words)},
    ]
    return {"id": name, "conversations": turns}


@pytest.fixture(scope="module")
def records():
    scenes = [SceneDataset(item="conversation", num_questions=n)[n] for n in (1, 6, 3)]
    return [_text(3), scenes[0], _text(90), scenes[1], _text(1), scenes[2], _text(20)]


def test_rows_hold_every_sample_once_with_little_padding():
    rng = random.Random(0)
    for _ in range(20):
        lengths = [rng.randint(1, 500) for _ in range(16)]
        rows = lay_out(lengths)
        assert sorted(i for row in rows for i in row) == list(range(16))
        width = max(sum(lengths[i] for i in row) for row in rows)
        assert max(lengths) <= width <= 2 * max(lengths)
        assert sum(lengths) > 0.8 * width * len(rows)
    assert lay_out([7]) == [[0]]


@pytest.mark.parametrize(
    ("attention", "one_row"), [("eager", False), ("sdpa", False), ("eager", True), ("sdpa", True)]
)
def test_every_sample_has_the_loss_that_it_has_alone(
    attention, one_row, tokenizer_folder, llm_folder, records
):
    torch.manual_seed(0)
    model, processor = build_llava(tokenizer_folder, llm_folder, attention)
    # A cache would silently let samples see each other.
    model.model.language_model.config.use_cache = True
    alone = {}
    for record in records:
        batch = ConversationCollator(processor)([record])
        key = _key(batch["input_ids"][0], batch["labels"][0])
        alone[key] = _loss(model, batch, 0, slice(0, None))
    packed = PackingCollator(processor, one_row=one_row)(records)
    rows = packed["input_ids"].shape[0]
    assert rows == 1 if one_row else rows < len(records)
    found = {}
    for row, columns in samples_of(packed):
        key = _key(packed["input_ids"][row, columns], packed["labels"][row, columns])
        found[key] = _loss(model, packed, row, columns)
    assert len(found) == len(records)
    for key, loss in found.items():
        torch.testing.assert_close(loss, alone[key], atol=1e-5, rtol=1e-5)


def _key(input_ids, labels):
    """What identifies a sample: its tokens up to the last trained one, without padding."""
    last = int(torch.nonzero(labels != IGNORE_INDEX).max()) + 1
    return tuple(input_ids[:last].tolist())


@torch.no_grad()
def _loss(model, batch, row, columns):
    inputs = {**batch}
    for name in ("labels", "logits_to_keep", "shift_labels"):
        inputs.pop(name, None)
    logits, labels = model(**inputs).logits[row, columns], batch["labels"][row, columns]
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX)


def test_gradients_are_those_of_the_padded_batch(tokenizer_folder, llm_folder, records):
    model, processor = build_llava(tokenizer_folder, llm_folder)
    gradients = []
    for collator in (ConversationCollator(processor), PackingCollator(processor)):
        model.zero_grad()
        loss = model(**collator(records)).loss
        loss.backward()
        trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({"loss": loss.detach(), **trained})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-3, msg=name)


def test_a_batch_without_images_still_runs_the_projector(tokenizer_folder, llm_folder):
    model, processor = build_llava(tokenizer_folder, llm_folder)
    texts = [_text(3), _text(8)]
    packed = PackingCollator(processor)(texts)
    assert packed["pixel_values"].shape[0] == 1
    loss = model(**packed).loss
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() == 0
    torch.testing.assert_close(loss, model(**ConversationCollator(processor)(texts)).loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_separate_questions_have_the_loss_that_each_has_alone(
    attention, tokenizer_folder, llm_folder, records
):
    torch.manual_seed(0)
    model, processor = build_llava(tokenizer_folder, llm_folder, attention)
    alone = []
    for record in records:
        turns = record["conversations"]
        head = "<image>\n" if "image" in record else ""
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            text = head + question["value"].removeprefix(head)
            asked = [{"from": "human", "value": text}, answer]
            alone.append({**record, "conversations": asked})
    separate = SeparateCollator(processor)(records)
    expected = ConversationCollator(processor)(alone)
    assert separate["input_ids"].numel() < 0.8 * expected["input_ids"].numel()
    with torch.no_grad():
        losses = [model(**batch).loss for batch in (separate, expected)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert abs(losses[0] - model(**PackingCollator(processor)(records)).loss) > 1e-4


def test_a_token_sees_its_question_and_what_all_share():
    #               sample of two questions | another sample
    seen = visible(torch.tensor([[0, 1, 2, 1, 2, 0, 1]]))[0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_an_image_of_a_later_question_is_refused(tokenizer_folder, llm_folder, records):
    processor = build_llava(tokenizer_folder, llm_folder)[1]
    late = _text(1)["conversations"] + records[1]["conversations"]
    with pytest.raises(ValueError, match="after its first question"):
        encode_turns({**records[1], "conversations": late}, processor)
