"""What every job on the Hugging Face `Trainer` shares: arguments, engine, log line, resume."""

import dataclasses
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from vqrae.common.distributed import fit_batch, is_main_process, prepare_cpu_deepspeed, world_size
from vqrae.common.files import atomic_path, read_json
from vqrae.common.optimizers import Muon, muon_groups
from vqrae.common.run import RunDirectory, format_duration, mark_trained

IGNORE_INDEX = -100  # labels that carry no loss


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
    """`muon` orthogonalises the updates of matrices (scaled like AdamW's, so rates carry over); vectors, embeddings and
    heads stay with AdamW. ZeRO cuts matrices into pieces: there it is AdamW for all."""
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


def training_arguments(config: OptimizationConfig, output_dir: str | Path, *, seed: int) -> TrainingArguments:
    """`TrainingArguments` for this configuration on this machine."""
    deepspeed = None
    if config.zero:
        prepare_cpu_deepspeed()
        deepspeed = str(resources.files("vqrae.scripts") / "deepspeed" / f"zero{config.zero}.json")
    named = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for ours in ("global_batch_size", "micro_batch_size", "optimizer", "zero", "extra"):
        named.pop(ours)
    micro_batch_size, accumulation = fit_batch(config.global_batch_size, config.micro_batch_size, world_size())
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        deepspeed=deepspeed,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        report_to=[],
        save_strategy="steps",
        ddp_find_unused_parameters=False,
        **named,
        **config.extra,
    )
    # A plain process on a machine with n GPUs would else become nn.DataParallel, which cuts our batches apart.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def build_optimizers(config: OptimizationConfig, model: nn.Module) -> tuple[torch.optim.Optimizer | None, None]:
    """`Trainer(optimizers=…)`: Muon for the trainable matrices of a model, or (None, None), which is Trainer's AdamW."""
    if config.optimizer == "adamw":
        return None, None
    if config.zero:
        if is_main_process():
            print(f"optimizer: adamw instead of muon, for zero={config.zero} cuts matrices into pieces", flush=True)
        return None, None
    betas = (config.adam_beta1, config.adam_beta2)
    muon = Muon(muon_groups(model, config.weight_decay), lr=config.learning_rate, nesterov=True, betas=betas)
    return muon, None


class InstrumentCallback(TrainerCallback):
    """One line per logging step with progress and time left; the same numbers in the run directory."""

    def __init__(self, run: RunDirectory, name: str) -> None:
        self.run, self.name = run, name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.rewind(state.global_step)
        self._clock, self._first_step = time.time(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"{self.name}: the loss is {logs['loss']} between steps {state.global_step - args.logging_steps} and "
                f"{state.global_step}. Lower the learning rate; the newest checkpoint in {args.output_dir} is from before"
            )
        done = state.global_step - self._first_step
        seconds = (time.time() - self._clock) / max(done, 1)
        samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size / max(seconds, 1e-9)
        left = format_duration(seconds * (state.max_steps - state.global_step))
        values: dict[str, float] = {key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate") if key in logs}
        self.run.log(state.global_step, {**values, "samples_per_second": samples})
        if is_main_process():
            numbers = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
            print(
                f"{self.name} {state.global_step}/{state.max_steps}  {numbers}  {samples:.1f} samples/s  {left} left",
                flush=True,
            )


class WholeTrainer(Trainer):
    """`Trainer` whose checkpoints are whole or absent, whenever it is killed."""

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = output_dir / ".saving.tmp"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staging, self._staging = self._staging, None
        self.accelerator.wait_for_everyone()  # each process writes its part
        if self.args.should_save:
            shutil.rmtree(output_dir / name, ignore_errors=True)
            (staging / name).rename(output_dir / name)
            staging.rmdir()
            rotate_checkpoints(str(output_dir), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a `Trainer` in a folder, oldest first."""
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [path for path in found if _is_whole(path)]


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint holds the file that is written last; one that another trainer was killed over does not."""
    try:
        return "global_step" in read_json(checkpoint / "trainer_state.json")
    except (FileNotFoundError, ValueError):
        return False


def run_trainer(trainer: Trainer) -> None:
    """Train, continuing from the newest whole checkpoint in the output directory; what is not whole there is removed."""
    trainer.remove_callback(PrinterCallback)  # the instrument callback prints the line
    output_dir = Path(str(trainer.args.output_dir))
    found = checkpoints(output_dir)
    trainer.accelerator.wait_for_everyone()
    if is_main_process():
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path not in found:
                shutil.rmtree(path)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)


def save_model(trainer: Trainer, folder: Path, text_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write the trained model, with the trainer's processor or `text_tokenizer`, to `folder`, whole or not at all.

    Every process calls this: under ZeRO-3 the weights are gathered from all.
    """
    trainer.model.config.use_cache = True  # Trainer turned it off
    staging = folder.with_name(f".{folder.name}.tmp")
    if trainer.is_world_process_zero():
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed here
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staging))
    if trainer.is_world_process_zero():
        if text_tokenizer is not None:
            text_tokenizer.save_pretrained(staging)
        (staging / "training_args.bin").unlink()  # a pickle has no place in a model folder
        mark_trained(staging, trainer.state.global_step)
        with atomic_path(folder) as whole:
            os.replace(staging, whole)
    trainer.accelerator.wait_for_everyone()
