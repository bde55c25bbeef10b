"""Ask a trained model about images: single questions, conversations, files of questions.

    chat = Chat.from_pretrained("runs/tiny_llava")
    chat.answer([(image, "what color is the circle ?"), (None, "how many things are there ?")])

    session = chat.session()
    session.ask("what is the red thing ?", image)
    session.ask("where is it ?")

Images of any size go through the image processor of the model folder, the same as in training.
Decoding is greedy unless said otherwise. Rows are padded on the left with exact positions, so an
answer does not depend on what else is in the batch. What is loaded may be our LLaVA, a grafted
InternVL3, or any other image-text model of transformers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vqrae.common.checkpoints import load_model, require_kind, resolve_model
from vqrae.common.distributed import attention_implementation, choose_device
from vqrae.common.files import json_lines, parse_json, read_json, write_json
from vqrae.common.images import open_image, to_rgb
from vqrae.common.run import hold, run_manifest
from vqrae.data.conversations import image_paths
from vqrae.understanding.build import require_own_features
from vqrae.understanding.conversation import IMAGE_TOKEN

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
        self.model, self.processor = model.eval(), processor
        self.max_new_tokens = max_new_tokens

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        attn_implementation: str = "auto",
        device: str | torch.device | None = None,
        max_new_tokens: int = 128,
        dtype: str | torch.dtype = "auto",
    ) -> "Chat":
        """Load a run directory, model folder or hub id; the device is CUDA when there is one.

        Args:
            dtype: `auto` is that of the weights; under flash-attention, which takes no fp32, it is
                bfloat16 for fp32 weights.

        Raises:
            ValueError: for another kind of model, or one whose weights are missing or not finite;
                for flash-attention in fp32.
        """
        folder = resolve_model(name)
        expected = "an understanding model such as 'llava'"
        config = require_kind(folder, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, expected)
        require_own_features(config, folder)
        device = choose_device(device)
        options = precision(config, device, dtype, attn_implementation)
        model = load_model(AutoModelForImageTextToText, folder, **options)
        processor = AutoProcessor.from_pretrained(folder)
        return cls(model.to(device), processor, max_new_tokens=max_new_tokens)

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's part for text."""
        return self.processor.tokenizer

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
            batch = chats[start : start + batch_size]
            answers += self.generate(batch, max_new_tokens=max_new_tokens)
        return answers

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
            sampling: arguments of transformers' `generate` such as do_sample, temperature,
                num_beams; none means greedy.
            streamer: receives the tokens as they come (one chat only), such as
                `transformers.TextStreamer`.

        Raises:
            ValueError: for a chat of more tokens than the model has positions, or with control
                tokens that cannot be read as text.
        """
        inputs = self.inputs(chats)
        length = inputs["input_ids"].shape[1]
        generated = self.model.generate(
            **inputs,
            **{"do_sample": False, **(sampling or {})},
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            streamer=streamer,
        )
        texts = self.processor.batch_decode(generated[:, length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def inputs(self, chats: Sequence[Messages]) -> BatchFeature:
        """Chats as the model takes them, padded on the left."""
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
        except NotImplementedError as error:
            # The text tokenizer adds special tokens that are not in the template.
            raise ValueError(
                f"got a question that spells control tokens, expected none for this model: {error}"
            ) from error
        length = inputs["input_ids"].shape[1]
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and length >= positions:
            raise ValueError(
                f"got a chat of {length:,} tokens, images included, expected fewer than the "
                f"{positions:,} positions of the model: ask a shorter question, or "
                "show fewer images"
            )
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _spells_control_tokens(self, chats: Sequence[Messages]) -> bool:
        """Whether a text spells a token such as `<|im_end|>`: it must stay text for the model."""
        added = self.text_tokenizer.added_tokens_decoder.values()
        controls = [token.content for token in added if token.special]
        for chat in chats:
            for message in chat:
                content = message["content"]
                parts = [content] if isinstance(content, str) else content
                texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
                if any(control in " ".join(texts) for control in controls):
                    return True
        return False


def precision(
    config: dict[str, Any],
    device: str,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
) -> dict[str, Any]:
    """`dtype` and `attn_implementation` to load a model with, see `Chat.from_pretrained`.

    Args:
        config: values of its `config.json`.
    """
    half = dtype not in ("float32", torch.float32)
    attention = attention_implementation(attn_implementation, half=half, device=device)
    stored = config.get("dtype", config.get("torch_dtype"))
    is_half = stored in ("float16", "bfloat16")
    if dtype == "auto" and attention.startswith("flash_attention") and not is_half:
        dtype = torch.bfloat16
    return {"dtype": dtype, "attn_implementation": attention}


class Session:
    """A conversation that remembers its turns and images."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.messages: Messages = []

    def ask(
        self,
        question: str,
        images: ImageInputs = None,
        *,
        sampling: Mapping[str, Any] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> str:
        """Ask the next question, with or without images; `sampling` and `streamer` as of
        `Chat.generate`. A turn that fails is forgotten.
        """
        asked = [*self.messages, user_message(question, images)]
        [answer] = self.chat.generate([asked], sampling=sampling, streamer=streamer)
        content = [{"type": "text", "text": answer}]
        self.messages = [*asked, {"role": "assistant", "content": content}]
        return answer


def user_message(question: str, images: ImageInputs) -> dict[str, Any]:
    """A question with its images as a Hugging Face chat message."""
    if IMAGE_TOKEN in question:
        raise ValueError(
            f"got {IMAGE_TOKEN} in a question, expected text: pass images apart from it"
        )
    if images is None:
        images = []
    elif isinstance(images, str | Path | Image.Image):
        images = [images]
    content: Messages = []
    for image in images:
        opened = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        content.append({"type": "image", "image": opened})
    return {"role": "user", "content": [*content, {"type": "text", "text": question.strip()}]}


# ---- a file of questions

# The first name that a question does not hold itself gets its answer, or why there is none.
ANSWER_KEYS = ("answer", "prediction", "vqrae_answer")
ERROR_KEYS = ("error", "vqrae_error")


@dataclass(frozen=True)
class Answered:
    """Answers in the file, how many of them were there before, how many questions failed."""

    total: int
    resumed: int
    failed: int


def answer_file(
    chat: Chat,
    questions: str | Path,
    out: str | Path,
    *,
    fingerprint: str,
    image_folder: str | Path | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Answered:
    """Answer every line of `questions`, in order; an answer does not depend on `batch_size`.

    A line is `{"question": TEXT, "image": FILE or [FILES] or absent, …}`; LLaVA's evaluation
    files, which have `text` for `question`, are read as they are. A line of `out` is that line with
    `answer`, or with `prediction` where the line has an `answer` of its own. A question that cannot
    be answered costs its own answer only.

    Args:
        out: file of the answers, continued where it ends; OUT.manifest.json says what made them.
        fingerprint: of the model's weights.
        image_folder: where images are; None means next to the questions.
        progress: called with (done, total).

    Raises:
        ValueError: before anything is answered, naming the line, for a line that is not a question;
            when `out` holds answers to other questions, or of another model or image folder; when
            another process writes to it.
    """
    questions, out = Path(questions), Path(out)
    records = read_questions(questions)
    folder = questions.parent if image_folder is None else Path(image_folder)
    settings = {
        "model": fingerprint,
        "max_new_tokens": str(chat.max_new_tokens),
        "image_folder": str(folder.resolve()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    hold(out.with_name(f".{out.name}.lock"), str(out))
    manifest = out.with_name(f"{out.name}.manifest.json")
    made_with = read_json(manifest)["fingerprints"] if manifest.exists() else None
    done = count_answers(out, records)
    if done and made_with != settings:
        raise ValueError(
            f"{out} holds answers made with {made_with}, now it is {settings}: "
            "give another file, or remove it"
        )
    write_json(manifest, run_manifest(fingerprints=settings))
    failed = 0
    with out.open("a", encoding="utf-8") as stream:
        for start in range(done, len(records), batch_size):
            batch = records[start : start + batch_size]
            lines = ""
            for record, answer in zip(batch, answer_records(chat, batch, folder), strict=True):
                is_error = isinstance(answer, ValueError)
                failed += is_error
                keys = ERROR_KEYS if is_error else ANSWER_KEYS
                key = next(name for name in keys if name not in record)
                lines += json.dumps({**record, key: str(answer)}, ensure_ascii=False) + "\n"
            stream.write(lines)
            stream.flush()
            if progress is not None:
                progress(start + len(batch), len(records))
    return Answered(len(records), done, failed)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The records of a file of questions, checked."""
    records = []
    for number, record in json_lines(path):
        if not isinstance(record, dict) or not isinstance(question_of(record), str):
            raise ValueError(
                f"{path}, line {number}: got {str(record)[:80]!r}, "
                'expected {"question": TEXT, "image": FILE}'
            )
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no questions")
    return records


def question_of(record: dict[str, Any]) -> Any:
    """The question of a record under either name."""
    return record.get("question", record.get("text"))


def answer_records(
    chat: Chat, records: Sequence[dict[str, Any]], folder: Path
) -> Sequence[str | ValueError]:
    """The answer to each record, or why there is none; one by one where the batch fails."""
    try:
        messages = []
        for record in records:
            images = [folder / path for path in image_paths(record)]
            messages.append([user_message(question_of(record), images)])
        return chat.generate(messages)
    except ValueError as error:
        if len(records) == 1:
            return [error]
    answers: list[str | ValueError] = []
    for record in records:
        answers += answer_records(chat, [record], folder)
    return answers


def count_answers(out: Path, records: Sequence[dict[str, Any]]) -> int:
    """How many answers `out` holds; a last line that a crash cut short is removed.

    Raises:
        ValueError: when a line does not answer its record.
    """
    if not out.exists():
        return 0
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for number, line in enumerate(lines):
        answered = parse_json(line, f"{out}, line {number + 1}")
        record = records[number] if number < len(records) else None
        if record is None or any(answered.get(key) != value for key, value in record.items()):
            raise ValueError(
                f"{out}, line {number + 1} answers {answered}, but the question is {record}: "
                "give another file"
            )
    if len(whole) < len(text):
        with out.open("r+b") as stream:
            stream.truncate(len(whole))
    return len(lines)
