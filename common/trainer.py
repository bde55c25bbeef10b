"""What every job on the Hugging Face `Trainer` shares: arguments, log line, checkpoints, resume."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vqrae.common.checkpoints import first_nonfinite, numbered
from vqrae.common.config import check_range
from vqrae.common.distributed import (
    STALL_SECONDS,
    StopRequest,
    fit_batch,
    is_main_process,
    prepare_cpu_deepspeed,
    require_same_partition,
    shared_path,
    sum_over_processes,
    world_size,
)
from vqrae.common.files import remove_leftovers
from vqrae.common.lean import make_lean
from vqrae.common.optim import Muon, muon_groups
from vqrae.common.run import Run, format_duration, mark_trained, prune

IGNORE_INDEX = -100  # label of tokens without loss
WATCHERS: list[TrainerCallback] = []
"""Callbacks of every job, for dry runs."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How long and how fast a `Trainer` job learns."""

    max_steps: int
    """Optimizer steps."""
    global_batch_size: int
    """Samples of one optimizer step over all processes."""
    micro_batch_size: int
    """Samples of one forward pass on one process; accumulation is computed."""
    learning_rate: float
    warmup_steps: float = 0
    """Steps, or a share of all steps when below 1."""
    lr_scheduler_type: Literal["cosine", "constant_with_warmup", "linear"] = "cosine"
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of matrices (scaled like AdamW's, so rates carry over);
    vectors, embeddings and heads stay with AdamW. ZeRO cuts matrices: there it is AdamW for all."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    bf16: bool = True
    save_steps: int = 500
    save_total_limit: int = 1
    logging_steps: int = 10
    dataloader_num_workers: int = 0
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; 0 is plain DDP."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further `TrainingArguments`, under their Hugging Face names."""

    def __post_init__(self) -> None:
        positive = ("max_steps", "global_batch_size", "micro_batch_size", "save_steps")
        check_range(self, *positive, "logging_steps", low=1)
        check_range(self, "save_total_limit", "dataloader_num_workers", "learning_rate", low=0)
        check_range(self, "warmup_steps", "weight_decay", "adam_epsilon", low=0)
        check_range(self, "adam_beta1", "adam_beta2", low=0, high=1)
        check_range(self, "max_grad_norm", low=0, high=math.inf)


def training_arguments(
    config: OptimizationConfig, output_dir: str | Path, *, seed: int
) -> TrainingArguments:
    """`TrainingArguments` for this configuration on this machine."""
    named = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for ours in ("global_batch_size", "micro_batch_size", "optimizer", "zero", "extra"):
        named.pop(ours)
    micro_batch_size, accumulation = fit_batch(
        config.global_batch_size, config.micro_batch_size, world_size()
    )
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        deepspeed=deepspeed_settings(config.zero),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        remove_unused_columns=False,  # our collators take whole samples
        disable_tqdm=True,  # `InstrumentCallback` prints lines
        logging_nan_inf_filter=False,  # a loss of NaN must be seen, not averaged away
        report_to=[],  # `Run.log` writes the events
        save_strategy="steps",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # none changes: frozen codebooks, frequencies of positions
        # Batches in pinned memory are copied while the device computes.
        accelerator_config={"non_blocking": True},
        **named,
        **config.extra,
    )
    # Else a plain process on n GPUs would use nn.DataParallel, which splits our batches.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def deepspeed_settings(zero: int) -> str | None:
    """The file with DeepSpeed's settings for a ZeRO stage; None for plain DDP."""
    if not zero:
        return None
    prepare_cpu_deepspeed()
    return str(Path(__file__).parent / "deepspeed" / f"zero{zero}.json")


def build_optimizers(
    config: OptimizationConfig, model: nn.Module
) -> tuple[torch.optim.Optimizer | None, None]:
    """`Trainer(optimizers=…)`: Muon, or (None, None), which is Trainer's AdamW."""
    if config.optimizer == "adamw":
        return None, None
    if config.zero:
        if is_main_process():
            print(f"optimizer: adamw, not muon, since zero={config.zero} cuts matrices", flush=True)
        return None, None
    groups = muon_groups(model, config.weight_decay)
    betas = (config.adam_beta1, config.adam_beta2)
    return Muon(groups, lr=config.learning_rate, nesterov=True, betas=betas), None


def diverged(problem: str) -> FloatingPointError:
    """The error of a training that cannot continue; a checkpoint would restore its rate."""
    advice = "Start again with a lower learning_rate and another output_dir"
    return FloatingPointError(f"{problem}. {advice}")


class InstrumentCallback(TrainerCallback):
    """One line per logging step, with the remaining time; its numbers go to the run directory."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.rewind(state.global_step)
        self._clock, self._first_step = time.time(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        if not math.isfinite(logs["loss"]):
            first = step - args.logging_steps
            raise diverged(
                f"{self.name}: the loss is {logs['loss']} between steps {first} and {step}"
            )
        seconds = max(time.time() - self._clock, 1e-9) / max(step - self._first_step, 1)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        parts = sorted(name for name in logs if name.endswith("_loss"))
        names = ("loss", *parts, "grad_norm", "learning_rate")
        values = {name: float(logs[name]) for name in names if name in logs}
        self.run.log(step, {**values, "samples_per_second": batch / seconds})
        if is_main_process():
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            left = format_duration(seconds * (state.max_steps - step))
            speed = f"{batch / seconds:.1f} samples/s"
            print(
                f"{self.name} {step}/{state.max_steps}  {numbers}  {speed}  {left} left", flush=True
            )


class WholeTrainer(Trainer):
    """`Trainer` whose checkpoints are whole or absent, and never of a model that has diverged."""

    _staging: Path | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.args.device.type == "cpu":
            make_lean(self.model)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers:
            getattr(loader, "base_dataloader", loader).timeout = STALL_SECONDS
        return loader

    def _run_epoch(self, **options: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**options)
        else:  # resumed from the checkpoint of the last step: Trainer would take one more
            self.control.should_training_stop = True

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite_weights()
        output_dir = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with shared_path(output_dir / name) as self._staging:  # each process writes its part
            try:
                super()._save_checkpoint(model, trial)
            finally:
                staging, self._staging = self._staging, None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for file in (staging / name).iterdir():
                    file.rename(staging / file.name)
                (staging / name).rmdir()
        if self.args.should_save and self.args.save_total_limit:
            prune(checkpoints(output_dir), self.args.save_total_limit)

    def require_finite_weights(self) -> None:
        """Refuse, with FloatingPointError, to keep a model that has diverged; all processes take
        part.
        """
        found = first_nonfinite(self.model) is not None
        if sum_over_processes(torch.tensor(int(found), device=self.args.device)) > 0:
            raise diverged(f"the weights are not finite at step {self.state.global_step}")


class StopCallback(TrainerCallback):
    """Ends the training, with a checkpoint, after the step in which a signal asked for it."""

    def __init__(self, request: StopRequest) -> None:
        self.request, self.stopped = request, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.request.agreed() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


def check_launch(config: OptimizationConfig, output_dir: Path) -> None:
    """Refuse, before anything is built, what this number of processes cannot train or resume.

    Raises ValueError when the batch cannot be shared by the processes, or when DeepSpeed cut the
    newest checkpoint for another number of processes.
    """
    fit_batch(config.global_batch_size, config.micro_batch_size, world_size())
    for newest in checkpoints(output_dir)[-1:]:
        if parts := list(newest.glob("global_step*/*zero_pp_rank_*_optim_states.pt")):
            require_same_partition(newest, {"processes": len(parts)}, zero=config.zero)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a `Trainer` in a folder, oldest first."""
    return numbered(folder, PREFIX_CHECKPOINT_DIR)


def run_trainer(trainer: Trainer) -> None:
    """Train, continuing from the newest checkpoint in the output directory.

    Raises SystemExit with 130 or 143, after Ctrl-C or SIGTERM and a checkpoint; FloatingPointError
    when the training has diverged.
    """
    trainer.remove_callback(PrinterCallback)  # the instrument callback prints the line
    # Checks of transformers for which the host would wait in every forward pass; our collators
    # count image tokens.
    os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    output_dir = Path(str(trainer.args.output_dir))
    if is_main_process() and output_dir.is_dir():
        remove_leftovers(output_dir, exclusive=True)
    newest = next(reversed(checkpoints(output_dir)), None)
    with StopRequest(trainer.args.device) as request:
        callback = StopCallback(request)
        for each in (callback, *WATCHERS):
            trainer.add_callback(each)
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if callback.stopped:
        request.end_process(trainer.state.global_step)


def save_model(
    trainer: WholeTrainer, folder: Path, complete: Callable[[Path], object] | None = None
) -> None:
    """Write the trained model and the trainer's processor to `folder`, whole or not at all.

    Every process calls this: under ZeRO-3 the weights are gathered from all. `complete` writes what
    else belongs to the model, before the folder gets its name.
    """
    trainer.require_finite_weights()
    trainer.model.config.use_cache = True  # Trainer turned it off
    with shared_path(folder) as temporary:
        trainer.save_model(str(temporary))
        if trainer.is_world_process_zero():
            if complete is not None:
                complete(temporary)
            (temporary / "training_args.bin").unlink()  # a pickle is not part of a model
            mark_trained(temporary, trainer.state.global_step)


def free_engine(trainer: Trainer) -> None:
    """Take DeepSpeed off a trained model: its hooks on gradients would keep the model alive."""
    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
        # Else the next from_pretrained would partition its weights by these settings.
        unset_hf_deepspeed_config()
    trainer.accelerator.free_memory()
