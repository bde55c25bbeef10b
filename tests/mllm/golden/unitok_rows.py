"""Rows and labels of UniTok's own collator, and the names of its model's weights: writes
`unitok_rows.json`, which the tests read.

    python tests/mllm/golden/unitok_rows.py UNITOK

UNITOK is a checkout of FoundationVision/UniTok. Its collator and its expansion of images are cut
out of `eval/liquid` and run as they are, on the tests' Llama tokenizer. `*` marks a token that is
trained.
"""

import ast
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from llama_tokenizer import train_llama_tokenizer
from unitok_weights import CODEBOOK_SIZE, LLAMA, NUM_CODEBOOKS

IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100
VOCABULARY = 330  # of the tests' Llama tokenizer
CODES = torch.arange(2 * 4).view(2, 4)  # two codebooks, four places
CAPTION = "a photo of a red circle"
TURNS = ["<image>\nwhat color is the star ?", "red circle", "and the circle ?", "two"]
SAMPLES = {
    "generation": {"data_type": "T2I", "text": "no", "InVL_caption": CAPTION},
    "unconditional": {"data_type": "T2I", "text": "no", "InVL_caption": "no"},
    "captioning": {"data_type": "I2T", "InVL_caption": CAPTION},
    "instructions": {"data_type": "mllm_finetune", "text": TURNS},
}


def published(unitok: Path) -> dict[str, Any]:
    """The names of UniTok's collator, tokenization and expansion of images."""
    liquid = unitok / "eval" / "liquid"
    conversation = load(liquid / "conversation.py")
    scope: dict[str, Any] = {"torch": torch, "transformers": transformers, "json": json, "np": np}
    scope |= {"conversation_lib": conversation, "DEFAULT_IMAGE_TOKEN": "<image>"}
    scope |= {"IGNORE_INDEX": IGNORE_INDEX, "IMAGE_TOKEN_INDEX": IMAGE_TOKEN_INDEX}
    scope["IS_TOKENIZER_GREATER_THAN_0_14"] = True
    exec("from typing import *\nfrom dataclasses import dataclass\nimport os\nF = None", scope)
    wanted = {"tokenizer_image_token", "DataCollatorForSupervisedDataset"}
    wanted.add("prepare_inputs_labels_for_multimodal")
    for file in ("mm_utils.py", "train.py", "model/liquid.py"):
        for node in ast.walk(ast.parse((liquid / file).read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in wanted:
                exec(compile(ast.Module([node], []), file, "exec"), scope)
    return scope


def expand(scope: dict[str, Any], batch: dict[str, Any]) -> tuple[Any, ...]:
    """(vectors, labels, places of images to generate) as the published model has them.

    The vector of a token is its id, and that of an image place is -1.
    """

    def embed_images(codes: torch.Tensor) -> torch.Tensor:
        return torch.full((len(codes), codes.shape[2], 1), -1.0)

    embed_images.num_codebooks = len(CODES)  # type: ignore[attr-defined]
    inner = types.SimpleNamespace(multi_embedder=embed_images)
    inner.embed_tokens = lambda ids: ids[:, None].float()
    model = types.SimpleNamespace(model=inner, get_model=lambda: inner, config=None)
    model.get_vision_tower = lambda: None
    given = (batch["input_ids"], None, batch["attention_mask"], None, batch["labels"])
    given += (batch["images"], None, batch["data_types"])
    outputs = scope["prepare_inputs_labels_for_multimodal"](model, *given)
    return outputs[4][..., 0].long(), outputs[5], outputs[8]


def weights(liquid: Path) -> dict[str, list[int]]:
    """Names and shapes of a model like the published one, with smaller sizes."""
    config = transformers.LlamaConfig(**LLAMA, num_hidden_layers=2, vocab_size=VOCABULARY)
    quant, arhead = (load(liquid / "model" / f"{name}.py") for name in ("quant", "arhead"))
    total, width = NUM_CODEBOOKS * CODEBOOK_SIZE, config.hidden_size
    mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, width), nn.GELU(), nn.Linear(width, width))
    parts = {
        "": transformers.LlamaForCausalLM(config),
        "model.multi_embedder.quantizer.": quant.VectorQuantizerM(total, 16, 0.25, False, 0.01, 4),
        "model.multi_embedder.attn_projection.": quant.AttnProjection(16, 32, 4),
        "model.multi_embedder.mm_projector.": mlp,
        "ar_head.": arhead.AR_head(config, total, NUM_CODEBOOKS),
    }
    names = {}
    for prefix, part in parts.items():
        names |= {prefix + name: list(t.shape) for name, t in part.state_dict().items()}
    return names


def load(path: Path) -> Any:
    """A module of the checkout, without its package."""
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(unitok: Path) -> None:
    scope, golden = published(unitok), {}
    arguments = types.SimpleNamespace(t2i_prompt_type=None, vqconversion=False)
    arguments.vq_resolution, arguments.T2I_ratio = 256, 1.0
    for legacy in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            text_tokenizer = train_llama_tokenizer(Path(folder), legacy=legacy)
        text_tokenizer.pad_token, text_tokenizer.model_max_length = "<unk>", 2048
        collate = scope["DataCollatorForSupervisedDataset"](text_tokenizer, arguments)
        cases = golden[f"legacy={legacy}"] = {}
        for name, sample in SAMPLES.items():
            sample = {**sample, "vqcode_256": json.dumps(CODES.tolist())}
            if name == "instructions":
                speakers = ("human", "gpt") * 2
                turns = [
                    {"from": who, "value": text} for who, text in zip(speakers, TURNS, strict=True)
                ]
                sample["text"] = json.dumps(turns)
            with mock.patch("numpy.random.rand", return_value=0.5):  # nothing is dropped
                batch = collate([sample])
            ids, labels, places = expand(scope, batch)
            words = ["<image>" if i < 0 else text_tokenizer.convert_ids_to_tokens([i])[0]
                     for i in ids[0].tolist()]  # fmt: skip
            marks = ["*" * (label != IGNORE_INDEX) for label in labels[0].tolist()]
            tokens = [mark + word for mark, word in zip(marks, words, strict=True)]
            cases[name] = {"tokens": tokens, "generated": [list(map(int, p)) for p in places]}
    golden |= {"caption": CAPTION, "turns": TURNS, "weights": weights(unitok / "eval" / "liquid")}
    text = json.dumps(golden, ensure_ascii=False) + "\n"
    Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
