"""Tokens and labels of LLaVA's own preprocess_plain and preprocess_v1: `llava_tokens.json`.

    python tests/understanding/golden/llava_tokens.py LLAVA

LLAVA is a checkout of haotian-liu/LLaVA. Its functions are cut out of their files and run as they
are, on the tests' own Llama tokenizer. `*` marks a token that is trained,
`<image>` stands for one image.
"""

import ast
import copy
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))
from llama_tokenizer import train_llama_tokenizer

IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100
TURNS = {
    "plain": ["<image>", "red circle"],
    "v1": ["<image>\nwhat color is the star ?", "red circle", "and the circle ?", "two"],
}


def functions_of(llava: Path) -> dict[str, Any]:
    """LLaVA's functions, in the names that their modules give them."""
    spec: Any = importlib.util.spec_from_file_location(
        "llava_conversation", llava / "llava" / "conversation.py"
    )
    conversation = sys.modules["llava_conversation"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conversation)
    scope: dict[str, Any] = {
        "torch": torch, "transformers": transformers, "copy": copy,
        "conversation_lib": conversation, "Sequence": Sequence,
        "Dict": dict, "DEFAULT_IMAGE_TOKEN": "<image>", "IGNORE_INDEX": IGNORE_INDEX,
        "IMAGE_TOKEN_INDEX": IMAGE_TOKEN_INDEX,
        "IS_TOKENIZER_GREATER_THAN_0_14": True,
    }  # fmt: skip
    wanted = {"tokenizer_image_token", "preprocess_plain", "preprocess_v1"}
    for file in (llava / "llava" / "mm_utils.py", llava / "llava" / "train" / "train.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in wanted:
                exec(compile(ast.Module([node], []), str(file), "exec"), scope)
    return scope


def main(llava: Path) -> None:
    scope, golden = functions_of(llava), {}
    for legacy in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            text_tokenizer = train_llama_tokenizer(Path(folder), legacy=legacy)
        text_tokenizer.pad_token, text_tokenizer.model_max_length = "<unk>", 2048
        cases = golden[f"legacy={legacy}"] = {}
        for name, turns in TURNS.items():
            templates = scope["conversation_lib"].conv_templates
            scope["conversation_lib"].default_conversation = templates[name]
            said = zip(("human", "gpt") * len(turns), turns, strict=False)
            record = [{"from": speaker, "value": text} for speaker, text in said]
            options = {"has_image": True} if name == "v1" else {}
            output = scope[f"preprocess_{name}"]([record], text_tokenizer, **options)
            rows = zip(output["input_ids"][0].tolist(), output["labels"][0].tolist(), strict=True)
            tokens = []
            for token, label in rows:
                is_image = token == IMAGE_TOKEN_INDEX
                text = "<image>" if is_image else text_tokenizer.convert_ids_to_tokens(token)
                tokens.append("*" * (label != IGNORE_INDEX) + text)
            cases[name] = {"turns": turns, "tokens": tokens}
    text = json.dumps(golden, ensure_ascii=False) + "\n"
    Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
