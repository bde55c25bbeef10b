"""What lmms-eval finds by the entry point `lmms_eval.models`: a manifest, quick to import.

python -m lmms_eval --model vqrae --model_args pretrained=runs/understanding --tasks pope
"""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of the model `vqrae` (lmms-eval 0.7.3)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vqrae", chat_class_path="vqrae.eval.understanding.lmms_eval_model.LMMSEvalModel"
    )
