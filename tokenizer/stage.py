"""One stage of a tokenizer training: networks, engines, the flat loop, checkpoints.

Everything random is a function of seed and step, so a resumed run equals an uninterrupted one.
"""

import copy
import shutil
import time
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vqrae.common.distributed import gradient_accumulation, is_main_process, world_size
from vqrae.common.files import atomic_path, read_json, write_json
from vqrae.common.pictures import picture_grid, save_picture
from vqrae.common.run import RunDirectory, format_duration
from vqrae.common.schedule import warmup_cosine
from vqrae.data.sources import open_images
from vqrae.data.stream import StreamSampler
from vqrae.tokenizer.discriminator import PatchDiscriminator
from vqrae.tokenizer.engine import build_accelerators, parameter_groups, prepare
from vqrae.tokenizer.losses import (
    LeCam,
    discriminator_hinge_loss,
    distillation_loss,
    generator_hinge_loss,
    reconstruction_loss,
)
from vqrae.tokenizer.modeling import VQRAEModel, VQRAEOutput, encoder_features
from vqrae.tokenizer.perceptual import build_perceptual
from vqrae.tokenizer.quantizers import CodebookQuantizer, draw_by_error
from vqrae.tokenizer.train_config import StageConfig, TokenizerTrainConfig
from vqrae.tokenizer.usage import CodeUsage


class StageTrainer:
    """Trains a tokenizer through one stage; the result lies in `run.path / "model"`.

    Args:
        number: 1 or 2.
        model: the tokenizer as it enters the stage; stage 1 keeps the encoder, so its encoder is still the original one.
    """

    def __init__(self, config: TokenizerTrainConfig, number: int, model: VQRAEModel, run: RunDirectory) -> None:
        self.config, self.number, self.model, self.run = config, number, model, run
        self.stage: StageConfig = config.stage1 if number == 1 else config.stage2
        stage = self.stage
        self.accumulation = gradient_accumulation(stage.global_batch_size, stage.micro_batch_size, world_size())
        self.engine, self.d_engine = build_accelerators(
            stage, zero=config.zero, accumulation=self.accumulation, bf16=config.bf16
        )
        self.device = self.engine.device
        model.to(self.device)
        set_trainable(model, stage)
        check_quantizer(config, number, model)
        model.quantizer.compute_entropy(stage.entropy_weight > 0)

        # ---- networks that only judge
        self.teacher = copy.deepcopy(model.encoder).eval().requires_grad_(False)
        self.perceptual: nn.Module | None = None
        if stage.perceptual_weight:
            self.perceptual = build_perceptual(stage.perceptual_network, self.teacher, model.normalize)
        self.discriminator = PatchDiscriminator(stage.discriminator_channels).to(self.device)
        self.lecam = LeCam().to(self.device)

        # ---- data
        size = model.config.image_size
        self.dataset: Any = open_images(config.data.train, image_size=size, split="train")
        validation: Any = open_images(config.data.validation or config.data.train, image_size=size, split="validation")
        self.previews = stack_images(validation, 12).to(self.device)
        self.sampler = StreamSampler(
            len(self.dataset),
            seed=config.seed + number,
            rank=self.engine.process_index,
            world_size=self.engine.num_processes,
        )

        # ---- the start of statistics and codebook
        self.checkpoint = run.latest_checkpoint()
        if number == 1 and self.checkpoint is None:
            sample = self.sample_images()
            if model.config.feature_norm == "standardize":
                model.standardize_features(sample)
            if config.model.codebook_init == "features":
                model.initialize_codebook(sample)

        # ---- optimizers
        modules = {
            "encoder": (model.encoder, stage.encoder_lr),
            "quantizer": (model.quantizer, stage.quantizer_lr or stage.decoder_lr),
            "decoder": (nn.ModuleList([model.in_proj, model.out_proj, model.decoder]), stage.decoder_lr),
        }
        groups = parameter_groups(modules, stage.weight_decay)
        self.base_rates = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=stage.adam_betas, fused=True)
        self.wrapped, self.optimizer = prepare(self.engine, "tokenizer", model, optimizer)
        if stage.adversarial_weight:
            groups = parameter_groups({"discriminator": (self.discriminator, stage.discriminator_lr)}, stage.weight_decay)
            optimizer = torch.optim.AdamW(groups, betas=stage.adam_betas, fused=True)
            self.d_wrapped, self.d_optimizer = prepare(self.d_engine, "discriminator", self.discriminator, optimizer)

        # ---- counters
        self.window, self.revival_window = (CodeUsage(model.config.codebook_size, self.device) for _ in range(2))

    # ------------------------------------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run the stage to its end, from the newest checkpoint on, and save the model."""
        config, stage = self.config, self.stage
        start = self.restore() if self.checkpoint else 0
        self.run.rewind(start)
        self.sampler.start = start * stage.global_batch_size
        batches = iter(
            DataLoader(self.dataset, stage.micro_batch_size, sampler=self.sampler, num_workers=config.data.num_workers)
        )
        self.announce()
        self.wrapped.train()
        if stage.freeze_encoder:
            self.model.encoder.eval()

        clock, clock_step = time.time(), start
        for step in range(start, stage.max_steps):
            done, last = step + 1, step + 1 == stage.max_steps
            self.set_learning_rates(step)
            if step and step == stage.bypass_steps:
                self.model.initialize_codebook(self.sample_images())
            for micro in range(self.accumulation):
                images = self.augment(next(batches)["image"], step, micro)
                output, losses = self.tokenizer_step(images, step)
                self.window.update(output.codes)
                self.revival_window.update(output.codes)
                if self.is_adversarial(step):
                    losses["discriminator_loss"] = self.discriminator_step(images, output.reconstruction.detach())
            if self.is_revival(done):
                losses["revived_codes"] = self.revive_dead_codes(output, done)

            if done % config.log_steps == 0 or last:
                self.log(done, losses, seconds=(time.time() - clock) / (done - clock_step))
                clock, clock_step = time.time(), done
            if is_main_process() and (done % config.sample_steps == 0 or last):
                self.save_previews(done)
            if done % config.save_steps == 0 and not last:
                self.save(done)

        self.engine.wait_for_everyone()
        if is_main_process():
            with atomic_path(self.run.path / "model") as temporary:
                self.model.save_pretrained(temporary)
        self.engine.wait_for_everyone()
        self.engine.free_memory()
        self.d_engine.free_memory()

    def tokenizer_step(self, images: Tensor, step: int) -> tuple[VQRAEOutput, dict[str, Tensor]]:
        """One micro-batch (B, 3, H, W) through tokenizer and losses; the last of a step moves the weights."""
        stage, bypass = self.stage, step < self.stage.bypass_steps
        with self.engine.accumulate(self.wrapped), self.autocast():
            output = self.wrapped(images, bypass=bypass)
            losses = {"reconstruction_loss": reconstruction_loss(output.reconstruction, images), **output.losses}
            if stage.distillation_weight:
                with torch.no_grad():
                    target = encoder_features(self.teacher, self.model.normalize(images), self.model.config.feature_tap)
                losses["distillation_loss"] = distillation_loss(output.features, target)
            if self.perceptual is not None:
                losses["perceptual_loss"] = self.perceptual(output.reconstruction, images)
            if self.is_adversarial(step):
                self.discriminator.requires_grad_(False)  # the bare module: its engine must not see this backward
                losses["adversarial_loss"] = generator_hinge_loss(self.discriminator(output.reconstruction))
                self.discriminator.requires_grad_(True)
            weights = {name: getattr(stage, name.replace("_loss", "_weight")) for name in losses}
            if "adversarial_loss" in losses:
                ramp = (step - stage.discriminator_start + 1) / max(1, stage.discriminator_ramp)
                weights["adversarial_loss"] *= min(1.0, ramp)
            if bypass:
                weights |= dict.fromkeys(output.losses, 0.0)
            self.engine.backward(sum(weights[name] * loss for name, loss in losses.items()))
            if self.engine.sync_gradients:
                self.grad_norm = self.engine.clip_grad_norm_(self.model.parameters(), stage.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.engine.sync_gradients:
                self.model.quantizer.after_step()
        return output, losses

    def discriminator_step(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """One micro-batch of real pictures and their reconstructions through the discriminator; returns its loss."""
        engine, stage = self.d_engine, self.stage
        with engine.accumulate(self.d_wrapped), self.autocast():
            real, fake = self.d_wrapped(torch.cat([images, reconstruction])).float().chunk(2)
            loss = discriminator_hinge_loss(real, fake)
            engine.backward(loss + stage.lecam_weight * self.lecam(real, fake))
            if engine.sync_gradients:
                engine.clip_grad_norm_(self.discriminator.parameters(), stage.max_grad_norm)
                means: Any = engine.reduce(torch.stack([real.mean(), fake.mean()]).detach(), "mean")
                self.lecam.update(means[0], means[1])
            self.d_optimizer.step()
            self.d_optimizer.zero_grad()
        return loss

    # ------------------------------------------------------------------------------------------- its parts

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def is_adversarial(self, step: int) -> bool:
        return self.stage.adversarial_weight > 0 and step >= self.stage.discriminator_start

    def is_revival(self, done: int) -> bool:
        stage = self.stage
        within = stage.bypass_steps < done <= stage.revival_until * stage.max_steps
        return within and stage.revival_interval > 0 and done % stage.revival_interval == 0

    def set_learning_rates(self, step: int) -> None:
        """Warm-up and cosine on every group; the discriminator's schedule counts its own steps."""
        stage, end = self.stage, self.stage.end_lr / self.stage.decoder_lr
        factor = warmup_cosine(step, warmup_steps=stage.warmup_steps, total_steps=stage.max_steps, end=end)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        if self.is_adversarial(step):
            begun, total = step - stage.discriminator_start, stage.max_steps - stage.discriminator_start
            factor = warmup_cosine(begun, warmup_steps=stage.warmup_steps, total_steps=total, end=end)
            for group in self.d_optimizer.param_groups:
                group["lr"] = stage.discriminator_lr * factor

    def augment(self, batch: Tensor, step: int, micro: int) -> Tensor:
        """uint8 (B, 3, H, W) -> images in [0, 1], half of them mirrored."""
        images = batch.to(self.device, non_blocking=True).float() / 255
        if not self.config.data.random_flip:
            return images
        seed = hash((self.config.seed, self.number, step, micro, self.engine.process_index))
        flips = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 0.5
        return torch.where(flips.to(self.device)[:, None, None, None], images.flip(-1), images)

    def sample_images(self) -> Tensor:
        """The first pictures of the data, enough for 32 features per code: what statistics and codebook start from."""
        config = self.model.config
        count = max(256, -(-32 * config.codebook_size // config.grid_size**2))
        return stack_images(self.dataset, count).to(self.device)

    @torch.no_grad()
    def revive_dead_codes(self, output: VQRAEOutput, seed: int) -> Tensor:
        """Move every code that the window did not see onto a badly served feature; the same on all processes.

        Returns:
            How many were moved, a scalar tensor.
        """
        quantizer: Any = self.model.quantizer
        self.revival_window.counts = self.engine.reduce(self.revival_window.counts)
        dead = (self.revival_window.counts == 0).nonzero().flatten()
        self.revival_window.reset()
        if len(dead) > 0:
            features = self.model.project(output.features).flatten(0, 1)
            errors = (quantizer.to_code_space(features) - quantizer.lookup(output.codes).flatten(0, 1)).square().sum(-1)
            chosen = draw_by_error(errors, len(dead), torch.Generator(errors.device).manual_seed(seed))
            quantizer.revive(dead, broadcast(features[chosen]))
        return torch.tensor(len(dead))

    # ------------------------------------------------------------------------------------------- what is seen and kept

    def announce(self) -> None:
        if not is_main_process():
            return
        counts = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        total, trainable = sum(n for n, _ in counts), sum(n for n, trained in counts if trained)
        stage = self.stage
        print(
            f"stage {self.number}: {total / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trainable, "
            f"batch {stage.global_batch_size} = {stage.micro_batch_size} x {self.accumulation} accumulated "
            f"x {self.engine.num_processes} processes",
            flush=True,
        )

    def log(self, done: int, losses: dict[str, Tensor], *, seconds: float) -> None:
        """One line and one row of metrics. The only place where the host waits for the device.

        Raises:
            FloatingPointError: when a loss is not finite.
        """
        self.window.counts = self.engine.reduce(self.window.counts)
        values = {name: loss.detach().float().item() for name, loss in losses.items()}
        if not torch.tensor(list(values.values())).isfinite().all():
            raise FloatingPointError(
                f"a loss is not finite between steps {done - self.config.log_steps} and {done}: {values}. "
                f"Lower the learning rate; the newest checkpoint is {self.run.latest_checkpoint()}"
            )
        values |= {"grad_norm": float(self.grad_norm), "learning_rate": self.optimizer.param_groups[-1]["lr"]}
        values |= {"codebook_usage": self.window.usage, "codebook_perplexity": self.window.perplexity}
        values |= {"images_per_second": self.stage.global_batch_size / seconds}
        self.window.reset()
        self.run.log(done, values)
        if is_main_process():
            numbers = "  ".join(f"{name.removesuffix('_loss')} {value:.4g}" for name, value in values.items())
            left = format_duration(seconds * (self.stage.max_steps - done))
            print(f"stage {self.number}  {done}/{self.stage.max_steps}  {numbers}  {left} left", flush=True)

    @torch.no_grad()
    def save_previews(self, done: int) -> None:
        """Write originals above their reconstructions."""
        was_training = self.model.training
        self.model.eval()
        rows = [list(self.previews), list(self.model(self.previews).reconstruction)]
        self.model.train(was_training)
        if self.stage.freeze_encoder:
            self.model.encoder.eval()
        save_picture(picture_grid(rows), self.run.path / "samples" / f"step-{done}.png")

    def engines(self) -> dict[str, Any]:
        return {"tokenizer": self.engine} | ({"discriminator": self.d_engine} if self.stage.adversarial_weight else {})

    def counters(self) -> dict[str, Any]:
        return {"lecam": self.lecam, "window": self.window, "revival_window": self.revival_window}

    def save(self, step: int) -> None:
        """Write `step-N/` with the model folder and, apart, the training state; whole or not at all."""
        temporary = self.run.path / f".step-{step}.tmp"
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
            self.model.save_pretrained(temporary / "model")
        for name, engine in self.engines().items():
            engine.wait_for_everyone()
            engine.save_state(str(temporary / "train_state" / name))
        self.engine.wait_for_everyone()
        if is_main_process():
            state = {name: counter.state_dict() for name, counter in self.counters().items()}
            torch.save(state, temporary / "train_state" / "counters.pt")
            write_json(temporary / "train_state" / "state.json", {"step": step})
            temporary.rename(self.run.path / f"step-{step}")
            self.run.prune_checkpoints(self.config.keep_checkpoints)
        self.engine.wait_for_everyone()

    def restore(self) -> int:
        """Load the newest checkpoint and return its step."""
        assert self.checkpoint is not None
        folder = self.checkpoint / "train_state"
        for name, engine in self.engines().items():
            engine.load_state(str(folder / name))
        state = torch.load(folder / "counters.pt", weights_only=True)
        for name, counter in self.counters().items():
            counter.load_state_dict(state[name])
        step = read_json(folder / "state.json")["step"]
        print(f"stage {self.number}: continuing from step {step}")
        return step


def set_trainable(model: VQRAEModel, stage: StageConfig) -> None:
    """Stage 1 freezes the encoder; what lies behind the feature tap never gets a gradient and is frozen too."""
    model.encoder.requires_grad_(not stage.freeze_encoder)
    if model.config.feature_tap == "hidden_states[-1]" and hasattr(model.encoder, "post_layernorm"):
        model.encoder.post_layernorm.requires_grad_(False)


def check_quantizer(config: TokenizerTrainConfig, number: int, model: VQRAEModel) -> None:
    """Refuse what a quantizer without a codebook cannot do, before anything is trained.

    Raises:
        ValueError: naming every setting that must change.
    """
    if isinstance(model.quantizer, CodebookQuantizer):
        return
    stages = {"stage1": config.stage1, "stage2": config.stage2}
    if config.stage != "both":
        stages = {f"stage{number}": stages[f"stage{number}"]}
    keys = ("revival_interval", "bypass_steps")
    wrong = [f"{name}.{key}=0" for name, stage in stages.items() for key in keys if getattr(stage, key)]
    if number == 1 and config.model.codebook_init != "random":
        wrong.append("model.codebook_init=random")
    if wrong:
        raise ValueError(f"quantizer {config.model.quantizer} has no codebook to start or revive: set {' '.join(wrong)}")


def stack_images(dataset: Dataset, count: int) -> Tensor:
    """The first `count` pictures of a data set as images (count, 3, H, W) in [0, 1]."""
    samples = [dataset[i]["image"] for i in range(min(count, len(dataset)))]  # type: ignore[arg-type]
    return torch.stack(samples).float() / 255
