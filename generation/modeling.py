"""The generator: a plain `Qwen3ForCausalLM` whose vocabulary also holds the tokenizer's codes.

Ids below `offset` are text (the language model's own), then comes one id per code, then BOI:

    template with the caption | BOI | code_0 … code_{N-1} in raster order

`offset` is a number in the config, not the length of the text tokenizer: adding a text token moves
no visual id. The folder loads in plain transformers; what images need is in its `config.json`.

Shapes: V text rows, K codes, N codes of an image, D width of the model, E width of code vectors.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vqrae.common.checkpoints import load_model, resolve_model
from vqrae.common.distributed import gathered
from vqrae.data.word_tokenizer import unknown_words

# Embedding rows are rounded up to this: friendly to tensor cores, divisible among processes.
ROW_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class VisualVocabulary:
    """Where the visual ids are: code c has id `offset + c`."""

    offset: int
    """First visual id; at least the number of text ids (151,936 for Qwen3-0.6B)."""
    codebook_size: int
    num_codes: int
    """Positions of one image, N."""
    num_codebooks: int = 1
    """Codes of one position, n. Several have no ids: an embedding of their own reads them."""
    num_classes: int = 0
    """Classes c, each the whole prompt by its id, and c for none; 0: prompts are text and BOI."""

    def __post_init__(self) -> None:
        if min(self.offset, self.codebook_size, self.num_codes, self.num_codebooks) < 1:
            raise ValueError(f"got {self}, expected positive numbers")

    @property
    def begin_of_image(self) -> int:
        """Id of BOI, the token after which the first code is predicted."""
        return self.offset + (self.codebook_size if self.num_codebooks == 1 else 0)

    @property
    def prompt_ends(self) -> range:
        """Ids that end a prompt: BOI, or the classes and none."""
        boi = self.begin_of_image
        return range(self.num_classes + 1) if self.num_classes else range(boi, boi + 1)

    @property
    def num_rows(self) -> int:
        """Rows of the embedding: text, codes and BOI, rounded up."""
        return -(-(self.begin_of_image + 1) // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the codes of an image: (N,), or (N, n)."""
        return (self.num_codes, self.num_codebooks)[: 1 + (self.num_codebooks > 1)]

    def values(self) -> dict[str, int]:
        """For `config.json`, where one code a position and text go without saying."""
        usual = {"num_codebooks": 1, "num_classes": 0}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if usual.get(name) != value}

    @property
    def code_rows(self) -> slice:
        """Rows of embedding and head that belong to codes."""
        return slice(self.offset, self.offset + self.codebook_size)

    def to_ids(self, codes: Tensor) -> Tensor:
        """Codes -> token ids, any shape."""
        return codes + self.offset

    def to_codes(self, ids: Tensor) -> Tensor:
        """Token ids -> codes, any shape."""
        return ids - self.offset


class PromptEncoder:
    """Caption -> ids of a prompt that ends in BOI.

    Args:
        template: text around `{caption}`, e.g. a chat turn.
        max_caption_tokens: longer captions lose their end (the template never does).

    Raises:
        ValueError: for a template without `{caption}`, or text ids that reach into the visual ones.
    """

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary,
        *,
        template: str = "{caption}",
        max_caption_tokens: int = 448,
    ) -> None:
        if template.count("{caption}") != 1:
            raise ValueError(
                f"got prompt_template {template!r}, expected text with {{caption}} once"
            )
        if len(text_tokenizer) > vocabulary.offset:
            raise ValueError(
                f"the text tokenizer has {len(text_tokenizer)} ids, but visual ids start at "
                f"{vocabulary.offset}: set a larger offset"
            )
        self.text_tokenizer, self.vocabulary = text_tokenizer, vocabulary
        self.max_caption_tokens = max_caption_tokens
        self.before, self.after = template.split("{caption}")
        self._before = self._ids(self.before)
        self._after = [*self._ids(self.after), vocabulary.begin_of_image]

    def _ids(self, text: str, **options: bool) -> list[int]:
        options["add_special_tokens"] = False
        return self.text_tokenizer(text, **options)["input_ids"] if text else []

    def __call__(self, caption: str) -> list[int]:
        """Ids of one prompt."""
        # Special tokens that a caption happens to spell are plain text.
        caption_ids = self._ids(caption, split_special_tokens=True)
        return [*self._before, *caption_ids[: self.max_caption_tokens], *self._after]

    def losses(self, caption: str) -> list[str]:
        """What the ids of a caption leave out: sentences for people."""
        found = []
        if unknown := list(dict.fromkeys(unknown_words(self.text_tokenizer, caption))):
            words = [word[:40] for word in unknown[:5]]
            if len(unknown) > len(words):
                words[-1] += f" and {len(unknown) - len(words)} more"
            found.append(
                f"{len(unknown)} words have no id and are read as unknown: {', '.join(words)}"
            )
        length = len(self._ids(caption, split_special_tokens=True))
        if length > self.max_caption_tokens:
            found.append(
                f"its end is cut: {length:,} tokens, of which {self.max_caption_tokens} are read"
            )
        return found

    def values(self) -> dict[str, Any]:
        """For `config.json`."""
        return {
            "prompt_template": "{caption}".join([self.before, self.after]),
            "max_caption_tokens": self.max_caption_tokens,
        }

    @property
    def template_length(self) -> int:
        """Ids of a prompt that are not the caption's, BOI among them."""
        return len(self._before) + len(self._after)

    @property
    def unconditional(self) -> list[int]:
        """The prompt of the empty caption."""
        return self("")


class ClassEncoder:
    """Name of a class -> its id, which is the whole prompt; the empty name is that of none.

    Args:
        classes: names in the order of their ids.
    """

    def __init__(self, classes: Sequence[str], vocabulary: VisualVocabulary) -> None:
        self.classes = {name: number for number, name in enumerate(classes)}
        self.vocabulary = vocabulary

    def __call__(self, caption: str) -> list[int]:
        """Ids of one prompt.

        Raises:
            ValueError: for a class that is not known, with the nearest one that is.
        """
        if not caption:
            return self.unconditional
        if caption not in self.classes:
            close = difflib.get_close_matches(caption, self.classes, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"as in {next(iter(self.classes))!r}"
            raise ValueError(
                f"got {caption!r}, expected one of {len(self.classes)} classes: {hint}"
            )
        return [self.classes[caption]]

    def losses(self, caption: str) -> list[str]:
        """Nothing: a class is known as a whole or refused."""
        return []

    def values(self) -> dict[str, Any]:
        """For `config.json`."""
        return {"classes": list(self.classes)}

    @property
    def unconditional(self) -> list[int]:
        """The prompt of no class."""
        return [len(self.classes)]


Prompts = PromptEncoder | ClassEncoder


def pad_left(rows: Sequence[Sequence[int]], fill: int) -> list[list[int]]:
    """Rows of one length, filled in front, so that all prompts end at the same place."""
    longest = max(len(row) for row in rows)
    return [[fill] * (longest - len(row)) + list(row) for row in rows]


def build_generator(
    vocabulary: VisualVocabulary,
    *,
    llm: str | None = None,
    llm_config: dict[str, Any] | None = None,
    attention: str = "sdpa",
) -> Qwen3ForCausalLM:
    """A Qwen3 with rows for text, codes and BOI; see `build_llm`."""
    model = build_llm(
        Qwen3ForCausalLM, vocabulary, llm=llm, llm_config=llm_config, attention=attention
    )
    model.config.visual_vocabulary = vocabulary.values()
    # An image ends by its length; the language model's own end token must not stop `generate`.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def build_llm(
    kind: Any,
    vocabulary: VisualVocabulary,
    *,
    llm: str | None = None,
    llm_config: dict[str, Any] | None = None,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """A language model with all rows of a vocabulary; new rows start as in transformers.

    Args:
        kind: a model class of transformers, or `AutoModelForCausalLM`.
        llm: folder or hub id of a pretrained model to extend.
        llm_config: configuration fields of a new model with random weights, in place of `llm`; a
            Qwen3 unless they hold another `model_type`.

    Raises:
        ValueError: for both or none of them, or a vocabulary that reaches into the visual ids.
    """
    if (llm is None) == (llm_config is None):
        raise ValueError(
            f"got llm={llm!r} and llm_config={llm_config!r}, expected exactly one: "
            "set the other to null"
        )
    if llm is None:
        values = {"vocab_size": vocabulary.num_rows, "pad_token_id": None, **(llm_config or {})}
        if values["vocab_size"] != vocabulary.num_rows:
            raise ValueError(
                f"got llm_config.vocab_size {values['vocab_size']}, expected none: "
                f"it is {vocabulary.num_rows}"
            )
        config = CONFIG_MAPPING[values.pop("model_type", Qwen3Config.model_type)](**values)
        build = getattr(kind, "_from_config", None) or kind.from_config
        return build(config, attn_implementation=attention)
    model = load_model(kind, resolve_model(llm), attn_implementation=attention, dtype="float32")
    if model.config.vocab_size > vocabulary.offset:
        raise ValueError(
            f"{llm} has {model.config.vocab_size} rows, but visual ids start at "
            f"{vocabulary.offset}: set offset to {model.config.vocab_size}"
        )
    model.resize_token_embeddings(vocabulary.num_rows, mean_resizing=False)
    return model


@torch.no_grad()
def start_from_codebook(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, code_vectors: Tensor
) -> None:
    """Start the rows of the codes from the code vectors (K, E): similar codes are similar at once.

    With tied embeddings they are rows of the head too, so they must look like those of the text.
    """
    weight = model.get_input_embeddings().weight
    with gathered(weight):
        text_VD = weight[: vocabulary.offset].float()  # ZeRO-3 holds it in bf16
        rows_KD = fit_projection(code_vectors.to(text_VD), text_VD)
        weight[vocabulary.code_rows] = rows_KD.to(weight)


def fit_projection(vectors: Tensor, rows: Tensor) -> Tensor:
    """Code vectors (K, E) as rows (K, D) with the mean and the spread of `rows` (V, D).

    Projecting on the min(D, E) leading principal axes preserves distances as well as D dimensions
    can; the random rotation spreads them over all dimensions.
    """
    centred = vectors - vectors.mean(0)
    dims = min(vectors.shape[1], rows.shape[1])
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -dims:]  # eigenvalues ascend
    rotation = nn.init.orthogonal_(torch.empty(rows.shape[1], dims, device=rows.device)).T
    projected = centred @ axes @ rotation.to(centred)
    mean = rows.mean(0)
    return projected / projected.std() * (rows - mean).std() + mean
