"""One stage of a tokenizer training: networks, engines, the flat loop, checkpoints.

Everything random is a function of seed and step, so a resumed run equals an uninterrupted one.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqrae.common.checkpoints import require_finite
from vqrae.common.distributed import StopRequest, fit_batch, is_main_process, world_size
from vqrae.common.files import atomic_path
from vqrae.common.images import image_grid, save_image
from vqrae.common.memory import count_parameters
from vqrae.common.optim import warmup_cosine
from vqrae.common.run import RunDirectory, format_duration, mark_trained
from vqrae.tokenizer.codebook import (
    CodeUsage,
    initialize_codebook,
    measure_in_pixels,
    reinitialize_unused_codes,
    require_images_for_codebook,
    sample_size,
    standardize_features,
)
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.data import StageImages, resize
from vqrae.tokenizer.discriminator import frozen
from vqrae.tokenizer.ema import WeightAverage
from vqrae.tokenizer.encoders import encoder_features
from vqrae.tokenizer.engine import (
    allow_tf32,
    build_accelerators,
    build_optimizer,
    compile_blocks,
    prepare,
    refresh_master_weights,
    set_trainable,
    share_from_main,
)
from vqrae.tokenizer.guard import SkippedSteps, clip_gradients
from vqrae.tokenizer.loss_networks import build_judges
from vqrae.tokenizer.losses import (
    LeCam,
    discriminator_hinge_loss,
    distillation_loss,
    generator_hinge_loss,
    reconstruction_loss,
)
from vqrae.tokenizer.meters import LossWindow
from vqrae.tokenizer.modeling import VQRAEModel, VQRAEOutput
from vqrae.tokenizer.teacher import keep_original
from vqrae.tokenizer.train_state import TrainState, require_resumable


class StageTrainer:
    """Trains a tokenizer through one stage; the result lies in `run.path / "model"`.

    Args:
        number: 1 or 2.
        model: the tokenizer as it enters the stage; stage 1 keeps the encoder, so its encoder is still the original one.
    """

    def __init__(
        self, config: TokenizerTrainConfig, number: int, model: VQRAEModel, run: RunDirectory
    ) -> None:
        self.config, self.number, self.model, self.run = config, number, model, run
        self.checkpoint = run.latest_checkpoint()
        if self.checkpoint is not None:
            require_resumable(self.checkpoint / "train_state", zero=config.zero)
        self.stage = stage = config.stage_config(number)
        micro_batch_size, self.accumulation = fit_batch(
            stage.global_batch_size, stage.micro_batch_size, world_size()
        )
        self.stage = stage = dataclasses.replace(stage, micro_batch_size=micro_batch_size)
        allow_tf32(config.tf32)
        self.engine, self.d_engine = build_accelerators(
            stage, zero=config.zero, accumulation=self.accumulation, bf16=config.bf16
        )
        self.device = self.engine.device
        model.to(self.device)
        set_trainable(model, stage)
        model.quantizer.compute_entropy = stage.entropy_weight > 0
        if config.activation_checkpointing:
            model.activation_checkpointing_enable()

        self.rolled_back_to: Path | None = None
        self.image_size, self.output_size = model.config.image_size, model.config.output_size
        self._build_judges()
        self.images = StageImages(
            config.data,
            stage,
            size=max(self.image_size, self.output_size),
            seed=config.seed,
            number=number,
            rank=self.engine.process_index,
            world_size=self.engine.num_processes,
            device=self.device,
        )
        self.previews = self.images.previews()
        from_data = number == 1 and self.checkpoint is None
        if stage.bypass_steps or (from_data and config.model.codebook_init == "features"):
            require_images_for_codebook(
                model.config, len(self.images.dataset)
            )  # here, not behind the bypass
        if from_data:
            self._start_from_data()
        # The average is the main process's: it alone writes models.
        self.ema = (
            WeightAverage(model, config.ema_decay)
            if config.ema_decay and is_main_process()
            else None
        )
        if config.compile:
            compile_blocks(model)
        self._build_optimizers()
        self.skipped, self.d_skipped = (
            SkippedSteps().to(self.device),
            SkippedSteps().to(self.device),
        )
        self.losses = LossWindow()
        self.usage, self.revival_usage = (
            CodeUsage(model.config.codebook_size, self.device) for _ in range(2)
        )

    def _build_judges(self) -> None:
        original = self.run.path.with_name("stage1") / "original_encoder.safetensors"
        if self.number == 1 and self.checkpoint is None:
            keep_original(self.model.encoder, original, tuned=not self.stage.freeze_encoder)
            self.engine.wait_for_everyone()
        judges = build_judges(self.config, self.stage, self.model, original, self.device)
        self.teacher, self.perceptual = judges.teacher, judges.perceptual
        self.discriminator: Any = judges.discriminator
        self.lecam = LeCam().to(self.device)

    def _start_from_data(self) -> None:
        """Statistics of the features, and the codebook, before the first step."""
        with self.autocast():
            if self.model.config.feature_norm == "standardize":
                standardize_features(self.model, self.sample_images())
            if self.config.model.codebook_init == "features":
                initialize_codebook(self.model, self.sample_images())
        share_from_main(self.model)

    def _build_optimizers(self) -> None:
        """Both networks that train, each with its optimizer under its engine."""
        stage, model = self.stage, self.model
        modules = {
            "encoder": (model.encoder, stage.encoder_lr),
            "quantizer": (model.quantizer, stage.quantizer_lr or stage.decoder_lr),
            "decoder": (
                nn.ModuleList([model.in_proj, model.out_proj, model.decoder]),
                stage.decoder_lr,
            ),
        }
        optimizer = build_optimizer(
            modules, stage, "adamw" if self.config.zero else stage.optimizer
        )
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.wrapped, self.optimizer = prepare(self.engine, "tokenizer", model, optimizer)
        if stage.adversarial_weight:
            optimizer = build_optimizer(
                {"discriminator": (self.discriminator, stage.discriminator_lr)}, stage
            )
            self.d_wrapped, self.d_optimizer = prepare(
                self.d_engine, "discriminator", self.discriminator, optimizer
            )

    # ------------------------------------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run the stage to its end, from the newest checkpoint on, and save the model.

        Raises:
            SystemExit: with 130 or 143, after Ctrl-C or SIGTERM and a checkpoint.
        """
        with StopRequest(self.device) as request:
            self.loop(request)
        self.engine.wait_for_everyone()
        self.engine.free_memory()
        self.d_engine.free_memory()

    def loop(self, request: StopRequest) -> None:
        """All steps from the newest checkpoint on."""
        config, stage = self.config, self.stage
        start = self.restore(self.checkpoint) if self.checkpoint else 0
        self.run.rewind(start)
        self.announce(start)
        batches = self.images.micro_batches(start)
        self.set_mode()
        clock, clock_step = time.time(), start
        for step in range(start, stage.max_steps):
            if request.agreed():
                self.stop(step, request)
            done, last = step + 1, step + 1 == stage.max_steps
            self.train_step(step, batches)
            if done % config.log_steps == 0 or last:
                self.log(done, seconds=(time.time() - clock) / (done - clock_step))
                clock, clock_step = time.time(), done
                if self.skipped_in_a_row() >= min(config.max_nonfinite_steps, stage.max_steps):
                    self.roll_back(done)
                    continue
            # Saved first: a mishap of the previews then costs no work.
            if last:
                self.finish()
            elif done % config.save_steps == 0 and self.skipped_in_a_row() == 0:
                self.save(done)
            if is_main_process() and (done % config.sample_steps == 0 or last):
                self.save_previews(done)
        if (
            start >= stage.max_steps
        ):  # nothing is to be trained: a row of an ablation starts from an untrained stage 1
            self.finish()

    def stop(self, step: int, request: StopRequest) -> None:
        """Keep a checkpoint of `step` steps, unless the last ones were worth nothing, and end the process."""
        is_kept = (self.run.path / f"step-{step}").is_dir()
        self.engine.wait_for_everyone()
        if step and not is_kept and self.skipped_in_a_row() == 0:
            self.save(step)
        request.end_process(step)

    def finish(self) -> None:
        """Write the model of the finished stage."""
        require_finite(self.model, f"stage {self.number}")
        if is_main_process():
            for name, model in self.models().items():
                with atomic_path(self.run.path / name) as temporary:
                    model.save_pretrained(temporary)
                    mark_trained(temporary, self.stage.max_steps)
        self.engine.wait_for_everyone()

    def train_step(self, step: int, batches: Iterator[Tensor]) -> None:
        """One step of both optimizers: `accumulation` micro-batches. The host waits only for Muon and a bf16 search."""
        done = step + 1
        self.set_learning_rates(step)
        if step and step == self.stage.bypass_steps:
            images = self.sample_images()
            with self.autocast():
                if self.stage.codebook_metric == "pixels":
                    measure_in_pixels(self.model, images[:256])
                initialize_codebook(self.model, images)
            share_from_main(self.model)
            refresh_master_weights(self.optimizer)
        for _ in range(self.accumulation):
            images = next(batches)
            inputs, targets = resize(images, self.image_size), resize(images, self.output_size)
            output, losses = self.tokenizer_step(inputs, targets, step)
            self.usage.update(output.codes)
            self.revival_usage.update(output.codes)
            if self.stage.is_adversarial(step):
                losses["discriminator_loss"] = self.discriminator_step(
                    targets, output.reconstruction.detach()
                )
            self.losses.update(losses, weight=len(images))
        self.model.quantizer.after_step(self.grad_norm.isfinite())
        self.skipped.update(self.grad_norm)
        if self.ema is not None and step >= self.stage.bypass_steps:
            self.ema.update(self.model)
        if self.stage.is_revival(done) and self.skipped.in_a_row == 0:
            revived = reinitialize_unused_codes(
                self.model, output, self.revival_usage, self.engine, seed=done
            )
            self.losses.update({"revived_codes": torch.tensor(revived, device=self.device)})
            refresh_master_weights(self.optimizer)

    def tokenizer_step(
        self, inputs: Tensor, targets: Tensor, step: int
    ) -> tuple[VQRAEOutput, dict[str, Tensor]]:
        """One micro-batch through tokenizer and losses; the last of a step moves the weights.

        Args:
            inputs: (B, 3, H, W) what the encoder sees.
            targets: (B, 3, H', W') the same images as they should be reconstructed.
        """
        stage, bypass = self.stage, step < self.stage.bypass_steps
        with self.engine.accumulate(self.wrapped):
            with self.autocast():
                output = self.wrapped(inputs, bypass=bypass)
                losses = {
                    "reconstruction_loss": reconstruction_loss(output.reconstruction, targets),
                    **output.losses,
                }
                if stage.distillation_weight:
                    assert self.teacher is not None
                    with torch.no_grad():
                        target = encoder_features(
                            self.teacher,
                            self.model.normalize(inputs),
                            self.model.config.feature_tap,
                        )
                    losses["distillation_loss"] = distillation_loss(output.features, target)
                if self.perceptual is not None:
                    losses["perceptual_loss"] = self.perceptual(output.reconstruction, targets)
                if self.stage.is_adversarial(step):
                    with frozen(
                        self.discriminator
                    ):  # the bare module: its engine must not see this backward
                        losses["adversarial_loss"] = generator_hinge_loss(
                            self.discriminator(output.reconstruction)
                        )
            weights = {name: getattr(stage, name.replace("_loss", "_weight")) for name in losses}
            if "adversarial_loss" in losses:
                weights["adversarial_loss"] *= self.stage.adversarial_ramp(step)
            if bypass:
                weights |= dict.fromkeys(output.losses, 0.0)
            # Outside of autocast, whose bf16 copies of all weights are gone by now.
            self.engine.backward(sum(weights[name] * loss for name, loss in losses.items()))
            if self.engine.sync_gradients:
                self.grad_norm = clip_gradients(
                    self.engine, self.optimizer, self.model.parameters(), stage.max_grad_norm
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
        return output, losses

    def discriminator_step(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """One micro-batch of real images and their reconstructions through the discriminator; returns its loss."""
        engine, stage = self.d_engine, self.stage
        with engine.accumulate(self.d_wrapped):  # outside of autocast: it judges in fp32
            real, fake = self.d_wrapped(torch.cat([images, reconstruction])).float().chunk(2)
            loss = discriminator_hinge_loss(real, fake)
            engine.backward(loss + stage.lecam_weight * self.lecam(real, fake))
            self.lecam.observe(real, fake)
            if engine.sync_gradients:
                norm = clip_gradients(
                    engine, self.d_optimizer, self.discriminator.parameters(), stage.max_grad_norm
                )
                self.d_skipped.update(norm)
                means: Any = engine.reduce(self.lecam.take_means(), "mean")
                means = torch.where(
                    norm.isfinite(),
                    means,
                    torch.stack([self.lecam.real_mean, self.lecam.fake_mean]),
                )
                self.lecam.update(*means)
            self.d_optimizer.step()
            self.d_optimizer.zero_grad()
        return loss

    # ------------------------------------------------------------------------------------------- its parts

    def set_mode(self) -> None:
        """Everything trains; a frozen encoder evaluates."""
        self.wrapped.train()
        if self.stage.freeze_encoder:
            self.model.encoder.eval()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def set_learning_rates(self, step: int) -> None:
        """Warm-up and cosine on every group; the discriminator's schedule counts its own steps."""
        stage, end = self.stage, self.stage.end_lr / self.stage.decoder_lr
        factor = warmup_cosine(
            step, warmup_steps=stage.warmup_steps, total_steps=stage.max_steps, end=end
        )
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        if self.stage.is_adversarial(step):
            begun, total = (
                step - stage.discriminator_start,
                stage.max_steps - stage.discriminator_start,
            )
            factor = warmup_cosine(
                begun, warmup_steps=stage.warmup_steps, total_steps=total, end=end
            )
            for group in self.d_optimizer.param_groups:
                group["lr"] = stage.discriminator_lr * factor

    def sample_images(self) -> Tensor:
        """Images from all over the data, enough for 32 features per code: what statistics and codebook start from."""
        return resize(self.images.some(sample_size(self.model.config)), self.image_size)

    def skipped_in_a_row(self) -> int:
        """Steps that one of the two networks last left out in a row. The host waits for the device."""
        return int(torch.maximum(self.skipped.in_a_row, self.d_skipped.in_a_row))

    # ------------------------------------------------------------------------------------------- what is seen and kept

    def announce(self, start: int) -> None:
        if not is_main_process():
            return
        if start:
            print(f"stage {self.number}: continuing from step {start}", flush=True)
        (total, trainable), stage = count_parameters(self.model), self.stage
        print(
            f"stage {self.number}: {total / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trainable, "
            f"batch {stage.global_batch_size} = {stage.micro_batch_size} x {self.accumulation} accumulated "
            f"x {self.engine.num_processes} processes",
            flush=True,
        )

    def log(self, done: int, *, seconds: float) -> None:
        """One line and one row of metrics: means since the last. Here the host waits for the device."""
        for window in (self.losses, self.usage):
            window.gather(self.engine)
        values = self.losses.means()
        values |= {
            "grad_norm": float(self.grad_norm),
            "learning_rate": self.optimizer.param_groups[-1]["lr"],
        }
        values |= {"codebook_usage": self.usage.usage, "codebook_perplexity": self.usage.perplexity}
        values |= {"images_per_second": self.stage.global_batch_size / seconds}
        skipped = {
            "skipped_steps": self.skipped.total,
            "discriminator_skipped_steps": self.d_skipped.total,
        }
        values |= {name: total.item() for name, total in skipped.items() if total}
        self.losses.reset()
        self.usage.clear()
        self.run.log(done, values)
        if is_main_process():
            numbers = "  ".join(
                f"{name.removesuffix('_loss')} {value:.4g}" for name, value in values.items()
            )
            left = format_duration(seconds * (self.stage.max_steps - done))
            print(
                f"stage {self.number}  {done}/{self.stage.max_steps}  {numbers}  {left} left",
                flush=True,
            )

    def save_previews(self, done: int) -> None:
        """Write originals above their reconstructions."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            reconstructions = self.model(resize(self.previews, self.image_size)).reconstruction
        rows = [list(resize(self.previews, self.output_size)), list(reconstructions)]
        self.set_mode()
        save_image(image_grid(rows), self.run.path / "samples" / f"step-{done}.png")

    def models(self) -> dict[str, VQRAEModel]:
        """What the main process saves, by folder name; `model` comes last, for a stage that has it is finished."""
        return ({"model_ema": self.ema.model} if self.ema is not None else {}) | {
            "model": self.model
        }

    def train_state(self) -> TrainState:
        engines = {"tokenizer": self.engine} | (
            {"discriminator": self.d_engine} if self.stage.adversarial_weight else {}
        )
        return TrainState(
            engines=engines,
            zero=self.config.zero,
            shared={"lecam": self.lecam, "skipped": self.skipped, "d_skipped": self.d_skipped},
            windows={
                "losses": self.losses,
                "usage": self.usage,
                "revival_usage": self.revival_usage,
            },
        )

    def save(self, step: int) -> None:
        """Write `step-N/` with the model folders and, apart, the training state; whole or not at all."""
        require_finite(self.model, f"stage {self.number}, step {step}")
        temporary = self.run.path / f".step-{step}.tmp"
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
            for name, model in self.models().items():
                model.save_pretrained(temporary / name)
        self.engine.wait_for_everyone()
        self.train_state().save(temporary / "train_state", step)
        self.engine.wait_for_everyone()
        if is_main_process():
            temporary.rename(self.run.path / f"step-{step}")
            self.run.prune_checkpoints(self.config.keep_checkpoints)
        self.engine.wait_for_everyone()

    def restore(self, checkpoint: Path) -> int:
        """Load a checkpoint and return its step."""
        step = self.train_state().load(checkpoint / "train_state")
        if self.ema is not None and (checkpoint / "model_ema").is_dir():  # else it begins anew
            self.ema.load(checkpoint / "model_ema")
        return step

    def roll_back(self, done: int) -> None:
        """Weights and optimizers return to the newest checkpoint. Time goes on: what led here is not seen again.

        Raises:
            FloatingPointError: when there is no checkpoint, none since the last time, or no step left.
        """
        newest = self.run.latest_checkpoint()
        network = (
            "tokenizer" if self.skipped.in_a_row >= self.d_skipped.in_a_row else "discriminator"
        )
        if newest is None or newest == self.rolled_back_to or done == self.stage.max_steps:
            outcome = (
                "the stage ends here"
                if newest != self.rolled_back_to
                else f"going back to {newest} did not help"
            )
            raise FloatingPointError(
                f"the last {self.skipped_in_a_row()} steps up to {done} of stage {self.number} had no finite gradient of the "
                f"{network}, and {'there is no checkpoint' if newest is None else outcome}: look at metrics.jsonl "
                "for the loss that grew, and train again with lower learning rates in another output_dir"
            )
        if is_main_process():
            print(
                f"stage {self.number}: {network} without finite gradients at step {done}, going on from {newest}",
                flush=True,
            )
        totals = [counts.total.clone() for counts in (self.skipped, self.d_skipped)]
        self.restore(newest)
        for counts, total in zip((self.skipped, self.d_skipped), totals, strict=True):
            counts.total.copy_(total)
        self.rolled_back_to = newest
