"""Ask a trained model about images.

    chat = Chat.from_pretrained("runs/tiny_llava")
    chat.answer([(image, "what color is the circle ?"), (None, "how many things are there ?")])

    session = chat.session()
    session.ask("what is the red thing ?", image)
    session.ask("where is it ?")

ImageInputs of any size go through the image processor of the model folder: the same as in training. Decoding is greedy unless
said otherwise. Rows are padded on the left with exact positions, so that an answer does not depend on what else is in the
batch. What is loaded may be our LLaVA, a grafted InternVL3, or any other image-text model of transformers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vqrae.common.checkpoints import load_model, require_kind, resolve_model
from vqrae.common.distributed import attention_implementation, choose_device
from vqrae.common.images import open_image, to_rgb
from vqrae.understanding.conversation import IMAGE_TOKEN
from vqrae.understanding.quantized import is_quantized, read_quantized_features

ImageInput = str | Path | Image.Image
ImageInputs = ImageInput | Sequence[ImageInput] | None
Messages = list[dict[str, Any]]


class Chat:
    """A model with its processor, on one device.

    Args:
        model, processor: what `build_llava` or a model folder gives.
        max_new_tokens: longest answer.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, *, max_new_tokens: int = 128
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model.eval(), processor, max_new_tokens

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        attn_implementation: str = "auto",
        device: str | torch.device | None = None,
        max_new_tokens: int = 128,
        dtype: str | torch.dtype = "auto",
        tokenizer: str | Path | None = None,
    ) -> "Chat":
        """Load a run directory, model folder or hub id; the device is CUDA when there is one.

        Args:
            dtype: `auto` is that of the weights, and bfloat16 for fp32 weights under flash-attention, which takes no fp32.
            tokenizer: of a model that was trained on quantized features; others do not need it.

        Raises:
            ValueError: for another kind of model, or one whose weights are missing or not finite; when the model was trained
                on quantized features, and no tokenizer is given; for flash-attention in fp32.
        """
        folder = resolve_model(name)
        config = require_kind(
            folder,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            "an understanding model such as 'llava'",
        )
        device = choose_device(device)
        attention = attention_implementation(
            attn_implementation, half=dtype not in ("float32", torch.float32), device=device
        )
        stored = config.get("dtype", config.get("torch_dtype"))
        if (
            dtype == "auto"
            and attention.startswith("flash_attention")
            and stored not in ("float16", "bfloat16")
        ):
            dtype = torch.bfloat16
        model = load_model(
            AutoModelForImageTextToText, folder, dtype=dtype, attn_implementation=attention
        )
        if is_quantized(model.config):
            if tokenizer is None:
                raise ValueError(
                    f"{folder} was trained on quantized features: give the tokenizer that quantizes them"
                )
            read_quantized_features(model, tokenizer)
        return cls(
            model.to(device), AutoProcessor.from_pretrained(folder), max_new_tokens=max_new_tokens
        )

    def answer(
        self,
        conversations: Sequence[tuple[ImageInputs, str]],
        *,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """One answer to each (image, list of images or None, question).

        Raises:
            ValueError: for an unreadable image, or a question that contains `<image>`.
        """
        chats = [[user_message(question, images)] for images, question in conversations]
        answers: list[str] = []
        for start in range(0, len(chats), batch_size):
            answers += self.generate(
                chats[start : start + batch_size], max_new_tokens=max_new_tokens
            )
        return answers

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """What turns tokens into words, for whoever streams them."""
        return self.processor.tokenizer

    def session(self) -> "Session":
        """A conversation of several turns."""
        return Session(self)

    @torch.inference_mode()
    def generate(
        self,
        chats: Sequence[Messages],
        *,
        max_new_tokens: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """The next answer of each chat, in one batch.

        Args:
            sampling: arguments of transformers' `generate` such as do_sample, temperature, num_beams; none means greedy.
            streamer: receives the tokens as they come (one chat only), such as `transformers.TextStreamer`.

        Raises:
            ValueError: for a chat of more tokens than the model has positions, or whose control tokens cannot be read as text.
        """
        try:
            inputs = self.processor.apply_chat_template(
                list(chats),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
                sanitize_control_tokens=self._spells_control_tokens(chats),
            ).to(self.model.device)
        except (
            NotImplementedError
        ) as error:  # the tokenizer writes special tokens that the template leaves out
            raise ValueError(
                f"got a question that spells control tokens, expected none for this model: {error}"
            ) from error
        self._require_positions(inputs["input_ids"].shape[1])
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        options = {"do_sample": False, **(sampling or {})}
        generated = self.model.generate(
            **inputs,
            **options,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            streamer=streamer,
        )
        new_tokens = generated[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip()
            for text in self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        ]

    def _spells_control_tokens(self, chats: Sequence[Messages]) -> bool:
        """Whether a text spells a token such as `<|im_end|>`, which must reach the model as the characters that it is."""
        tokens = [
            token.content
            for token in self.text_tokenizer.added_tokens_decoder.values()
            if token.special
        ]
        texts = [text for chat in chats for message in chat for text in _texts(message["content"])]
        return any(token in text for token in tokens for text in texts)

    def _require_positions(self, length: int) -> None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and length >= positions:
            raise ValueError(
                f"got a chat of {length:,} tokens, images included, expected fewer than the {positions:,} positions of the "
                "model: ask a shorter question, or show fewer images"
            )


class Session:
    """A conversation that remembers its turns and images."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.messages: Messages = []

    def ask(
        self, question: str, images: ImageInputs = None, *, streamer: BaseStreamer | None = None
    ) -> str:
        """Ask on; images may come with any turn. The turn is forgotten when answering fails."""
        asked = [*self.messages, user_message(question, images)]
        [answer] = self.chat.generate([asked], streamer=streamer)
        self.messages = [
            *asked,
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return answer


def user_message(question: str, images: ImageInputs) -> dict[str, Any]:
    """A question with its images as a Hugging Face chat message."""
    if IMAGE_TOKEN in question:
        raise ValueError(
            f"got a question that contains {IMAGE_TOKEN}, expected plain text: pass images beside it"
        )
    if images is None:
        images = []
    elif isinstance(images, str | Path | Image.Image):
        images = [images]
    content: list[dict[str, Any]] = [{"type": "image", "image": _open(image)} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}


def _texts(content: Any) -> list[str]:
    """The texts of a message."""
    return (
        [content]
        if isinstance(content, str)
        else [part["text"] for part in content if part["type"] == "text"]
    )


def _open(image: ImageInput) -> Image.Image:
    return to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
