"""Give a small encoder semantics before it is quantized: SigLIP's sigmoid loss (arXiv 2303.15343)
on images and captions and, densely, on patches and the phrases of what they show.

    python -m vqrae.quickstart.pretrain_encoder tiny_encoder output_dir=runs/encoder

The full-size tokenizers start from published encoders; the embedded default earns its own on
captioned scenes. SigLIP 2 learns local semantics by decoding grounded captions; on minutes of data
the same grounding teaches much sooner as a contrast (docs/quickstart.md compares).

Shapes: B batch, T tokens of a text, P phrases, N patches of an image, R patches of objects.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel
from transformers.trainer_utils import set_seed

from vqrae.common import run as runs
from vqrae.common.cli import parse
from vqrae.common.config import check_range
from vqrae.common.distributed import attention_implementation
from vqrae.common.errors import run_main
from vqrae.common.files import atomic_path
from vqrae.common.trainer import (
    InstrumentCallback,
    OptimizationConfig,
    WholeTrainer,
    build_optimizers,
    check_launch,
    run_trainer,
    training_arguments,
)
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.scenes.sprites import load_sprites
from vqrae.data.word_tokenizer import END, build_word_tokenizer
from vqrae.tokenizer.contrastive import sigmoid_losses


@dataclass(frozen=True, kw_only=True)
class EncoderPretrainingConfig(runs.RunConfig):
    """Image-text pretraining of a small SigLIP on captioned scenes."""

    vision: dict[str, Any]
    """`SiglipVisionConfig` values."""
    text: dict[str, Any]
    """`SiglipTextConfig` values; the vocabulary comes from the captions."""
    optimization: OptimizationConfig
    logit_bias: float = -10.0
    """Initial bias of the sigmoid, the log-odds of a match. SigLIP has -10 for large batches."""
    grounding_weight: float = 0.0
    """Of the sigmoid loss between patches and phrases."""
    sprites: str = "shapes"
    attention: str = "auto"

    def __post_init__(self) -> None:
        check_range(self, "grounding_weight", low=0)


class GroundedSiglip(SiglipModel):
    """`SiglipModel` with a second sigmoid loss: every patch of an object, every phrase.

    The loss over whole images is dominated by what is easiest to distinguish, colours; this one
    asks every patch.
    """

    def __init__(self, config: SiglipConfig, *, grounding_weight: float = 0.0) -> None:
        super().__init__(config)
        self.grounding_weight = grounding_weight

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        phrase_ids: Tensor,
        patches: Tensor,
        truth: Tensor,
    ) -> Any:
        """One loss of images (B, 3, H, W), captions (B, T) and phrases (P, T).

        Args:
            patches: (R,) indices into the batch's B x N patches, those that show an object.
            truth: (R, P) bool, whether a phrase is true of the object that a patch shows.
        """
        output = super().forward(pixel_values=pixel_values, input_ids=input_ids, return_loss=True)
        if self.grounding_weight:
            features_RD = output.vision_model_output.last_hidden_state.flatten(0, 1)[patches]
            phrases_PD = self.get_text_features(input_ids=phrase_ids).pooler_output
            features_RD = F.normalize(features_RD.float(), dim=-1)
            phrases_PD = F.normalize(phrases_PD.float(), dim=-1)
            logits_RP = features_RD @ phrases_PD.T * self.logit_scale.exp() + self.logit_bias
            losses_RP = sigmoid_losses(logits_RP, truth)
            output.loss = output.loss + self.grounding_weight * losses_RP.sum(-1).mean()
        return output


class GroundedCollator:
    """Captioned images with grounded phrases -> inputs of `GroundedSiglip`.

    As in SigLIP, text is padded to full length and padding is attended.
    """

    def __init__(self, text_tokenizer: Any, max_length: int, grid_size: int) -> None:
        self.text_tokenizer, self.max_length = text_tokenizer, max_length
        centers = (torch.arange(grid_size) + 0.5) / grid_size
        y, x = torch.meshgrid(centers, centers, indexing="ij")
        self.y_N, self.x_N = y.flatten(), x.flatten()

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = torch.stack([sample["image"] for sample in samples]).float() / 255
        known: set[str] = set()
        for sample in samples:
            known.update(*sample["phrases"])
        phrases = sorted(known)
        patches = []
        truth = []  # of each object
        for i, sample in enumerate(samples):
            for box, own in zip(sample["boxes"], sample["phrases"], strict=True):
                left, top, right, bottom = box
                inside = (self.x_N > left) & (self.x_N < right)
                inside &= (self.y_N > top) & (self.y_N < bottom)
                patches.append(inside.nonzero().flatten() + i * len(inside))
                truth.append([phrase in own for phrase in phrases])
        counts = torch.tensor([len(each) for each in patches])
        return {
            "pixel_values": (images - 0.5) / 0.5,
            "input_ids": self.tokenize([sample["caption"] for sample in samples]),
            "phrase_ids": self.tokenize(phrases),
            "patches": torch.cat(patches),
            "truth": torch.tensor(truth).repeat_interleave(counts, dim=0),
        }

    def tokenize(self, texts: list[str]) -> Tensor:
        """Texts -> token ids (B, max_length)."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        return self.text_tokenizer(texts, return_tensors="pt", **options)["input_ids"]


def build_siglip(
    config: EncoderPretrainingConfig, vocabulary_size: int, end_token_id: int
) -> GroundedSiglip:
    """A SigLIP of the configured size, ready to learn."""
    text = {**config.text, "vocab_size": vocabulary_size, "eos_token_id": end_token_id}
    half = config.optimization.bf16
    model = GroundedSiglip._from_config(
        SiglipConfig(text_config=text, vision_config=config.vision),
        attn_implementation=attention_implementation(config.attention, half=half),
        grounding_weight=config.grounding_weight,
    )
    # transformers starts both at 0, where nothing contrastive is learned; the paper at log 10, -10.
    nn.init.constant_(model.logit_scale, math.log(10))
    nn.init.constant_(model.logit_bias, config.logit_bias)
    return model


@torch.no_grad()
def retrieval_accuracy(
    model: SiglipModel, collator: GroundedCollator, dataset: Dataset, size: int = 100
) -> float:
    """Share of `size` images whose own caption, or an equal one, scores highest of all captions."""
    samples = [dataset[i] for i in range(size)]
    inputs = collator(samples)
    output = model.eval()(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"])
    best = output.logits_per_image.argmax(-1).tolist()
    found = [samples[i]["caption"] == samples[j]["caption"] for i, j in enumerate(best)]
    return sum(found) / size


def main(argv: list[str] | None = None) -> None:
    """Command line: CONFIG [key.path=value …]."""
    config = parse(EncoderPretrainingConfig, argv, package="vqrae.quickstart")
    optimization, output = config.optimization, Path(config.output_dir)
    max_steps, checkpoints = optimization.max_steps, output / "checkpoints"
    run = runs.open(output, config, seed=config.seed, report_to=config.report_to)
    if run.finished(max_steps):
        return
    check_launch(optimization, checkpoints)
    run.begin()
    set_seed(config.seed)
    texts = vocabulary_texts(load_sprites(config.sprites).names)
    text_tokenizer = build_word_tokenizer(texts, end_with=END)
    image_size = config.vision["image_size"]
    grid_size = image_size // config.vision["patch_size"]
    collator = GroundedCollator(text_tokenizer, config.text["max_position_embeddings"], grid_size)
    model = build_siglip(config, len(text_tokenizer), text_tokenizer.eos_token_id)
    options: dict[str, Any] = {
        "item": "grounded_pair",
        "image_size": image_size,
        "sprites": config.sprites,
        "seed": config.seed,
    }
    trainer = WholeTrainer(
        model=model,
        args=training_arguments(optimization, checkpoints, seed=config.seed),
        train_dataset=SceneDataset("train", **options),
        data_collator=collator,
        optimizers=build_optimizers(optimization, model),
        callbacks=[InstrumentCallback(run, "encoder")],
    )
    run_trainer(trainer)
    trainer.require_finite_weights()
    trainer.save_model(str(output / "siglip"))  # collective: every rank takes part
    if trainer.is_world_process_zero():
        text_tokenizer.save_pretrained(output / "siglip")
        trained = SiglipModel.from_pretrained(output / "siglip")
        accuracy = retrieval_accuracy(trained, collator, SceneDataset("validation", **options))
        run.log(max_steps, {"retrieval_accuracy": accuracy})
        # The vision tower without its pooling head; last, for it marks the run as finished.
        tower = SiglipVisionModel.from_pretrained(output / "siglip", vision_use_head=False)
        with atomic_path(output / "model") as whole:
            tower.save_pretrained(whole)
            runs.mark_trained(whole, max_steps)
        found = f"of 100 held-out images {accuracy:.0%} find their own caption"
        print(f"encoder in {output / 'model'}: {found}")


if __name__ == "__main__":
    run_main(main)
