"""DPG-Bench's official judge, mPLUG (arXiv 2205.12005): modelscope's model, not its pipeline.

The pipeline imports fairseq, which does not install on Python 3.11. The steps around the model are
those of modelscope's `MPlugPreprocessor` and `MPlugForAllTasks`: squared bicubic resize, CLIP's
normalisation, 25 tokens of the lower-cased question, beam search."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vqrae.common.checkpoints import require_finite
from vqrae.common.files import sha256

MPLUG = "damo/mplug_visual-question-answering_coco_large_en"
QUESTION_TOKENS = 25
CONFIG, WEIGHTS = "config.yaml", "pytorch_model.bin"


class MPlug:
    """The official judge, from a folder or an id at modelscope, which is downloaded."""

    name = "mplug"

    def __init__(self, model: str = MPLUG, device: str = "cpu", batch_size: int = 16) -> None:
        code, folder = _model_code(), _model_folder(model)
        # Not `yaml.Loader`, with which modelscope reads the file: it would run what the file says.
        options = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        # "distill" keeps momentum copies, which only training needs.
        config = code.MPlugConfig(**{**options, "distill": False})
        config.model_dir = str(folder)
        self.model: Any = code.MPlugForVisualQuestionAnswering(config)
        decoder = self.model.text_decoder
        words = decoder.bert.embeddings.word_embeddings.weight
        decoder.cls.predictions.decoder.weight = words  # transformers 5 no longer ties them
        _load_weights(self.model, folder / WEIGHTS)
        require_finite(self.model, folder / WEIGHTS)
        self.model.eval().requires_grad_(False).to(device)
        self.identity = f"sha256:{sha256(folder / WEIGHTS)}"
        self.device, self.batch_size = device, batch_size
        size = (config.image_res, config.image_res)
        resize = Resize(size, interpolation=InterpolationMode.BICUBIC)
        self._transform = Compose(
            [resize, ToTensor(), Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)]
        )

    @torch.inference_mode()
    def answer(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[str]:
        """One answer to each (image, question)."""
        decode = self.model.tokenizer.decode
        answers: list[str] = []
        for start in range(0, len(pairs), self.batch_size):
            ids, _ = self.model(*self._inputs(pairs[start : start + self.batch_size]), train=False)
            # Transformers 5 no longer closes the gaps before punctuation by default.
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": True}
            answers += [str(decode(best, **options)) for [best] in ids]
        return answers

    def _inputs(self, pairs: Sequence[tuple[Image.Image, str]]) -> tuple[Tensor, Any]:
        """Images (B, 3, H, W), and questions with input_ids and attention_mask (B, 25)."""
        images = torch.stack([self._transform(image.convert("RGB")) for image, _ in pairs])
        questions = self.model.tokenizer(
            [question.lower() for _, question in pairs],
            padding="max_length",
            truncation=True,
            max_length=QUESTION_TOKENS,
            return_tensors="pt",
        )
        return images.to(self.device), questions.to(self.device)


def _model_code() -> ModuleType:
    """modelscope's module of the model, with what transformers 5 has removed."""
    try:
        from modelscope.models.multi_modal.mplug import modeling_mplug
    except ImportError as error:
        raise ValueError(
            f"judge=mplug needs the package {error.name}: pip install -e .[mplug] ({error})"
        ) from None
    base = modeling_mplug.BertPreTrainedModel
    base.all_tied_weights_keys = {}  # set by `post_init`, which this code does not call
    base.get_head_mask = lambda self, head_mask, layers: [None] * layers
    base.invert_attention_mask = _invert_attention_mask
    return modeling_mplug


def _invert_attention_mask(self: Any, mask: Tensor) -> Tensor:
    """(B, S) or (B, T, S), 1 where attention is allowed -> 0 there, the least number elsewhere."""
    mask = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
    return (1 - mask.to(self.dtype)) * torch.finfo(self.dtype).min


def _model_folder(model: str) -> Path:
    folder = Path(model)
    if not folder.is_dir():
        from modelscope.hub.snapshot_download import snapshot_download

        folder = Path(snapshot_download(model))
    missing = [name for name in (CONFIG, WEIGHTS, "vocab.txt") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"judge_model={model} has no {', '.join(missing)}, expected modelscope's {MPLUG}"
        )
    return folder


def _load_weights(model: Any, path: Path) -> None:
    """Load a checkpoint as modelscope's `MPlug.from_pretrained`, but leave no random weights."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = stored.get("model", stored)
    stored = stored.get("module", stored)
    stored = {name.replace("model.", ""): tensor for name, tensor in stored.items()}
    model.load_state_dict(stored, strict=False)
    own = model.state_dict(keep_vars=True)
    loaded = {id(tensor) for name, tensor in own.items() if name in stored}  # tied: two names
    missing = [name for name, tensor in own.items() if id(tensor) not in loaded]
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} tensors of mPLUG, such as {missing[0]}: expected {MPLUG}"
        )
