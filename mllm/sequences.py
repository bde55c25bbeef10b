"""Rows of token ids for the three tasks of the unified model.

    generation     BOS caption prompt BOI image EOI EOS      trained: BOI, image, EOI, EOS
    captioning     BOS BOI image EOI caption EOS             trained: caption, EOS
    instructions   the chat template, images without BOI and EOI      trained: answers

The layouts are those of UniTok's MLLM (arXiv 2502.20321, section 4.3). An image is N places with
the id of `<image>`, where the model reads the vectors of its codes.

Shapes: T ids of a row, B rows, P images of a batch, D of them generated, N places and n codes of a
place, M trained text tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from vqrae.common.trainer import IGNORE_INDEX
from vqrae.data.samples import BrokenSamples
from vqrae.generation.modeling import PromptEncoder, VisualVocabulary
from vqrae.understanding.conversation import encode_conversation, pad

TASKS = ("generation", "captioning", "instructions")
PROMPT = " Generate an image based on this description."
UNCONDITIONAL = "<unconditional>"  # in place of caption and prompt; ordinary text
Row = dict[str, Any]


class ImageVocabulary(VisualVocabulary):
    """Codes without ids: only BOI has one, `offset`."""

    @property
    def begin_of_image(self) -> int:
        return self.offset


class ImagePrompt(PromptEncoder):
    """Caption -> ids that ask for its image, up to BOI; the empty caption asks for any image.

    Caption and prompt are one text for the tokenizer.

    Args:
        max_tokens: ids of a caption with BOS and prompt; a longer caption loses its end.
    """

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: ImageVocabulary,
        *,
        max_tokens: int = 1750,
    ) -> None:
        self.text_tokenizer, self.vocabulary = text_tokenizer, vocabulary
        bos = text_tokenizer.bos_token_id
        self.bos = [] if bos is None else [bos]
        length = len(self.ids(f"a{PROMPT}")) - len(self.ids("a"))
        self.max_caption_tokens = max_tokens - len(self.bos) - length
        if self.max_caption_tokens < 1:
            raise ValueError(
                f"max_caption_tokens: got {max_tokens}, expected more than the "
                f"{len(self.bos) + length} ids of BOS and {PROMPT!r}"
            )

    def __call__(self, caption: str) -> list[int]:
        ids = self.ids(f"{caption}{PROMPT}" if caption else UNCONDITIONAL)
        length = len(self.ids(caption))
        ids = ids[: min(length, self.max_caption_tokens)] + ids[length:]
        return [*self.bos, *ids, self.vocabulary.begin_of_image]

    def ids(self, text: str) -> list[int]:
        """Ids of a text; special tokens that it happens to spell are plain text."""
        return self._ids(text, split_special_tokens=True)


class SequenceEncoder:
    """Samples -> rows.

    Args:
        processor: of images of 8 bits and text, see `vqrae.mllm.build.build_processor`.
        prompt: ends in BOI.
        end_of_image: the id of EOI.
        max_length: ids of a dialogue, image tokens included; its end is cut.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        prompt: ImagePrompt,
        end_of_image: int,
        *,
        max_length: int = 2048,
    ) -> None:
        self.processor, self.text_tokenizer = processor, processor.tokenizer
        self.prompt, self.max_length = prompt, max_length
        self.boi, self.eoi = prompt.vocabulary.begin_of_image, end_of_image
        self.image = [processor.image_token_id] * prompt.vocabulary.num_codes

    def __call__(self, sample: dict[str, Any]) -> Row:
        """The row of a sample: input_ids and labels (T,), whether it `generates`, and its `images`:
        codes (N,) or (N, n), or pixels uint8 (3, H, W).

        Args:
            sample: its `task`; codes or image, with the caption to generate it from, or the caption
                to `answer` with; or a record in LLaVA's form.

        Raises:
            ValueError: for a dialogue that cannot be trained on, see `encode_conversation`.
        """
        if sample["task"] == "instructions":
            return self.dialogue(sample)
        eos = self.text_tokenizer.eos_token_id
        if sample["task"] == "generation":
            before, after = self.prompt(sample["caption"]), [self.eoi, eos]
            trained = [self.boi, *([IGNORE_INDEX] * len(self.image)), *after]
        else:
            caption = self.prompt.ids(sample["answer"])[: self.prompt.max_caption_tokens]
            trained = [*caption, eos]
            before, after = [*self.prompt.bos, self.boi], [self.eoi, *trained]
        ids = [*before, *self.image, *after]
        labels = [IGNORE_INDEX] * (len(ids) - len(trained)) + trained
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "images": [sample["codes"] if "codes" in sample else sample["image"]],
            "generates": sample["task"] == "generation",
        }

    def dialogue(self, record: dict[str, Any]) -> Row:
        """The row of a record in LLaVA's form, with or without images."""
        row: Row = encode_conversation(record, self.processor, max_length=self.max_length)
        return {**row, "images": list(row.pop("pixel_values", ())), "generates": False}


class UnifiedCollator:
    """Samples -> a right-padded batch with the places of everything that is read or trained.

    A dialogue that cannot be trained on is left out, named and counted.

    Every process must run all parts of the model in every step (DDP and ZeRO-3 wait for their
    gradients). So a batch without images gets a blank one outside of the attention mask, and one
    without images to generate takes the loss of an image with weight 0.

    Args:
        code_shape: (N,) or (N, n).
    """

    def __init__(self, encode: SequenceEncoder, code_shape: tuple[int, ...]) -> None:
        self.encode, self.broken = encode, BrokenSamples("the dialogues")
        ids = torch.tensor(encode.image)
        labels = torch.full_like(ids, IGNORE_INDEX)
        self.blank = torch.zeros(code_shape, dtype=torch.int64)
        self.blank_row: Row = {"input_ids": ids, "labels": labels, "images": [self.blank]}
        self.blank_row["generates"] = False

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What `collate` makes of the rows of samples that have one.

        Raises:
            TooManyBrokenSamples: when too many records cannot be trained on.
        """
        rows = []
        for sample in samples:
            self.broken.seen += 1
            try:
                rows.append(self.encode(sample))
            except ValueError as error:
                self.broken.note(sample.get("id"), error)
        return self.collate(rows or [self.blank_row])

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """The batch of some rows.

        Returns:
            input_ids, attention_mask (B, T); codes (P, N) or (P, N, n), int64.
            image_places (P, N) and text_places (M,): indices of the B * T places of images, and of
            those whose next token is trained; text_targets (M,) are these tokens.
            generated (D,): indices of the images with loss; num_image_codes (): their codes, or 0;
            num_targets (): these codes and M.
            Where samples show pixels, also `images` uint8 (Q, 3, H, W) and `image_rows` (Q,), the
            images whose codes `fill_codes` has yet to put in.
        """
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        if not any(row["images"] for row in rows):
            names = ("input_ids", "labels")
            longer = {name: torch.cat([rows[0][name], self.blank_row[name]]) for name in names}
            rows = [{**self.blank_row, **longer}, *rows[1:]]
        input_ids = pad([row["input_ids"] for row in rows], self.encode.text_tokenizer.pad_token_id)
        is_image = (input_ids == self.encode.processor.image_token_id).flatten()
        following = pad([row["labels"][1:] for row in rows], IGNORE_INDEX)
        following = F.pad(following, (0, 1), value=IGNORE_INDEX).flatten()
        text_places = torch.nonzero(following != IGNORE_INDEX).flatten()
        images: list[Tensor] = []
        generated: list[int] = []
        for row in rows:
            if row["generates"]:
                generated.append(len(images))
            images += row["images"]
        image_rows = [i for i, image in enumerate(images) if image.dtype == torch.uint8]
        codes = [self.blank if image.dtype == torch.uint8 else image for image in images]
        num_image_codes = len(generated) * self.blank.numel()
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "codes": torch.stack(codes),
            "image_places": torch.nonzero(is_image).view(len(images), -1),
            "text_places": text_places,
            "text_targets": following[text_places],
            "generated": torch.tensor(generated or [0]),
            "num_image_codes": torch.tensor(num_image_codes),
            "num_targets": torch.tensor(num_image_codes + len(text_places)),
        }
        if image_rows:
            batch["images"] = torch.stack([images[i] for i in image_rows])
            batch["image_rows"] = torch.tensor(image_rows)
        return batch
