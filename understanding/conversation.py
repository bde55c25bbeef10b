"""LLaVA records as training samples: chat templates, exact answer masks, batches.

A record is `{"id", "image": image (absent for text only), "conversations": [{"from": "human" | "gpt", "value"}, …]}`.
Which tokens are trained is marked in the chat template (`{% generation %}`) and read back by
`apply_chat_template(…, return_assistant_tokens_mask=True)`. Nothing here counts token lengths: that is what fails with
every text tokenizer that LLaVA's constants were not tuned for ("tokenization mismatch", loss 0).

Shapes: T text length with image tokens expanded, B batch, P images.
"""

from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from vqrae.common.config import did_you_mean
from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.report import Issue
from vqrae.data.samples import BrokenSamples

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
CHAT_TEMPLATES = ("chatml", "vicuna_v1")
"""What a chat model speaks; `plain` (image, then caption) is LLaVA's format for training the projector alone."""


def load_template(name: str, text_tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The Jinja text of `chatml`, `vicuna_v1` or `plain`.

    Args:
        text_tokenizer: whose ids the text must become as in LLaVA, which reads what follows an image, or `<s>`, as a text of
            its own. Llama's puts a space in front of such a text, but not behind a special token: there the template does.

    Raises:
        ValueError: for another name, listing the known ones.
    """
    known = (*CHAT_TEMPLATES, "plain")
    if name not in known:
        raise ValueError(f"unknown chat template {name!r}. {did_you_mean(name, known)}")
    template = (resources.files("vqrae.understanding") / f"{name}.jinja").read_text().rstrip("\n")
    if text_tokenizer is None or name == "chatml" or not _needs_space(text_tokenizer):
        return template
    return "{%- set space = ' ' -%}" + template


def _needs_space(text_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text behind a special token is read like a text of its own only with a space between them."""
    special, text = text_tokenizer.eos_token, "red"
    alone = text_tokenizer(text, add_special_tokens=False).input_ids
    behind, spaced = (
        text_tokenizer(f"{special}{space}{text}", add_special_tokens=False).input_ids[1:]
        for space in ("", " ")
    )
    return behind != alone == spaced


def caption_record(sample: dict[str, Any]) -> dict[str, Any]:
    """A caption pair `{"image", "caption"}` as a LLaVA record."""
    turns = [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": sample["caption"]}]
    return {
        "id": sample.get("id", sample["caption"]),
        "image": sample["image"],
        "conversations": turns,
    }


def to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a record as Hugging Face chat messages that carry their images.

    As in LLaVA, a leading gpt turn is dropped and the image goes to the front of its turn (the template puts a newline
    behind it).

    Raises:
        ValueError: naming the record, when `<image>` tags and images do not match or the turns do not alternate.
    """
    where = f"record {record.get('id')!r}"
    turns = record["conversations"]
    turns = turns[1:] if turns and turns[0]["from"] == "gpt" else turns
    images = _images(record)
    tags = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if tags != len(images):
        raise ValueError(
            f"{where}: got {len(images)} images and {tags} {IMAGE_TOKEN} tags, expected as many of one as of the other: "
            f"set the key 'image', or write {IMAGE_TOKEN} into a human turn"
        )
    left = iter(images)
    messages = []
    for i, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[i % 2]:
            raise ValueError(
                f"{where}: turn {i} is from {turn['from']!r}, expected human and gpt in alternation"
            )
        tags = turn["value"].count(IMAGE_TOKEN)
        if tags and turn["from"] == "gpt":
            raise ValueError(
                f"{where}: turn {i} is an answer with {IMAGE_TOKEN}, expected the tag in a human turn"
            )
        content = [{"type": "image", "image": next(left)} for _ in range(tags)]
        content.append({"type": "text", "text": turn["value"].replace(IMAGE_TOKEN, "").strip()})
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return messages


def _images(record: dict[str, Any]) -> list[Any]:
    image = record.get("image")
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def encode_conversation(
    record: dict[str, Any],
    processor: LlavaProcessor,
    *,
    max_length: int = 2048,
    chat_template: str | None = None,
) -> dict[str, Tensor]:
    """Encode one record for training.

    Args:
        max_length: tokens kept, image tokens included; the end of a longer text is cut.
        chat_template: Jinja text; None takes the processor's own.

    Returns:
        input_ids (T,), labels (T,) with `IGNORE_INDEX` on everything but answers and their end tokens, and
        pixel_values (P, 3, H, W) when the record has images.

    Raises:
        ValueError: naming the record, for a bad record (see `to_messages`), when cutting would hit image tokens, or when
            no token is left to train on.
    """
    # No return_tensors: the mask is computed token by token, ten times slower on a tensor of offsets than on a list.
    encoded = processor.apply_chat_template(
        to_messages(record),
        chat_template=chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    input_ids = torch.tensor(encoded["input_ids"][0])
    trained = torch.tensor(encoded["assistant_masks"][0], dtype=torch.bool)
    where = f"record {record.get('id')!r}"
    if (input_ids[max_length:] == processor.image_token_id).any():
        raise ValueError(
            f"{where}: its image tokens reach beyond max_length {max_length}: set a larger max_length"
        )
    input_ids, trained = input_ids[:max_length], trained[:max_length]
    # The first token is never predicted, so it does not count.
    if not trained[1:].any():
        raise ValueError(f"{where}: no answer to train on within max_length {max_length}")
    sample = {"input_ids": input_ids, "labels": input_ids.where(trained, IGNORE_INDEX)}
    if "pixel_values" in encoded:
        sample["pixel_values"] = torch.stack(list(encoded["pixel_values"]))
    return sample


def examine_length(
    record: dict[str, Any],
    processor: LlavaProcessor,
    *,
    max_length: int = 2048,
    chat_template: str | None = None,
) -> Issue | None:
    """What `encode_conversation` would cut off a record, from its text alone: no image is opened or processed."""
    messages = to_messages(record)

    def num_tokens(turns: int | None = None) -> int:
        """Tokens of the first `turns` messages as a prompt, or of all."""
        options: dict[str, Any] = {
            "chat_template": chat_template,
            "tokenize": False,
            "add_generation_prompt": bool(turns),
        }
        text = processor.apply_chat_template(messages[:turns], **options)
        bos = processor.tokenizer.bos_token
        ids = processor.tokenizer(
            text, add_special_tokens=bos is None or not text.startswith(bos)
        ).input_ids
        return len(ids) + ids.count(processor.image_token_id) * (num_image_tokens(processor) - 1)

    total = num_tokens()
    if total <= max_length:
        return None
    if num_tokens(turns=1) >= max_length:
        return Issue(
            f"conversations whose first answer lies beyond max_length {max_length}", unusable=True
        )
    last_image = max(
        (i for i, m in enumerate(messages) if any(c["type"] == "image" for c in m["content"])),
        default=0,
    )
    if num_tokens(turns=last_image + 1) > max_length:
        return Issue(f"conversations with an image beyond max_length {max_length}", unusable=True)
    return Issue(
        f"conversations longer than max_length {max_length}, whose end is cut", unusable=False
    )


def num_image_tokens(processor: LlavaProcessor) -> int:
    """Tokens that stand for one image."""
    size = processor.image_processor.crop_size
    blank = torch.zeros(1, 3, size["height"], size["width"])
    return processor.replace_image_token({"pixel_values": blank}, 0).count(processor.image_token)


class ConversationCollator:
    """Turns records (or caption pairs) into a right-padded batch for `LlavaForConditionalGeneration`.

    A batch without any image gets a black one whose image tokens lie in the padding of the first row: masked, behind
    everything and without labels, so they change neither loss nor gradients, but every process runs tower and projector
    in every step, which DDP and ZeRO-3 need (LLaVA's zero image, without touching the model).

    A record that cannot be trained on, such as one whose first answer is beyond `max_length`, is left out of its batch, named
    and counted; LLaVA gives it no loss.
    """

    def __init__(
        self, processor: LlavaProcessor, *, max_length: int = 2048, chat_template: str | None = None
    ) -> None:
        self.broken = BrokenSamples("the conversations")
        self.processor, self.max_length, self.chat_template = processor, max_length, chat_template
        size = processor.image_processor.crop_size
        self.blank = torch.zeros(1, 3, size["height"], size["width"])
        self.num_image_tokens = num_image_tokens(processor)

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch of input_ids, attention_mask, labels (B, T), pixel_values (P, 3, H, W) and what `trained_logits` adds.

        Raises:
            TooManyBrokenSamples: when too many records cannot be trained on.
        """
        options: dict[str, Any] = {
            "max_length": self.max_length,
            "chat_template": self.chat_template,
        }
        samples = []
        for record in records:
            self.broken.seen += 1
            record = caption_record(record) if "caption" in record else record
            try:
                samples.append(encode_conversation(record, self.processor, **options))
            except ValueError as error:
                self.broken.note(record.get("id"), error)
        return trained_logits(self.collate(samples or [self._blank_sample()]))

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Put encoded samples together."""
        pad = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": _pad([sample["input_ids"] for sample in samples], pad),
            "attention_mask": _pad([torch.ones_like(sample["input_ids"]) for sample in samples], 0),
            "labels": _pad([sample["labels"] for sample in samples], IGNORE_INDEX),
        }
        images = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        if images:
            return {**batch, "pixel_values": torch.cat(images)}
        return self._with_blank_image(batch, pad)

    def _blank_sample(self) -> dict[str, Tensor]:
        """A black image that nothing is learned from."""
        ids = torch.full((self.num_image_tokens,), self.processor.image_token_id)
        return {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORE_INDEX),
            "pixel_values": self.blank,
        }

    def _with_blank_image(self, batch: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
        fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORE_INDEX}
        longer = {
            key: torch.cat(
                [value, value.new_full((len(value), self.num_image_tokens), fill[key])], dim=1
            )
            for key, value in batch.items()
        }
        longer["input_ids"][0, -self.num_image_tokens :] = self.processor.image_token_id
        return {**longer, "pixel_values": self.blank}


def trained_logits(batch: dict[str, Any]) -> dict[str, Any]:
    """Let the model compute logits only where a token is trained: image tokens, questions and padding need none.

    Adds logits_to_keep (B, T), true where the next token carries loss, and shift_labels, those next tokens in one row.
    """
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    trained = following != IGNORE_INDEX
    return {**batch, "logits_to_keep": trained, "shift_labels": following[trained]}


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)
