"""Give a small encoder semantics before it is quantized: SigLIP's sigmoid image-text loss (arXiv 2303.15343).

The full-size tokenizers start from published encoders; the embedded default earns its own on captioned scenes.

    python -m vqrae.tokenizer.pretrain_encoder tiny_encoder output_dir=runs/encoder
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel, Trainer
from transformers.trainer_utils import set_seed

from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import attention_implementation
from vqrae.common.files import atomic_path
from vqrae.common.run import RunDirectory
from vqrae.common.trainer import InstrumentCallback, OptimizationConfig, run_trainer, training_arguments
from vqrae.data.scenes import SceneDataset, load_sprites
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.word_tokenizer import END, build_word_tokenizer


@dataclass(frozen=True, kw_only=True)
class EncoderPretrainingConfig:
    """Image-text pretraining of a small SigLIP on captioned scenes."""

    output_dir: str
    vision: dict[str, Any]
    """`SiglipVisionConfig` values."""
    text: dict[str, Any]
    """`SiglipTextConfig` values; the vocabulary comes from the captions."""
    optimization: OptimizationConfig
    sprites: str = "shapes"
    attention: str = "auto"
    seed: int = 0


class ContrastiveCollator:
    """Captioned pictures -> SigLIP inputs. As in SigLIP, text is padded to full length and padding is attended."""

    def __init__(self, text_tokenizer: Any, max_length: int) -> None:
        self.text_tokenizer, self.max_length = text_tokenizer, max_length

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.stack([sample["image"] for sample in samples]).float() / 255
        text = self.text_tokenizer(
            [sample["caption"] for sample in samples],
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {"pixel_values": (images - 0.5) / 0.5, "input_ids": text["input_ids"], "return_loss": True}


def build_siglip(config: EncoderPretrainingConfig, vocabulary_size: int, end_token_id: int) -> SiglipModel:
    """A SigLIP of the configured size, ready to learn.

    From a bare configuration the logit scale and bias are 0 and nothing contrastive is learned; the paper starts from
    log 10 and -10.
    """
    text = {**config.text, "vocab_size": vocabulary_size, "eos_token_id": end_token_id}
    siglip = SiglipConfig(text_config=text, vision_config=config.vision)
    model = SiglipModel._from_config(siglip, attn_implementation=attention_implementation(config.attention))
    torch.nn.init.constant_(model.logit_scale, math.log(10))
    torch.nn.init.constant_(model.logit_bias, -10.0)
    return model


@torch.no_grad()
def retrieval_accuracy(model: SiglipModel, collator: ContrastiveCollator, dataset: Dataset, size: int = 100) -> float:
    """Share of `size` pictures whose own caption scores highest among all of theirs (equal captions count as own)."""
    model.eval()
    samples = [dataset[i] for i in range(size)]
    logits: Tensor = model(**collator(samples)).logits_per_image
    best = logits.argmax(-1).tolist()
    return sum(samples[i]["caption"] == samples[j]["caption"] for i, j in enumerate(best)) / size


def main(argv: list[str] | None = None) -> None:
    name, *overrides = argv if argv is not None else sys.argv[1:]
    config = load_config(EncoderPretrainingConfig, shipped_config("vqrae.tokenizer", name), overrides)
    run = RunDirectory(config.output_dir, config, seed=config.seed)
    final = run.path / "model"
    if final.is_dir():
        print(f"{final} is finished")
        return
    set_seed(config.seed)
    texts = vocabulary_texts(load_sprites(config.sprites).names)
    text_tokenizer = build_word_tokenizer(texts, end_with=END)
    collator = ContrastiveCollator(text_tokenizer, config.text["max_position_embeddings"])
    model = build_siglip(config, len(text_tokenizer), text_tokenizer.eos_token_id)
    image_size = config.vision["image_size"]
    options: dict[str, Any] = {"image_size": image_size, "sprites": config.sprites, "seed": config.seed}
    trainer = Trainer(
        model=model,
        args=training_arguments(config.optimization, run.path / "checkpoints", seed=config.seed),
        train_dataset=SceneDataset("train", item="contrastive_pair", **options),
        data_collator=collator,
        callbacks=[InstrumentCallback(run, "encoder")],
    )
    run_trainer(trainer)
    trainer.save_model(str(run.path / "siglip"))  # collective: every rank takes part
    if trainer.is_world_process_zero():
        save_vision_tower(run.path / "siglip", final)
        trained = SiglipModel.from_pretrained(run.path / "siglip")
        accuracy = retrieval_accuracy(trained, collator, SceneDataset("validation", item="contrastive_pair", **options))
        run.log(config.optimization.max_steps, {"retrieval_accuracy": accuracy})
        print(f"encoder in {final}: of 100 held-out pictures {accuracy:.0%} find their own caption")


def save_vision_tower(siglip_folder: Path, folder: Path) -> None:
    """Keep the vision tower of a SigLIP folder, without its pooling head."""
    tower = SiglipVisionModel.from_pretrained(siglip_folder, vision_use_head=False)
    with atomic_path(folder) as temporary:
        tower.save_pretrained(temporary)


if __name__ == "__main__":
    main()
