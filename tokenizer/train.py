"""Train the tokenizer, in two stages (VQRAE section 3.3): first quantizer and decoder on a frozen encoder, then
everything together, with the encoder held by distillation to its frozen original.

    python -m vqrae.tokenizer.train tiny output_dir=runs/tokenizer model.encoder=runs/encoder
    torchrun --standalone --nproc_per_node 2 -m vqrae.tokenizer.train tiny zero=2 ...

Relaunching the same command continues where it stopped. Everything random is a function of seed and step, so a resumed
run equals an uninterrupted one.
"""

import copy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.trainer_utils import set_seed

from vqrae.common.checkpoints import resolve_model
from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import attention_implementation, gradient_accumulation, is_main_process, world_size
from vqrae.common.files import atomic_path, read_json, weights_fingerprint, write_json
from vqrae.common.pictures import picture_grid, save_picture
from vqrae.common.run import RunDirectory, format_duration
from vqrae.common.schedule import warmup_cosine
from vqrae.data.sources import open_images
from vqrae.data.stream import StreamSampler
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.discriminator import PatchDiscriminator
from vqrae.tokenizer.engine import build_accelerators, parameter_groups, prepare, save_engine
from vqrae.tokenizer.losses import (
    LeCam,
    discriminator_hinge_loss,
    distillation_loss,
    generator_hinge_loss,
    reconstruction_loss,
)
from vqrae.tokenizer.modeling import VQRAEModel, VQRAEOutput, encoder_features
from vqrae.tokenizer.perceptual import build_perceptual
from vqrae.tokenizer.train_config import ModelConfig, StageConfig, TokenizerTrainConfig
from vqrae.tokenizer.usage import CodeUsage

# ------------------------------------------------------------------------------------------------ model


def build_tokenizer(config: ModelConfig, attention: str) -> VQRAEModel:
    """A tokenizer whose encoder has its pretrained weights (or random ones, when only a configuration is given)."""
    if (config.encoder is None) == (config.encoder_config is None):
        raise ValueError("model: give either encoder (pretrained weights) or encoder_config (random ones)")
    encoder: PreTrainedModel | None = None
    encoder_config = config.encoder_config
    if config.encoder:
        source = resolve_model(config.encoder)
        loaded = AutoConfig.from_pretrained(source)
        options = {"vision_use_head": False} if "siglip" in loaded.model_type else {}
        encoder = AutoModel.from_pretrained(source, attn_implementation=attention, **options)
        encoder_config = encoder.config.to_diff_dict() | {"model_type": encoder.config.model_type}
    tokenizer_config = VQRAEConfig(
        encoder_config=encoder_config,
        feature_tap=config.feature_tap,
        feature_norm=config.feature_norm,
        quantizer=config.quantizer,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
        output_patch_size=config.output_patch_size,
        attn_implementation=attention,
    )
    model = VQRAEModel(tokenizer_config)
    if encoder is not None:
        model.encoder.load_state_dict(encoder.state_dict())
    return model


def set_trainable(model: VQRAEModel, stage: StageConfig) -> None:
    """Stage 1 freezes the encoder; what lies behind the feature tap never gets a gradient and is frozen too."""
    model.encoder.requires_grad_(not stage.freeze_encoder)
    if model.config.feature_tap == "hidden_states[-1]" and hasattr(model.encoder, "post_layernorm"):
        model.encoder.post_layernorm.requires_grad_(False)


def images_from(batch: dict[str, Tensor], device: torch.device, flip_seed: int | None) -> Tensor:
    """uint8 batch -> images in [0, 1]; half of them mirrored when `flip_seed` is given."""
    images = batch["image"].to(device, non_blocking=True).float() / 255
    if flip_seed is None:
        return images
    flips = torch.rand(len(images), generator=torch.Generator().manual_seed(flip_seed)) < 0.5
    return torch.where(flips.to(device)[:, None, None, None], images.flip(-1), images)


@torch.no_grad()
def revive_dead_codes(model: VQRAEModel, usage: CodeUsage, output: VQRAEOutput, seed: int) -> Tensor:
    """Move every code that the window did not see onto a feature of the last batch; the same on all processes.

    Features are drawn with probability proportional to their squared quantization error, as k-means++ draws its seeds:
    codes go where the table is poor, not where features are many.

    Returns:
        How many were moved, a scalar tensor.
    """
    dead = (usage.counts == 0).nonzero().flatten()
    if len(dead) > 0:
        features = model.project(output.features).flatten(0, 1)
        errors = (features - model.quantizer.lookup(output.codes).flatten(0, 1)).square().sum(-1)
        chosen = torch.multinomial(errors.cpu(), len(dead), True, generator=torch.Generator().manual_seed(seed))
        model.quantizer.revive(dead, broadcast(features[chosen.to(features.device)]))
    return torch.tensor(len(dead))


# ------------------------------------------------------------------------------------------------ one stage


def train_stage(config: TokenizerTrainConfig, number: int, model: VQRAEModel, run: RunDirectory) -> None:
    """Train `model` through stage `number`; the result lies in `run.path / "model"`."""
    stage = config.stage1 if number == 1 else config.stage2
    accumulation = gradient_accumulation(stage.global_batch_size, stage.micro_batch_size, world_size())
    engine, discriminator_engine = build_accelerators(stage, zero=config.zero, accumulation=accumulation, bf16=config.bf16)
    device = engine.device
    set_trainable(model, stage)
    model.to(device)

    # ---- networks that only judge
    needs_teacher = stage.distillation_weight > 0 or stage.perceptual_weight > 0
    teacher = copy.deepcopy(original_encoder(config, model)).to(device).eval().requires_grad_(False) if needs_teacher else None
    perceptual = build_perceptual(stage.perceptual_network, teacher, model.normalize) if stage.perceptual_weight else None
    discriminator = PatchDiscriminator(stage.discriminator_channels).to(device)
    lecam = LeCam().to(device)

    # ---- data
    dataset = open_images(config.data.train, image_size=model.config.image_size, split="train")
    validation = open_images(config.data.validation or config.data.train, image_size=model.config.image_size, split="validation")
    previews = torch.stack([validation[i]["image"] for i in range(min(12, len(validation)))]).to(device).float() / 255
    sampler = StreamSampler(len(dataset), seed=config.seed + number, rank=engine.process_index, world_size=engine.num_processes)
    loader = DataLoader(dataset, stage.micro_batch_size, sampler=sampler, num_workers=config.data.num_workers)

    # ---- the codebook's start
    checkpoint = run.latest_checkpoint()
    if number == 1 and config.model.codebook_init == "features" and checkpoint is None:
        tokens = model.config.grid_size**2
        count = max(256, -(-4 * model.config.codebook_size // tokens))
        first = torch.stack([dataset[i]["image"] for i in range(min(count, len(dataset)))])
        model.initialize_from_images(first.to(device).float() / 255)

    # ---- optimizers
    rest = nn.ModuleList([model.in_proj, model.quantizer, model.out_proj, model.decoder])
    modules = {"encoder": (model.encoder, stage.encoder_lr), "decoder": (rest, stage.decoder_lr)}
    groups = parameter_groups(modules, stage.weight_decay)
    optimizer: Any = torch.optim.AdamW(groups, betas=stage.adam_betas[:2], fused=True)
    base_rates = [group["lr"] for group in groups]
    d_groups = parameter_groups({"discriminator": (discriminator, stage.discriminator_lr)}, stage.weight_decay)
    d_optimizer: Any = torch.optim.AdamW(d_groups, lr=stage.discriminator_lr, betas=stage.adam_betas[:2], fused=True)
    wrapped, optimizer = prepare(engine, "tokenizer", model, optimizer)
    if stage.adversarial_weight:
        d_wrapped, d_optimizer = prepare(discriminator_engine, "discriminator", discriminator, d_optimizer)

    # ---- resume
    window, revival_window = (CodeUsage(model.config.codebook_size, device) for _ in range(2))
    start = 0
    if checkpoint is not None:
        start = read_json(checkpoint / "train_state" / "state.json")["step"]
        engine.load_state(str(checkpoint / "train_state" / "tokenizer"))
        if stage.adversarial_weight:
            discriminator_engine.load_state(str(checkpoint / "train_state" / "discriminator"))
        counters = torch.load(checkpoint / "train_state" / "counters.pt", weights_only=True)
        lecam.load_state_dict(counters["lecam"])
        window.load_state_dict(counters["window"])
        revival_window.load_state_dict(counters["revival_window"])
        print(f"stage {number}: continuing from step {start}")
    run.rewind(start)
    sampler.start = start * stage.global_batch_size
    batches = iter(loader)

    if is_main_process():
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        print(
            f"stage {number}: {total / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trainable, batch {stage.global_batch_size} "
            f"= {stage.micro_batch_size} x {accumulation} x {engine.num_processes} processes",
            flush=True,
        )

    # ---- loop
    wrapped.train()
    if stage.freeze_encoder:
        model.encoder.eval()
    clock, clock_step = time.time(), start
    losses: dict[str, Tensor] = {}
    grad_norm: Any = torch.zeros(())
    for step in range(start, stage.max_steps):
        warm = {"warmup_steps": stage.warmup_steps, "total_steps": stage.max_steps, "end": stage.end_lr / stage.decoder_lr}
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * warmup_cosine(step, **warm)
        adversarial = stage.adversarial_weight > 0 and step >= stage.discriminator_start
        d_step = step - stage.discriminator_start
        if adversarial:
            warm["total_steps"] -= stage.discriminator_start
            for group in d_optimizer.param_groups:
                group["lr"] = stage.discriminator_lr * warmup_cosine(d_step, **warm)

        for micro in range(accumulation):
            flip_seed = hash((config.seed, step, micro, engine.process_index)) if config.data.random_flip else None
            images = images_from(next(batches), device, flip_seed)
            with engine.accumulate(wrapped), torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                # -- tokenizer
                output = wrapped(images)
                reconstruction = output.reconstruction
                losses = {"reconstruction_loss": reconstruction_loss(reconstruction, images), **output.losses}
                if stage.distillation_weight:
                    with torch.no_grad():
                        target = encoder_features(teacher, model.normalize(images), model.config.feature_tap)
                    losses["distillation_loss"] = distillation_loss(output.features, target)
                if perceptual is not None:
                    losses["perceptual_loss"] = perceptual(reconstruction, images)
                if adversarial:
                    discriminator.requires_grad_(False)  # the bare module: its engine must not see this backward
                    losses["adversarial_loss"] = generator_hinge_loss(discriminator(reconstruction))
                    discriminator.requires_grad_(True)
                ramp = min(1.0, (d_step + 1) / max(1, stage.discriminator_ramp))
                weights = {name: getattr(stage, name.replace("_loss", "_weight")) for name in losses}
                total_loss = sum(
                    weights[name] * (ramp if name == "adversarial_loss" else 1) * loss for name, loss in losses.items()
                )
                engine.backward(total_loss)
                if engine.sync_gradients:
                    grad_norm = engine.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            window.update(output.codes)
            revival_window.update(output.codes)

            if adversarial:
                with discriminator_engine.accumulate(d_wrapped), torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                    logits = d_wrapped(torch.cat([images, reconstruction.detach()])).float()
                    real, fake = logits.chunk(2)
                    losses["discriminator_loss"] = discriminator_hinge_loss(real, fake)
                    d_loss = losses["discriminator_loss"] + stage.lecam_weight * lecam(real, fake)
                    discriminator_engine.backward(d_loss)
                    if discriminator_engine.sync_gradients:
                        discriminator_engine.clip_grad_norm_(discriminator.parameters(), stage.max_grad_norm)
                        means = discriminator_engine.reduce(torch.stack([real.mean(), fake.mean()]).detach(), "mean")
                        lecam.update(means[0], means[1])
                    d_optimizer.step()
                    d_optimizer.zero_grad()

        done = step + 1
        if stage.revival_interval and done % stage.revival_interval == 0 and done <= stage.revival_until * stage.max_steps:
            revival_window.counts = engine.reduce(revival_window.counts)
            losses["revived_codes"] = revive_dead_codes(model, revival_window, output, config.seed + step)
            revival_window.reset()

        if done % config.log_steps == 0 or done == stage.max_steps:
            window.counts = engine.reduce(window.counts)
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            if not all(map(torch.isfinite, map(torch.tensor, values.values()))):
                raise FloatingPointError(
                    f"a loss is not finite between steps {done - config.log_steps} and {done}: {values}. "
                    f"Lower the learning rate, or resume from {run.latest_checkpoint()} with another seed"
                )
            seconds = (time.time() - clock) / (done - clock_step)
            values |= {"grad_norm": float(grad_norm), "learning_rate": optimizer.param_groups[-1]["lr"]}
            values |= {"codebook_usage": window.usage, "codebook_perplexity": window.perplexity}
            values |= {"images_per_second": stage.global_batch_size / seconds}
            run.log(done, values)
            window.reset()
            if is_main_process():
                numbers = "  ".join(f"{name.removesuffix('_loss')} {value:.4g}" for name, value in values.items())
                left = format_duration(seconds * (stage.max_steps - done))
                print(f"stage {number}  {done}/{stage.max_steps}  {numbers}  {left} left", flush=True)
            clock, clock_step = time.time(), done

        if is_main_process() and (done % config.sample_steps == 0 or done == stage.max_steps):
            save_previews(model, previews, run.path / "samples" / f"step-{done}.png")
        if done % config.save_steps == 0 and done < stage.max_steps:
            state = {"lecam": lecam.state_dict(), "window": window.state_dict(), "revival_window": revival_window.state_dict()}
            engines = {"tokenizer": engine}
            if stage.adversarial_weight:
                engines["discriminator"] = discriminator_engine
            save_checkpoint(run, done, model, engines, state, keep=config.keep_checkpoints)

    engine.wait_for_everyone()
    if is_main_process():
        with atomic_path(run.path / "model") as temporary:
            model.save_pretrained(temporary)
    engine.wait_for_everyone()
    engine.free_memory()
    discriminator_engine.free_memory()


def original_encoder(config: TokenizerTrainConfig, model: VQRAEModel) -> PreTrainedModel:
    """The encoder as it was before stage 2 touched it: the teacher, also when stage 2 is resumed."""
    if config.model.encoder:
        return build_tokenizer(config.model, model.config._attn_implementation).encoder
    if not (Path(config.output_dir) / "stage1" / "model").is_dir():
        return model.encoder
    return VQRAEModel.from_pretrained(Path(config.output_dir) / "stage1" / "model").encoder


@torch.no_grad()
def save_previews(model: VQRAEModel, images: Tensor, path: Path) -> None:
    """Write originals above their reconstructions."""
    was_training = model.training
    model.eval()
    rows = [list(images), list(model(images).reconstruction)]
    model.train(was_training)
    save_picture(picture_grid(rows), path)


def save_checkpoint(run: RunDirectory, step: int, model: VQRAEModel, engines: dict, state: dict, *, keep: int) -> None:
    """Write `step-N/` with the model folder and, apart, the training state; whole or not at all."""
    temporary = run.path / f".step-{step}.tmp"
    if is_main_process():
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary / "model")
    for name, engine in engines.items():
        engine.wait_for_everyone()
        save_engine(engine, temporary / "train_state" / name)
    engines["tokenizer"].wait_for_everyone()
    if is_main_process():
        torch.save(state, temporary / "train_state" / "counters.pt")
        write_json(temporary / "train_state" / "state.json", {"step": step})
        temporary.rename(run.path / f"step-{step}")
        run.prune_checkpoints(keep)
    engines["tokenizer"].wait_for_everyone()


# ------------------------------------------------------------------------------------------------ both stages


def main(argv: list[str] | None = None) -> None:
    name, *overrides = argv if argv is not None else sys.argv[1:]
    config = load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", name), overrides)
    attention = attention_implementation(config.attention)
    output = Path(config.output_dir)
    stages = [1, 2] if config.stage == "both" else [config.stage]
    RunDirectory(output, config, seed=config.seed)
    for number in stages:
        folder = output / f"stage{number}"
        if (folder / "model").is_dir():
            print(f"stage {number} is finished: {folder / 'model'}")
            continue
        set_seed(config.seed)
        run = RunDirectory(folder, seed=config.seed)
        previous = output / "stage1" / "model"
        if number == 2 and not previous.is_dir():
            raise FileNotFoundError(f"stage 2 starts from {previous}, which does not exist: run stage=1 first, or stage=both")
        model = (
            build_tokenizer(config.model, attention)
            if number == 1
            else VQRAEModel.from_pretrained(previous, attn_implementation=attention)
        )
        train_stage(config, number, model, run)
    final = output / f"stage{stages[-1]}" / "model"
    if is_main_process():
        with atomic_path(output / "model") as temporary:
            shutil.copytree(final, temporary)
        print(f"tokenizer {weights_fingerprint(output / 'model')[:16]} in {output / 'model'}")


if __name__ == "__main__":
    main()
