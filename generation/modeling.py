"""The generator: a plain `Qwen3ForCausalLM` whose vocabulary also holds the codes of the tokenizer.

Ids below `offset` are text (the language model's own), then comes one id per code, then BOI, the beginning of an image:

    template with the caption | BOI | code_0 … code_{N-1} in raster order

`offset` is a number in the config and never the length of the text tokenizer: adding a text token moves no visual id.

The folder loads in plain transformers. What images need is in `config.json`: `visual_vocabulary`, `prompt_template`,
`max_caption_tokens`, `caption_dropout`, `sampling`, `vqrae_tokenizer` and `vqrae_tokenizer_fingerprint`.

Shapes: V text rows, K codes, N codes of an image, D width of the language model, E width of the code vectors.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

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
    """Codes of one image, N."""

    def __post_init__(self) -> None:
        if min(self.offset, self.codebook_size, self.num_codes) < 1:
            raise ValueError(f"got {self}, expected positive numbers")

    @property
    def begin_of_image(self) -> int:
        """Id of BOI, the token after which the first code is predicted."""
        return self.offset + self.codebook_size

    @property
    def num_rows(self) -> int:
        """Rows of the embedding: text, codes and BOI, rounded up; the rows after BOI are never used."""
        return -(-(self.begin_of_image + 1) // ROW_MULTIPLE) * ROW_MULTIPLE

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
        template: text around `{caption}`, e.g. a chat turn; the empty caption is the unconditional prompt.
        max_caption_tokens: longer captions lose their end (the template never does).

    Raises:
        ValueError: when the template has not exactly one `{caption}`, or text ids reach into the visual ones.
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
        self.text_tokenizer, self.max_caption_tokens = text_tokenizer, max_caption_tokens
        before, after = template.split("{caption}")
        self._before = self._ids(before)
        self._after = [*self._ids(after), vocabulary.begin_of_image]

    def _ids(self, text: str) -> list[int]:
        # Special tokens are read as such in the template alone, see `caption_ids`.
        return self.text_tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def caption_ids(self, caption: str) -> list[int]:
        """Ids of a caption; special tokens that it happens to spell are read as plain text."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.text_tokenizer(caption, **options)["input_ids"] if caption else []

    def __call__(self, caption: str) -> list[int]:
        """Ids of one prompt."""
        caption_ids = self.caption_ids(caption)[: self.max_caption_tokens]
        return [*self._before, *caption_ids, *self._after]

    def losses(self, caption: str) -> list[str]:
        """What the ids of a caption leave out: sentences for people."""
        found = []
        if unknown := list(dict.fromkeys(unknown_words(self.text_tokenizer, caption))):
            shown = ", ".join(word[:40] for word in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            found.append(f"{len(unknown)} words have no id and are read as unknown: {shown}{more}")
        length = len(self.caption_ids(caption))
        if length > self.max_caption_tokens:
            found.append(
                f"its end is cut: {length:,} tokens, of which {self.max_caption_tokens} are read"
            )
        return found

    @property
    def template_length(self) -> int:
        """Ids of a prompt that are not the caption's, BOI among them."""
        return len(self._before) + len(self._after)

    @property
    def unconditional(self) -> list[int]:
        """The prompt of the empty caption."""
        return self("")


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
    """A Qwen3 with rows for text, codes and BOI; new rows start as transformers initialises embeddings.

    Args:
        llm: folder or hub id of a pretrained Qwen3 to extend.
        llm_config: `Qwen3Config` fields of a new model with random weights; exactly one of the two is given.

    Raises:
        ValueError: when both or none are given, or the pretrained vocabulary reaches into the visual ids.
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
        model = Qwen3ForCausalLM._from_config(Qwen3Config(**values), attn_implementation=attention)
    else:
        model = load_model(
            Qwen3ForCausalLM, resolve_model(llm), attn_implementation=attention, dtype="float32"
        )
        if model.config.vocab_size > vocabulary.offset:
            raise ValueError(
                f"{llm} has {model.config.vocab_size} rows, but visual ids start at "
                f"{vocabulary.offset}: set offset to {model.config.vocab_size}"
            )
        model.resize_token_embeddings(vocabulary.num_rows, mean_resizing=False)
    model.config.visual_vocabulary = dataclasses.asdict(vocabulary)
    # An image ends by its length; the language model's own end token must not stop `generate`.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


class VisualHead(nn.Linear):
    """An `lm_head` that computes the logits of some rows only; weight, key and tying stay those of the whole head.

    A module, because ZeRO-3 gathers a partitioned weight around the forward pass of the module that owns it.
    """

    def __init__(self, head: nn.Linear, rows: slice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.rows = head.weight, rows
        self.register_parameter("bias", None)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight[self.rows])


@torch.no_grad()
def start_from_codebook(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, code_vectors: Tensor
) -> None:
    """Start the rows of the codes from the tokenizer's code vectors (K, E), so that similar codes are similar at once.

    With tied embeddings these rows are rows of the head too, so they must look like rows that the model knows: see
    `fit_projection`.
    """
    weight = model.get_input_embeddings().weight
    with gathered(weight):
        text_VD = weight[: vocabulary.offset].float()  # ZeRO-3 holds it in bf16
        rows_KD = fit_projection(code_vectors.to(text_VD), text_VD)
        weight[vocabulary.code_rows] = rows_KD.to(weight)


def fit_projection(vectors: Tensor, rows: Tensor) -> Tensor:
    """Code vectors (K, E) as rows (K, D) with the mean and the spread of `rows` (V, D), those of the text.

    The vectors are centred and projected on their min(D, E) leading principal axes, which preserves their distances as
    well as D dimensions can, then rotated at random, so that no dimension holds more than another.
    """
    centred = vectors - vectors.mean(0)
    dims = min(vectors.shape[1], rows.shape[1])
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -dims:]  # eigenvalues ascend
    rotation = nn.init.orthogonal_(torch.empty(rows.shape[1], dims, device=rows.device)).T
    projected = centred @ axes @ rotation.to(centred)
    mean = rows.mean(0)
    return projected / projected.std() * (rows - mean).std() + mean
