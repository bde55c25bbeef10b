"""What lmms-eval finds by the entry point `lmms_eval.models`: manifests, quick to import.

python -m lmms_eval --model vqrae --model_args pretrained=runs/understanding --tasks pope
python -m lmms_eval --model vqrae_generator --model_args generator=runs/generation --tasks WISE
"""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest`s of `vqrae`, which answers, and `vqrae_generator` (lmms-eval 0.7.3)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    folder = "vqrae.eval.understanding"
    chat = f"{folder}.lmms_eval_model.LMMSEvalModel"
    images = f"{folder}.lmms_eval_generator.LMMSEvalGenerator"
    return [
        ModelManifest(model_id="vqrae", chat_class_path=chat),
        ModelManifest(model_id="vqrae_generator", simple_class_path=images),
    ]
