"""A small random mPLUG, and what modelscope's own preprocessor and model say about some images.

Makes mplug.json, with modelscope 1.40.2, addict, simplejson and its transformers:

    pip install --no-deps --target OLD transformers==4.44.2 tokenizers==0.19.1
    huggingface_hub==0.24.7 PYTHONPATH=OLD python tests/eval/golden/mplug.py >
    tests/eval/golden/mplug.json
"""

import importlib.abc
import importlib.machinery
import json
import string
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

VOCABULARY = [  # [CLS] and [SEP] are 101 and 102 in modelscope's beam search
    "[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase),
    *string.digits, *"?!.,'-",
    "is", "there", "red", "blue", "circle", "the", "in", "image", "yes", "no", "car",
]  # fmt: skip
QUESTIONS = ("Is there a red circle ?", "is the CAR blue?", "a " * 40)


def write_checkpoint(folder: Path, code: Any) -> None:
    """A checkpoint of random weights, each seeded by its name; `code`: `modeling_mplug`."""
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_hidden_layers": 2, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 64, "type_vocab_size": 2,
        "vocab_size": len(VOCABULARY), "pad_token_id": 0, "text_encoder_layers": 1,
        "text_decode_layers": 2,
        "fusion_layers": 1, "stride_layer": 1, "encoder_width": 64, "model_type": "bert",
    }  # fmt: skip
    settings = {
        "task": "visual-question-answering", "bert_config": "config_bert.json", "image_res": 48,
        "vision_width": 768,
        "clip_name": "ViT-B-16", "clip_embed_dim": 16, "clip_image_resolution": 48,
        "clip_vision_layers": 1,
        "clip_vision_width": 768, "clip_vision_patch_size": 16, "clip_context_length": 8,
        "clip_vocab_size": 8,
        "clip_transformer_width": 64, "clip_transformer_heads": 1, "clip_transformer_layers": 1,
        "max_length": 6,
    }  # fmt: skip
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "config_bert.json").write_text(json.dumps(text))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    described = {"task": settings["task"], "model": {"type": "mplug"}}
    (folder / "configuration.json").write_text(json.dumps(described))
    config = code.MPlugConfig(**settings, distill=False)
    config.model_dir = str(folder)
    weights = code.MPlugForVisualQuestionAnswering(config).state_dict()
    tied = "text_decoder.cls.predictions.decoder.weight"
    for name, tensor in weights.items():
        if tensor.is_floating_point() and name != tied:
            seed = zlib.crc32(name.encode())
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
            spread = 2 / tensor[0].numel() ** 0.5 if tensor.dim() > 1 else 0.1
            tensor.copy_(spread * noise + (tensor.dim() == 1 and name.endswith("weight")))
    weights[tied] = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    stored = {f"model.{name}": tensor.clone() for name, tensor in weights.items()}
    torch.save({"module": stored}, folder / "pytorch_model.bin")


def pairs() -> list[tuple[Image.Image, str]]:
    """Images of several shapes, with every question."""
    rng = np.random.default_rng(0)
    sizes = ((30, 70), (90, 40), (48, 48), (5, 9))
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    return [(image, question) for image in images for question in QUESTIONS]


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that modelscope's preprocessors import and mPLUG's does not use."""

    names = ("datasets", "decord", "modelscope.msdatasets", "modelscope.pipelines", *(
        f"modelscope.preprocessors.{part}" for part in ("ofa", "nlp", "audio", "asr", "video",
        "science")
    ))  # fmt: skip

    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        absent = any(name == one or name.startswith(f"{one}.") for one in self.names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        vars(module).update(__all__=[], __path__=[])
        vars(module)["__getattr__"] = lambda name: type(name, (), {})
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main() -> None:
    sys.meta_path.insert(0, Absent())
    from modelscope.models.multi_modal.mplug import modeling_mplug
    from modelscope.models.multi_modal.mplug_for_all_tasks import MPlugForAllTasks
    from modelscope.preprocessors.multi_modal import MPlugPreprocessor

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), modeling_mplug)
        sys.stdout, out = sys.stderr, sys.stdout  # the model prints what it loads
        model, preprocessor = MPlugForAllTasks(folder).eval(), MPlugPreprocessor(folder)
        cases = []
        for image, question in pairs():
            inputs = preprocessor({"image": image, "question": question})
            with torch.no_grad():
                [[ids]], [[score]] = model.model(**inputs, train=False)
                answer = model(inputs)["text"]
            pixels = inputs["image"][0, :, ::16, ::16].flatten().tolist()
            case = {"answer": answer, "ids": ids.tolist(), "score": float(score)}
            case["question"] = inputs["question"].input_ids[0].tolist()
            cases.append({**case, "pixels": [round(p, 6) for p in pixels]})
        lines = ",\n".join(json.dumps(case) for case in cases)
        out.write(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
