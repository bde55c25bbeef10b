"""The generator: a plain `Qwen3ForCausalLM` whose vocabulary also holds the tokenizer's codes.

Its folder loads in plain transformers. What the images need stands in `config.json`: `visual_vocabulary`,
`prompt_template`, `max_caption_tokens`, `caption_dropout`, `sampling`, `vqrae_tokenizer` and `vqrae_tokenizer_fingerprint`.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from vqrae.common.checkpoints import load_model, local_model, require_kind, resolve_model
from vqrae.common.distributed import gathered
from vqrae.generation.sampling import SamplingConfig
from vqrae.generation.vocabulary import PromptEncoder, VisualVocabulary


def build_generator(
    vocabulary: VisualVocabulary,
    *,
    llm: str | None = None,
    llm_config: dict[str, Any] | None = None,
    attention: str = "sdpa",
) -> Qwen3ForCausalLM:
    """A Qwen3 with rows for text, codes and BOI; new rows are drawn as transformers initialises embeddings.

    Args:
        llm: folder or hub id of a pretrained Qwen3 to extend.
        llm_config: `Qwen3Config` fields of a new model with random weights; exactly one of the two is given.

    Raises:
        ValueError: when both or none are given, or the pretrained vocabulary reaches into the visual ids.
    """
    if (llm is None) == (llm_config is None):
        raise ValueError(
            f"got llm={llm!r} and llm_config={llm_config!r}, expected exactly one: set the other to null"
        )
    if llm is None:
        config = Qwen3Config(
            **{"vocab_size": vocabulary.num_rows, "pad_token_id": None, **(llm_config or {})}
        )
        if config.vocab_size != vocabulary.num_rows:
            raise ValueError(
                f"got llm_config.vocab_size {config.vocab_size}, expected none: it is {vocabulary.num_rows}"
            )
        model = Qwen3ForCausalLM._from_config(config, attn_implementation=attention)
    else:
        model = load_model(
            Qwen3ForCausalLM, resolve_model(llm), attn_implementation=attention, dtype="float32"
        )
        if model.config.vocab_size > vocabulary.offset:
            raise ValueError(
                f"{llm} has {model.config.vocab_size} rows, but visual ids start at {vocabulary.offset}: "
                f"set offset to {model.config.vocab_size}"
            )
        model.resize_token_embeddings(vocabulary.num_rows, mean_resizing=False)
    model.config.visual_vocabulary = dataclasses.asdict(vocabulary)
    # An image ends by its length; the language model's own end token must not stop `generate`.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


@torch.no_grad()
def start_from_codebook(
    model: Qwen3ForCausalLM, vocabulary: VisualVocabulary, code_vectors: Tensor
) -> None:
    """Let the rows of the codes start as the tokenizer's code vectors (K, E), so that like codes are alike at once.

    With tied embeddings these rows are the head's rows too, so they must look like rows that the model knows: see
    `fit_projection`.
    """
    weight = model.get_input_embeddings().weight
    with gathered(weight):
        text = weight[: vocabulary.offset].float()  # ZeRO-3 holds it in bf16
        weight[vocabulary.code_rows] = fit_projection(code_vectors.to(text), text).to(weight)


def fit_projection(vectors: Tensor, rows: Tensor) -> Tensor:
    """Code vectors (K, E) as rows (K, D) that have the mean and the spread of `rows` (V, D), those of the text.

    The vectors are centred and projected on their min(D, E) leading principal axes, which keeps as much of the distances
    between them as D dimensions can, then turned by a random rotation, so that no dimension holds more than another.
    """
    centred = vectors - vectors.mean(0)
    dims = min(vectors.shape[1], rows.shape[1])
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -dims:]  # of ascending eigenvalues
    rotation = nn.init.orthogonal_(torch.empty(rows.shape[1], dims, device=rows.device)).T
    projected = centred @ axes @ rotation.to(centred)
    mean = rows.mean(0)
    return projected / projected.std() * (rows - mean).std() + mean


def require_generator(name: str) -> dict[str, Any]:
    """The values of a generator's `config.json`, read before any of its weights.

    Raises:
        FileNotFoundError: when there is no such model.
        ValueError: when the model is no generator.
    """
    values = require_kind(
        name, (Qwen3Config.model_type,), "a generator (a 'qwen3' with visual_vocabulary)"
    )
    if "visual_vocabulary" not in values:
        raise ValueError(f"{name} is no generator: its config.json has no visual_vocabulary")
    return values


def portable_path(tokenizer: str | Path, folder: Path) -> str:
    """What a generator in `folder` records of its tokenizer: the way from one to the other, or the hub id.

    A tree that holds both may then be moved or copied as a whole.
    """
    found = resolve_model(tokenizer)
    return (
        os.path.relpath(Path(found).resolve(), folder.resolve()) if Path(found).is_dir() else found
    )


def find_tokenizer(recorded: str, folder: str) -> Path:
    """The tokenizer's folder from what `portable_path` recorded, or from an absolute path, as older generators hold it.

    Raises:
        FileNotFoundError: when it is at none of these places.
    """
    beside = Path(folder).resolve() / recorded
    return local_model(beside if beside.is_dir() else recorded)


def read_vocabulary(config: PretrainedConfig) -> VisualVocabulary:
    """The visual vocabulary of a generator."""
    return VisualVocabulary(**config.visual_vocabulary)


def read_prompt_encoder(
    config: PretrainedConfig, text_tokenizer: PreTrainedTokenizerBase
) -> PromptEncoder:
    """The prompt encoder that a generator was trained with."""
    return PromptEncoder(
        text_tokenizer,
        read_vocabulary(config),
        template=config.prompt_template,
        max_caption_tokens=config.max_caption_tokens,
    )


def read_sampling(config: PretrainedConfig) -> SamplingConfig:
    """How a generator's codes are best drawn, by those who trained it."""
    return SamplingConfig(**getattr(config, "sampling", {}))


class VisualHead(nn.Linear):
    """An `lm_head` that computes the logits of some rows only; weights, keys and tying stay those of the whole head.

    As a module of its own it works under ZeRO-3, which gathers a partitioned weight around the forward of its module.
    """

    def __init__(self, head: nn.Linear, rows: slice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.rows = (
            head.in_features,
            head.out_features,
            head.weight,
            rows,
        )
        self.register_parameter("bias", None)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight[self.rows])
