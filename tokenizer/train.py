"""Train the tokenizer in two stages (VQRAE section 3.3): quantizer and decoder on a frozen encoder,
then everything together, with the encoder held to its frozen original by distillation. Or in one
(UniTok), with captions that say what the codes must hold.

    python -m vqrae.tokenizer.train tiny output_dir=runs/tokenizer model.encoder=runs/encoder
    torchrun --standalone --nproc_per_node 2 -m vqrae.tokenizer.train unitok_tiny zero=2 ...
    python -m vqrae.tokenizer.train siglip2_256 stage=2 dry_run=1 micro_batch_size=2

The same command continues where it stopped. Everything random is a function of seed and step, so a
resumed run equals an uninterrupted one.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.trainer_utils import set_seed

from vqrae.common.cli import parse
from vqrae.common.distributed import (
    StopRequest,
    attention_implementation,
    fit_batch,
    is_main_process,
    world_size,
)
from vqrae.common.dry_run import print_reports
from vqrae.common.errors import run_main
from vqrae.common.files import atomic_path, weights_fingerprint
from vqrae.common.run import Run
from vqrae.common.run import open as open_run
from vqrae.tokenizer.augment import seen
from vqrae.tokenizer.build import check_quantizer, initial_model
from vqrae.tokenizer.codebook import (
    CodeUsage,
    code_space,
    initialize_codebook,
    measure_in_pixels,
    reinitialize_unused_codes,
    require_images_for_codebook,
    sample_size,
    standardize_features,
)
from vqrae.tokenizer.config import StageConfig, TokenizerTrainConfig
from vqrae.tokenizer.contrastive import contrastive_loss
from vqrae.tokenizer.data import StageImages, resize
from vqrae.tokenizer.discriminator import frozen
from vqrae.tokenizer.dry_run import dry_run, rehearse_checkpoints
from vqrae.tokenizer.encoders import final_norm
from vqrae.tokenizer.engine import (
    allow_tf32,
    build_accelerators,
    build_optimizer,
    clip_gradients,
    compile_blocks,
    prepare,
    refresh_master_weights,
    share_from_main,
)
from vqrae.tokenizer.losses import (
    AlignmentHeads,
    LeCam,
    adaptive_weight,
    build_loss_networks,
    consistency_loss,
    discriminator_hinge_loss,
    generator_hinge_loss,
    keep_original_encoder,
    teacher_losses,
)
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.progress import print_start, print_step, save_previews
from vqrae.tokenizer.train_state import (
    LossWindow,
    SkippedSteps,
    TrainState,
    WeightAverage,
    require_resumable,
    require_same_length,
)


def main(argv: list[str] | None = None) -> None:
    config = parse(TokenizerTrainConfig, argv, package="vqrae.tokenizer")
    check_quantizer(config)
    if config.dry_run:
        print_reports(dry_run(config, train_stage))
        rehearse_checkpoints(config, train_stage)
        return
    attention = attention_implementation(config.attention, half=config.bf16)
    output = Path(config.output_dir)
    # The settings of a stage may change until it begins.
    names = [f"stage{number}" for number in config.all_stages]
    not_begun = {name for name in names if not (output / name).is_dir()}
    run_of_both = open_run(output, config, seed=config.seed, ignore=not_begun)
    require_same_length(config, output)
    for number in config.stages:  # refused now rather than after stage 1
        stage = config.stage_config(number)
        fit_batch(stage.global_batch_size, stage.micro_batch_size, world_size())
    if not all((output / f"stage{number}" / "model").is_dir() for number in config.stages):
        run_of_both.begin()
    for number in config.stages:
        folder = output / f"stage{number}"
        if (folder / "model").is_dir():
            print(f"stage {number} is finished: {folder / 'model'}")
            continue
        set_seed(config.seed)
        model = initial_model(config, number, attention)
        run = open_run(folder, seed=config.seed, report_to=config.report_to)
        run.begin()
        for _ in train_stage(config, number, model, run):
            pass
    if is_main_process():
        last = output / f"stage{config.stages[-1]}"
        for folder in last.glob("model*"):  # and its moving average
            with atomic_path(output / folder.name) as temporary:
                shutil.copytree(folder, temporary)
        print(f"tokenizer {weights_fingerprint(output / 'model')[:16]} in {output / 'model'}")


def train_stage(
    config: TokenizerTrainConfig, number: int, model: VQRAEModel, run: Run
) -> Generator[int, None, None]:
    """Train a tokenizer through stage 1 or 2, from the newest checkpoint on, into `run`.

    Args:
        model: as it enters the stage (see `initial_model`); trained in place.

    Yields:
        The number of steps done, once before the first and then after each, so that a dry run, a
        benchmark or a test can measure and watch them.

    Raises:
        SystemExit: with 130 or 143, after Ctrl-C or SIGTERM and a checkpoint.
        FloatingPointError: after too many steps without a finite gradient.
    """
    stage = config.stage_config(number)
    micro_batch_size, accumulation = fit_batch(
        stage.global_batch_size, stage.micro_batch_size, world_size()
    )
    stage = dataclasses.replace(stage, micro_batch_size=micro_batch_size)
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        require_resumable(checkpoint, zero=config.zero)
    allow_tf32(config.tf32)
    engine, d_engine = build_accelerators(
        stage, zero=config.zero, accumulation=accumulation, bf16=config.bf16
    )
    device = engine.device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.bf16)

    # ------------------------------------------------------------------------------------- networks

    image_size, output_size = model.config.image_size, model.config.output_size
    model.to(device)
    model.encoder.requires_grad_(not stage.freeze_encoder)
    if model.config.feature_tap == "hidden_states[-1]":
        final_norm(model.encoder).requires_grad_(False)  # follows the tap: it gets no gradient
    text_side = nn.ModuleList()
    if model.config.text_config is not None:
        text_side = model.text_side().requires_grad_(stage.contrastive_weight > 0)
    model.quantizer.compute_entropy = stage.entropy_weight > 0
    if config.activation_checkpointing:
        model.activation_checkpointing_enable()

    # The teacher of both stages is the encoder as it was before any of them (section 3.3).
    original = run.path.with_name("stage1") / "original_encoder.safetensors"
    if number == 1 and checkpoint is None:
        tuned = not stage.freeze_encoder and (config.stage2 is not None or stage.needs_teacher)
        keep_original_encoder(model.encoder, original, tuned=tuned)
        engine.wait_for_everyone()
    teacher, perceptual, discriminator = build_loss_networks(config, stage, model, original, device)
    alignment = AlignmentHeads(stage.alignment_layers, model.config.feature_dim).to(device)
    lecam = LeCam().to(device)
    multiple = 1 if discriminator is None else discriminator.multiple
    see = partial(seen, augment=stage.discriminator_augment, multiple=multiple)

    # ----------------------------------------------------------------------------------------- data

    images = StageImages(
        config.data,
        stage,
        model.text_tokenizer if stage.contrastive_weight else None,
        size=max(image_size, output_size),
        seed=config.seed,
        number=number,
        rank=engine.process_index,
        world_size=engine.num_processes,
        device=device,
    )
    previews = images.previews()

    def sample_images() -> Tensor:
        """Training images from all over the data, for statistics and the start of the codebook."""
        return resize(images.sample(sample_size(model.config)), image_size)

    from_data = number == 1 and checkpoint is None
    from_features = config.model.codebook_init != "random"
    if stage.bypass_steps or (from_data and from_features):
        require_images_for_codebook(model.config, len(images.training))  # now, not after the bypass
    if from_data:
        with autocast():
            if model.config.feature_norm == "standardize":
                standardize_features(model, sample_images())
            if from_features:
                initialize_codebook(model, sample_images(), start=config.model.codebook_init)
        share_from_main(model)

    # Only the main process writes models, so it alone keeps an average.
    keeps_average = config.ema_decay > 0 and engine.is_main_process
    ema = WeightAverage(model, config.ema_decay) if keeps_average else None
    if config.compile:
        compile_blocks(model)

    # ----------------------------------------------------------------------------------- optimizers

    decoder = nn.ModuleList([model.in_proj, model.out_proj, model.decoder, alignment])
    modules = {
        "encoder": (model.encoder, stage.encoder_lr),
        "quantizer": (model.quantizer, stage.quantizer_lr or stage.decoder_lr),
        "text": (text_side, stage.text_lr or stage.decoder_lr),
        "decoder": (decoder, stage.decoder_lr),
    }
    # ZeRO cuts matrices into pieces, which Muon could not orthogonalise.
    optimizer = build_optimizer(modules, stage, "adamw" if config.zero else stage.optimizer)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    wrapped, optimizer = prepare(engine, "tokenizer", model, optimizer, alignment)
    d_wrapped: Any = None
    d_optimizer: Any = None
    engines = {"tokenizer": engine}
    if discriminator is not None:
        d_modules = {"discriminator": (discriminator, stage.discriminator_lr)}
        d_wrapped, d_optimizer = prepare(
            d_engine,
            "discriminator",
            discriminator,
            build_optimizer(d_modules, stage.discriminator_optimization),
        )
        engines["discriminator"] = d_engine

    # --------------------------------------------------------------------------------------- resume

    window = LossWindow()
    sizes = (model.config.codebook_size, model.config.num_codebooks)
    usage, usage_since_revival = CodeUsage(*sizes, device), CodeUsage(*sizes, device)
    skipped, d_skipped = SkippedSteps().to(device), SkippedSteps().to(device)
    skips = (skipped, d_skipped)
    state = TrainState(
        model=model,
        ema=ema,
        engines=engines,
        counters={"lecam": lecam, "skipped": skipped, "d_skipped": d_skipped},
        windows={"losses": window, "usage": usage, "revival_usage": usage_since_revival},
    )
    start = state.load(checkpoint) if checkpoint else 0
    rolled_back_to: Path | None = None
    run.rewind(start)
    if engine.is_main_process:
        world = engine.num_processes
        print_start(number, stage, model, start=start, accumulation=accumulation, world=world)

    # ---------------------------------------------------------------------------------------- steps

    batches = images.micro_batches(start)
    grad_norm = torch.zeros((), device=device)
    max_norm = stage.max_grad_norm
    set_mode(wrapped, model, stage)
    yield start
    clock, clock_step = time.time(), start
    with StopRequest(device) as request:
        for step in range(start, stage.max_steps):
            if request.agreed():
                engine.wait_for_everyone()
                is_kept = (run.path / f"step-{step}").is_dir()
                if step and not is_kept and newest_step_taken(skips):
                    state.save(run, step, zero=config.zero, keep=config.keep_checkpoints)
                request.end_process(step)
            done = step + 1
            last = done == stage.max_steps
            bypass = step < stage.bypass_steps
            # During the bypass the quantizer's losses stay in the graph, because DDP expects a
            # gradient for every parameter.
            quantization_weight = 0.0 if bypass else 1.0
            adversarial_weight = stage.adversarial_weight_at(step)  # 0 before its start
            adversarial, blur = adversarial_weight > 0, stage.blur_at(step)

            # ---- rates: the discriminator's schedule counts its own steps
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * stage.rate_factor(step)
            for group in d_optimizer.param_groups if adversarial else ():
                group["lr"] = stage.discriminator_lr * stage.discriminator_rate_factor(step)

            # ---- end of the bypass: the codebook starts from the continuous autoencoder's features
            if step and step == stage.bypass_steps:
                samples = sample_images()
                with autocast():
                    if stage.codebook_metric == "pixels":
                        measure_in_pixels(model, samples[:256])
                    initialize_codebook(model, samples)
                share_from_main(model)
                refresh_master_weights(optimizer)
                del samples  # more than 1 GiB at full size

            logit_means = []
            for _ in range(accumulation):
                batch = next(batches)
                inputs, targets = (resize(batch.images, n) for n in (image_size, output_size))
                targets = targets[: stage.reconstruction_batch]
                random = batch.random[: stage.reconstruction_batch]

                # ---- tokenizer
                with engine.accumulate(wrapped):
                    with autocast():
                        output = wrapped(inputs, bypass=bypass, decoded=stage.reconstruction_batch)
                        losses = {
                            "reconstruction_loss": F.mse_loss(output.reconstruction, targets),
                            **output.losses,  # Eq. 3, by the quantizer
                        }
                        if stage.distillation_weight or stage.alignment_weight:
                            losses |= teacher_losses(
                                stage, model, teacher, alignment, inputs, output
                            )
                        if stage.l1_weight:
                            losses["l1_loss"] = F.l1_loss(output.reconstruction, targets)
                        if stage.contrastive_weight:
                            losses["contrastive_loss"] = contrastive_loss(
                                model, output.quantized_features, batch.tokens, batch.captioned
                            )
                        if perceptual is not None:
                            losses["perceptual_loss"] = perceptual(output.reconstruction, targets)
                        if adversarial:
                            # The bare module: its engine must not see this backward pass.
                            with frozen(discriminator):
                                fakes = see(output.reconstruction, random[:, 0], blur)
                                fake_logits = discriminator(fakes)
                            losses["adversarial_loss"] = generator_hinge_loss(fake_logits)

                    image_loss = (
                        stage.reconstruction_weight * losses["reconstruction_loss"]
                        + stage.l1_weight * losses.get("l1_loss", 0.0)
                        + stage.perceptual_weight * losses.get("perceptual_loss", 0.0)
                    )
                    if adversarial and stage.adaptive_weight:
                        losses["adversarial_factor"] = adaptive_weight(
                            image_loss,
                            losses["adversarial_loss"],
                            model.decoder.head.weight,
                            stage.adaptive_weight,
                        )
                    loss = (  # VQRAE Eq. 2 to 5, UniTok Eq. 1 and 2
                        image_loss
                        + quantization_weight
                        * (
                            stage.codebook_weight * losses.get("codebook_loss", 0.0)
                            + stage.commitment_weight * losses.get("commitment_loss", 0.0)
                            + stage.index_weight * losses.get("index_loss", 0.0)
                            + stage.entropy_weight * losses.get("entropy_loss", 0.0)
                        )
                        + stage.distillation_weight * losses.get("distillation_loss", 0.0)
                        + stage.alignment_weight * losses.get("alignment_loss", 0.0)
                        + stage.contrastive_weight * losses.get("contrastive_loss", 0.0)
                        + adversarial_weight
                        * losses.get("adversarial_factor", 1.0)
                        * losses.get("adversarial_loss", 0.0)
                    )
                    # Outside of autocast, whose bf16 copies of all weights are freed by now.
                    engine.backward(loss)
                    if engine.sync_gradients:
                        grad_norm = clip_gradients(engine, optimizer, wrapped, max_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                usage.update(output.codes)
                usage_since_revival.update(output.codes)

                # ---- discriminator: images against their reconstructions, in fp32
                if adversarial:
                    with d_engine.accumulate(d_wrapped):
                        fakes = output.reconstruction.detach()
                        views = [see(targets, random[:, 1], blur), see(fakes, random[:, 2], blur)]
                        if stage.consistency_weight:
                            again = see(targets, random[:, 3], 0.0), see(fakes, random[:, 4], 0.0)
                            views += again
                        logits = d_wrapped(torch.cat(views)).float().split(len(targets))
                        real_logits, fake_logits = logits[:2]
                        d_loss = discriminator_hinge_loss(real_logits, fake_logits)
                        losses["discriminator_loss"] = d_loss
                        d_loss = stage.discriminator_weight * d_loss + stage.lecam_weight * lecam(
                            real_logits, fake_logits
                        )
                        if stage.consistency_weight:
                            losses["consistency_loss"] = consistency_loss(*logits)
                            d_loss += stage.consistency_weight * losses["consistency_loss"]
                        d_engine.backward(d_loss)
                        means = torch.stack([real_logits.mean(), fake_logits.mean()])
                        logit_means.append(means.detach())
                        if d_engine.sync_gradients:
                            d_norm = clip_gradients(d_engine, d_optimizer, discriminator, max_norm)
                            d_skipped.update(d_norm)
                            means = d_engine.reduce(torch.stack(logit_means).mean(0), "mean")
                            lecam.update(means, taken=d_norm.isfinite())
                        d_optimizer.step()
                        d_optimizer.zero_grad()
                window.update(losses, weight=len(inputs))

            # ---- what follows the optimizer's step
            skipped.update(grad_norm)
            model.quantizer.after_step(grad_norm.isfinite())
            if stage.contrastive_weight:
                model.logit_scale.data.clamp_(0, math.log(100))
                refresh_master_weights(optimizer)
            if ema is not None and not bypass:
                ema.update(model)
            if stage.is_revival(done) and newest_step_taken([skipped]):
                moved = reinitialize_unused_codes(
                    model, output, usage_since_revival, engine, seed=done
                )
                window.update({"revived_codes": torch.tensor(moved, device=device)})
                refresh_master_weights(optimizer)

            # ---- log the means since the last time; here the host waits for the device
            stuck = False
            if done % config.log_steps == 0 or last:
                window.gather(engine)
                usage.gather(engine)
                seconds = (time.time() - clock) / (done - clock_step)
                clock, clock_step = time.time(), done
                row = window.means() | {
                    "grad_norm": float(grad_norm),
                    "learning_rate": optimizer.param_groups[-1]["lr"],
                    **(usage.summary() | code_space(model, output.fused)),
                    "images_per_second": stage.global_batch_size / seconds,
                }
                if stage.contrastive_weight:
                    row["logit_scale"] = model.logit_scale.exp().item()
                if skipped.total > 0:
                    row["skipped_steps"] = skipped.total.item()
                if d_skipped.total > 0:
                    row["discriminator_skipped_steps"] = d_skipped.total.item()
                window.reset()
                run.log(done, row)
                run.log_histograms(done, usage.shares())
                usage.clear()
                if engine.is_main_process:
                    print_step(number, stage, done, row, seconds)
                stuck = bool(in_a_row(skips) >= min(config.max_nonfinite_steps, stage.max_steps))

            # ---- go back or save, before the previews: no work is lost if they fail
            if stuck:
                is_tokenizer = skipped.in_a_row >= d_skipped.in_a_row
                network = "tokenizer" if is_tokenizer else "discriminator"
                failure = (
                    f"stage {number}: the last {int(in_a_row(skips))} steps up to {done} had no "
                    f"finite gradient of the {network}"
                )
                rolled_back_to = state.roll_back(run, failure, rolled_back_to, last=last)
            elif last:
                state.finish(run, stage.max_steps)
            elif done % config.save_steps == 0 and newest_step_taken(skips):
                state.save(run, done, zero=config.zero, keep=config.keep_checkpoints)
            if engine.is_main_process and (done % config.sample_steps == 0 or last):
                file = run.path / "samples" / f"step-{done}.png"
                grid = save_previews(model, previews, file, bf16=config.bf16)
                run.log_images(done, {"reconstructions": grid})
                set_mode(wrapped, model, stage)
            yield done

    if start >= stage.max_steps:  # an ablation may start stage 2 from an untrained stage 1
        state.finish(run, stage.max_steps)
    engine.wait_for_everyone()
    for prepared in engines.values():
        prepared.free_memory()


def set_mode(wrapped: nn.Module, model: VQRAEModel, stage: StageConfig) -> None:
    """Everything trains; a frozen encoder evaluates."""
    wrapped.train()
    if stage.freeze_encoder:
        model.encoder.eval()


def in_a_row(skips: Sequence[SkippedSteps]) -> Tensor:
    """Newest steps that one of the networks skipped in a row."""
    return torch.stack([counter.in_a_row for counter in skips]).max()


def newest_step_taken(skips: Sequence[SkippedSteps]) -> bool:
    """Whether no network skipped the newest step. The host waits for the device."""
    return not bool(in_a_row(skips) > 0)


if __name__ == "__main__":
    run_main(main)
