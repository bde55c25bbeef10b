"""The quickstart's trainings on a CPU vs plain loops, at the shapes of the configurations `tiny`.

A plain loop is what one writes with transformers and timm: models as they come, with SDPA, timm's
Muon, which takes matrices one by one, and logits at every position. That of the tokenizer is
written as TiTok's (1d-tokenizer, utils/train_utils.py): one loss module, each loss read for the log
in every step. Both ways start from the same weights, see the same batches, made ahead, in bf16
autocast, and must have the same curve of losses up to rounding.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim.muon import Muon as PlainMuon
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Row, time_row
from benchmarks.packing import ENCODER, small_llava
from vqrae.common.config import load_config, shipped_config
from vqrae.common.lean import make_lean
from vqrae.common.optim import Muon, muon_groups
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.word_tokenizer import END, build_word_tokenizer
from vqrae.generation.config import GeneratorConfig
from vqrae.generation.data import GenerationCollator
from vqrae.generation.heads import SingleCodeHead
from vqrae.generation.modeling import PromptEncoder, VisualVocabulary, build_generator
from vqrae.generation.train import visual_loss
from vqrae.quickstart.pretrain_encoder import (
    EncoderPretrainingConfig,
    GroundedCollator,
    build_siglip,
)
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.losses import distillation_loss
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.conversation import ConversationCollator

Loss = Callable[[Any, dict[str, Any]], Tensor]
"""(model, batch) -> scalar."""
RATE = 2e-3
TOLERANCE = 0.02
CODES = VisualVocabulary(offset=512, codebook_size=1024, num_codes=64)
PLAIN_BATCH = ("input_ids", "attention_mask", "labels", "pixel_values")


class Codes(Dataset):
    """Captioned scenes with random codes: {codes (64,), caption}."""

    scenes = SceneDataset(item="pair")

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        codes = torch.randint(CODES.codebook_size, CODES.code_shape, generator=generator)
        return {"codes": codes, "caption": self.scenes.caption(index)}


def compare(
    name: str,
    build: Callable[[], nn.Module],
    losses: tuple[Loss, Loss],
    batches: list[dict[str, Any]],
    batch: int,
    repeats: int,
) -> Row:
    """The row of a training: `losses` are ours and that of a plain loop."""
    passes = []
    for lean, loss in zip((True, False), losses, strict=True):
        torch.manual_seed(0)
        model: Any = build().train()
        kind = Muon if lean else PlainMuon
        optimizer = kind(muon_groups(model, 0.01), lr=RATE, nesterov=True, betas=(0.9, 0.98))
        if lean:
            make_lean(model)
        else:
            model.set_attn_implementation("sdpa")
        passes.append(epoch(model, optimizer, loss, batches))
    curves = [each() for each in passes]
    distance = max(abs(a - b) / abs(b) for a, b in zip(*curves, strict=True))
    assert distance < TOLERANCE, f"{name}: the curves differ by {distance:.1%}"
    print(f"{name}: the curves of {len(batches)} steps differ by at most {distance:.2%}")
    work = batch * len(batches)
    return time_row(name, *passes, repeats=repeats, work=work, unit="samples/s")


def epoch(
    model: nn.Module, optimizer: Any, loss: Loss, batches: list[dict[str, Any]]
) -> Callable[[], list[float]]:
    """A pass over the batches, one step each, that returns their losses."""

    def train() -> list[float]:
        curve = []
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model, batch)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(value.item())
        return curve

    return train


def collated(dataset: Any, collator: Any, batch: int, steps: int) -> list[dict[str, Any]]:
    """The first batches of a data set."""
    return list(islice(DataLoader(dataset, batch_size=batch, collate_fn=collator), steps))


def output_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """What a model of transformers computes itself."""
    return model(**batch).loss


def encoder(batch: int, steps: int, repeats: int) -> Row:
    config = load_config(
        EncoderPretrainingConfig, shipped_config("vqrae.quickstart", "tiny_encoder")
    )
    scenes = SceneDataset(item="grounded_pair")
    text = build_word_tokenizer(vocabulary_texts(scenes.sprites.names), end_with=END)
    collator = GroundedCollator(text, config.text["max_position_embeddings"], grid_size=8)
    batches = collated(scenes, collator, batch, steps)

    def build() -> nn.Module:
        return build_siglip(config, len(text), text.eos_token_id)

    return compare("encoder", build, (output_loss, output_loss), batches, batch, repeats)


def sft(batch: int, steps: int, repeats: int) -> Row:
    collator = ConversationCollator(small_llava()[1])
    batches = collated(SceneDataset(item="conversation"), collator, batch, steps)

    def plain(model: Any, batch: dict[str, Any]) -> Tensor:
        return model(**{name: batch[name] for name in PLAIN_BATCH}).loss

    return compare("sft", lambda: small_llava()[0], (output_loss, plain), batches, batch, repeats)


def generator(batch: int, steps: int, repeats: int) -> Row:
    path = shipped_config("vqrae.generation", "tiny")
    llm_config = load_config(GeneratorConfig, path).training.model.llm_config
    text = build_word_tokenizer(vocabulary_texts(Codes.scenes.sprites.names))
    batches = collated(Codes(), GenerationCollator(PromptEncoder(text, CODES)), batch, steps)

    def build() -> nn.Module:
        return build_generator(CODES, llm_config=llm_config, attention="eager")

    def ours(model: Any, batch: dict[str, Any]) -> Tensor:
        if not isinstance(model.lm_head, SingleCodeHead):
            model.lm_head = SingleCodeHead(model.lm_head, CODES.code_rows)
        return visual_loss(model, batch, CODES)

    def plain(model: Any, batch: dict[str, Any]) -> Tensor:
        codes = batch["codes"]
        ids = torch.cat([batch["input_ids"], CODES.to_ids(codes)], dim=1)
        inputs = {name: batch[name] for name in ("attention_mask", "position_ids")}
        logits = model(input_ids=ids, **inputs).logits[:, -CODES.num_codes - 1 : -1]
        logits = logits[..., CODES.code_rows].float()
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    return compare("generator", build, (ours, plain), batches, batch, repeats)


def tokenizer(batch: int, steps: int, repeats: int) -> Row:
    config = VQRAEConfig(encoder_config=ENCODER, codebook_size=1024, codebook_dim=128)
    torch.manual_seed(1)
    teacher = VQRAEModel(config).encoder.eval().requires_grad_(False)
    loader = DataLoader(SceneDataset(), batch_size=batch)
    batches = [{"images": each["image"] / 255} for each in islice(loader, steps)]

    def losses(model: VQRAEModel, images: Tensor) -> dict[str, Tensor]:
        output = model(images)
        with torch.no_grad():
            target = encoder_features(teacher, model.normalize(images), config.feature_tap)
        distillation = 0.05 * distillation_loss(output.features, target)
        reconstruction = F.mse_loss(output.reconstruction, images)
        return {"reconstruction": reconstruction, "distillation": distillation, **output.losses}

    def ours(model: Any, batch: dict[str, Any]) -> Tensor:
        return torch.stack(list(losses(model, batch["images"]).values())).sum()

    def plain(model: Any, batch: dict[str, Any]) -> Tensor:
        parts = losses(model, batch["images"])
        log = {name: part.mean().item() for name, part in parts.items()}
        assert len(log) == len(parts)
        return torch.stack(list(parts.values())).sum()

    return compare("tokenizer", lambda: VQRAEModel(config), (ours, plain), batches, batch, repeats)


def run(batch: int = 32, steps: int = 4, repeats: int = 3) -> list[Row]:
    size = (batch, steps, repeats)
    return [encoder(2 * batch, steps, repeats), sft(*size), generator(*size), tokenizer(*size)]
