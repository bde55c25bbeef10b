"""LLaVA records as training samples: chat templates, exact answer masks, batches.

A record is {"id", "image": one, a list of them or absent, "conversations": [{"from": "human" |
"gpt", "value"}, …]}. The chat template marks what is trained (`{% generation %}`); transformers
reads that back. Nothing here counts token lengths, which fails with every text tokenizer that
LLaVA's constants were not tuned for ("tokenization mismatch", loss 0).

Shapes: T tokens with images expanded, B batch, P images.
"""

import itertools
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from vqrae.common.config import did_you_mean
from vqrae.common.files import printable
from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.conversations import normalize_turns
from vqrae.data.report import Issue
from vqrae.data.samples import BrokenSamples

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
# `plain` (image, then caption) is LLaVA's format for training the projector alone.
TEMPLATES = ("chatml", "vicuna_v1", "plain")


def load_template(name: str, text_tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The Jinja text of one of `TEMPLATES`.

    Args:
        text_tokenizer: whose ids should equal LLaVA's. LLaVA encodes the text after an image or
            `<s>` on its own. Llama's tokenizer puts a space before such a text, but not after a
            special token: there the template adds it.

    Raises:
        ValueError: for another name, listing the known ones.
    """
    if name not in TEMPLATES:
        raise ValueError(f"unknown chat template {name!r}. {did_you_mean(name, TEMPLATES)}")
    template = (resources.files("vqrae.understanding") / f"{name}.jinja").read_text().rstrip("\n")
    if text_tokenizer is None or name == "chatml":
        return template

    def ids(text: str) -> list[int]:
        return text_tokenizer(text, add_special_tokens=False).input_ids

    special, alone = text_tokenizer.eos_token, ids("red")
    needs_space = ids(f"{special}red")[1:] != alone == ids(f"{special} red")[1:]
    return "{%- set space = ' ' -%}" + template if needs_space else template


def to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a record as Hugging Face chat messages, images first in their turn as in LLaVA.

    Raises:
        ValueError: naming the record, for turns that `normalize_turns` refuses.
    """
    try:
        turns = normalize_turns(record["conversations"], num_images=len(images_of(record)))
    except ValueError as error:
        raise ValueError(f"record {record.get('id')!r}: {error}") from error
    messages = []
    for turn in turns:
        content = [{"type": "image"}] * turn["value"].count(IMAGE_TOKEN)
        text = turn["value"].replace(IMAGE_TOKEN, "").strip()
        messages.append(
            {"role": ROLES[turn["from"]], "content": [*content, {"type": "text", "text": text}]}
        )
    return messages


def images_of(record: dict[str, Any]) -> list[Any]:
    """The images of a record, which holds one, several or none."""
    image = record.get("image")
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def tokenize(
    record: dict[str, Any], processor: LlavaProcessor, chat_template: str | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids (T,) of a record, and which of them are trained (T,). No image is opened."""
    text_tokenizer = processor.tokenizer
    [text], [answers] = render_jinja_template(
        conversations=[to_messages(record)],
        chat_template=chat_template or processor.chat_template,
        return_assistant_tokens_mask=True,
        **text_tokenizer.special_tokens_map,
    )
    bos = text_tokenizer.bos_token
    encoded = text_tokenizer(
        text,
        add_special_tokens=bos is None or not text.startswith(bos),
        return_offsets_mapping=True,
    )
    input_ids, offsets = torch.tensor(encoded.input_ids), torch.tensor(encoded.offset_mapping)
    trained = torch.zeros(len(input_ids), dtype=torch.bool)
    for start, end in answers:
        trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    copies = torch.where(input_ids == processor.image_token_id, num_image_tokens(processor), 1)
    return input_ids.repeat_interleave(copies), trained.repeat_interleave(copies)


def num_image_tokens(processor: LlavaProcessor) -> int:
    """Tokens of one image."""
    size, patch_size = processor.image_processor.crop_size, processor.patch_size
    patches = (size["height"] // patch_size) * (size["width"] // patch_size)
    dropped = processor.vision_feature_select_strategy == "default"  # the class token
    return patches + processor.num_additional_image_tokens - dropped


def lost_by_cutting(
    input_ids: Tensor, trained: Tensor, image_token_id: int, max_length: int
) -> str | None:
    """Why a sample that is cut to `max_length` tokens cannot be trained on; None when it can."""
    if (input_ids[max_length:] == image_token_id).any():
        return f"an image beyond max_length {max_length}"
    # The first token is never predicted, so it does not count.
    return None if trained[1:max_length].any() else f"no answer within max_length {max_length}"


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
        input_ids (T,); labels (T,) with `IGNORE_INDEX` on everything but answers and their end
        tokens; pixel_values (P, 3, H, W) when the record has images.

    Raises:
        ValueError: naming the record, for a bad one (see `to_messages`), when cutting would hit
            image tokens, or when no token is left to train on.
    """
    return as_sample(*tokenize(record, processor, chat_template), record, processor, max_length)


def as_sample(
    input_ids: Tensor,
    trained: Tensor,
    record: dict[str, Any],
    processor: LlavaProcessor,
    max_length: int,
) -> dict[str, Tensor]:
    """What `encode_conversation` returns, of token ids (T,) and which are trained (T,)."""
    if lost := lost_by_cutting(input_ids, trained, processor.image_token_id, max_length):
        raise ValueError(f"record {record.get('id')!r} has {lost}: set a larger max_length")
    labels = input_ids.where(trained, IGNORE_INDEX)
    sample = {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}
    if images := images_of(record):
        sample["pixel_values"] = processor.image_processor(images, return_tensors="pt").pixel_values
    return sample


def examine_length(
    record: dict[str, Any], processor: LlavaProcessor, *, max_length: int = 2048, **options: Any
) -> Issue | None:
    """What `encode_conversation` would cut off a record, from its text alone."""
    input_ids, trained = tokenize(record, processor, **options)
    if len(input_ids) <= max_length:
        return None
    if lost := lost_by_cutting(input_ids, trained, processor.image_token_id, max_length):
        return Issue(f"conversations with {lost}", unusable=True)
    what = f"conversations longer than max_length {max_length}, whose end is cut"
    return Issue(what, unusable=False)


class ConversationCollator:
    """Turns records, or caption pairs, into a right-padded batch for LLaVA.

    A record that cannot be trained on, such as one whose first answer is beyond `max_length`, is
    left out of its batch, named and counted.

    Every process must run tower and projector in every step (DDP and ZeRO-3 wait for their
    gradients), so a batch without images gets a black one. Its tokens are masked and carry no
    labels: they change neither loss nor gradients.
    """

    encode = staticmethod(encode_conversation)
    """Record -> sample; what else is collated replaces it."""

    def __init__(
        self, processor: LlavaProcessor, *, max_length: int = 2048, chat_template: str | None = None
    ) -> None:
        self.broken = BrokenSamples("the conversations")
        self.processor, self.chat_template = processor, chat_template
        self.max_length = max_length
        size = processor.image_processor.crop_size
        ids = torch.full((num_image_tokens(processor),), processor.image_token_id)
        self.blank = {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORE_INDEX),
            "pixel_values": torch.zeros(1, 3, size["height"], size["width"]),
        }

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What `collate` makes, for logits where a token is trained only.

        Images, questions and padding need no logits. logits_to_keep (B, T) is true where the next
        token carries loss; shift_labels are those next tokens in one row.

        Raises:
            TooManyBrokenSamples: when too many records cannot be trained on.
        """
        options: Any = {"max_length": self.max_length, "chat_template": self.chat_template}
        samples = []
        for record in records:
            record = caption_record(record) if "caption" in record else record
            self.broken.seen += 1
            try:
                samples.append(self.encode(record, self.processor, **options))
            except ValueError as error:
                self.broken.note(record.get("id"), error)
        batch = self.collate(samples or [self.blank])
        following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        trained = following != IGNORE_INDEX
        return {**batch, "logits_to_keep": trained, "shift_labels": following[trained]}

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Batch of input_ids, attention_mask, labels (B, T) and pixel_values (P, 3, H, W)."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        images = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        if not images:
            # Its tokens follow the first sample, outside of the attention mask.
            names = ("input_ids", "labels")
            longer = {name: torch.cat([samples[0][name], self.blank[name]]) for name in names}
            samples, images = [longer, *samples[1:]], [self.blank["pixel_values"]]
        input_ids = pad([s["input_ids"] for s in samples], self.processor.tokenizer.pad_token_id)
        attended = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]
        return {
            "input_ids": input_ids,
            "attention_mask": attended.long(),
            "labels": pad([sample["labels"] for sample in samples], IGNORE_INDEX),
            "pixel_values": torch.cat(images),
        }


def pad(rows: list[Tensor], value: int) -> Tensor:
    """Rows of any length as one tensor (B, T), filled up on the right."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


def caption_record(sample: dict[str, Any]) -> dict[str, Any]:
    """A caption pair `{"image", "caption"}` as a LLaVA record."""
    caption, name = sample["caption"], sample.get("id", sample["caption"])
    turns = [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": caption}]
    return {"id": name, "image": sample["image"], "conversations": turns}


# ---- a batch as text, for people

GREEN, GREY = "\033[1;32m", "\033[2m"
RESET = "\033[0m"


def samples_of(batch: dict[str, Any]) -> Iterator[tuple[int, slice]]:
    """(row, columns) of every sample of a padded or packed batch, without padding."""
    for row, ids in enumerate(batch["input_ids"]):
        if "position_ids" not in batch:
            yield row, slice(0, int(batch["attention_mask"][row].sum()))
            continue
        starts = torch.nonzero(batch["position_ids"][row] == 0).flatten().tolist()
        for start, end in itertools.pairwise([*starts, len(ids)]):
            if (batch["labels"][row, start:end] != IGNORE_INDEX).any():  # not padding, nor a blank
                yield row, slice(start, end)


def describe_batch(batch: dict[str, Any], processor: LlavaProcessor, *, color: bool = True) -> str:
    """The samples of a batch, then its size.

    Args:
        color: trained tokens in green and images in grey; else trained tokens are in `[[ ]]`.
    """
    grey, plain = (GREY, RESET) if color else ("", "")
    green, end = (GREEN, RESET) if color else ("[[", "]]")
    lines = []
    tokens = 0
    for row, columns in samples_of(batch):
        ids, labels = batch["input_ids"][row, columns], batch["labels"][row, columns]
        trained = labels != IGNORE_INDEX
        tokens += len(ids)
        place = f"row {row}, tokens {columns.start} to {columns.stop - 1}"
        lines.append(f"--- {place}: {int(trained.sum())} of {len(ids)} trained")
        kinds = torch.where(ids == processor.image_token_id, 2, trained.long()).tolist()
        text = ""
        for kind, group in itertools.groupby(zip(kinds, ids.tolist(), strict=True), lambda x: x[0]):
            span = [token for _, token in group]
            words = f"{IMAGE_TOKEN[:-1]} x {len(span)}>"
            if kind != 2:
                words = printable(processor.tokenizer.decode(span))
            text += (words, f"{green}{words}{end}", f"{grey}{words}{plain}")[kind]
        lines.append(text)
    cells, images = batch["input_ids"].numel(), len(batch["pixel_values"])
    trained_total = int((batch["labels"] != IGNORE_INDEX).sum())
    shape = " x ".join(map(str, batch["input_ids"].shape))
    filled = f"{cells} places, {tokens} tokens ({tokens / cells:.0%})"
    lines.append(f"=== {shape} = {filled}, {trained_total} trained, {images} images")
    return "\n".join(lines)
