"""What a training counts and averages next to its weights, and the checkpoint of all of it.

Nothing here makes the host wait for the device before something is logged or saved.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vqrae.common.checkpoints import require_finite
from vqrae.common.distributed import (
    is_main_process,
    require_same_partition,
    shared_path,
    world_size,
)
from vqrae.common.files import atomic_path, read_json, write_json
from vqrae.common.run import Run, mark_trained, trained_steps
from vqrae.tokenizer.codebook import CodeUsage
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.tokenizer.modeling import VQRAEModel

STATE_FILE = "state.json"
COUNTERS_FILE = "counters.pt"


class LossWindow:
    """Means of named scalars since the last `reset`, over all images of all processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> (sum, count) of the finite values

    @torch.no_grad()
    def update(self, values: dict[str, Tensor], *, weight: int = 1) -> None:
        """Add one value of each name, the mean over `weight` images."""
        for name, value in values.items():
            finite = value.isfinite()
            pair = torch.stack([torch.where(finite, value.float(), 0.0), finite.float()]) * weight
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def gather(self, engine: Accelerator) -> None:
        """Replace the sums by those of all processes, which must hold the same names."""
        if self.sums:
            names = sorted(self.sums)
            totals = engine.reduce(torch.stack([self.sums[name] for name in names]))
            self.sums = dict(zip(names, totals, strict=True))

    def means(self) -> dict[str, float]:
        """Mean by name; NaN where no value was finite."""
        return {name: (total / count).item() for name, (total, count) in self.sums.items()}

    def reset(self) -> None:
        """Start a new window."""
        self.sums = {}

    def clear(self) -> None:
        """Set all sums to zero but keep their names, which `gather` needs on every process."""
        self.sums = {name: torch.zeros_like(pair) for name, pair in self.sums.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums = dict(state)


class SkippedSteps(nn.Module):
    """Steps without a finite gradient: all of the stage, and those since the last finite one."""

    total: Tensor
    in_a_row: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))
        self.register_buffer("in_a_row", torch.zeros((), dtype=torch.int64))

    def update(self, grad_norm: Tensor) -> None:
        """Count one step by its gradient norm."""
        skipped = ~grad_norm.isfinite()
        self.total += skipped
        self.in_a_row.add_(1).mul_(skipped)


class WeightAverage:
    """Exponential moving average of a model's weights, without the host sync of `AveragedModel`.

    The configuration of the averaged model holds the number of updates, so that it is complete.

    Args:
        decay: final one; it grows as (1 + t) / (10 + t), so that the start is soon forgotten.
    """

    def __init__(self, model: VQRAEModel, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = self.model.config.ema_decay = decay
        self.model.config.ema_updates = 0

    @torch.no_grad()
    def update(self, model: VQRAEModel) -> None:
        """Move the average towards the weights; buffers are copied. The first update is a copy."""
        updates = self.model.config.ema_updates
        average = get_ema_multi_avg_fn(min(self.decay, updates / (9 + updates)))
        average(list(self.model.parameters()), list(model.parameters()), updates)
        for mine, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(buffer)
        self.model.config.ema_updates += 1

    def load(self, folder: Path) -> None:
        """Continue a saved average, with this run's decay."""
        saved = VQRAEModel.from_pretrained(folder)
        self.model.load_state_dict(saved.state_dict())
        self.model.config.ema_updates = saved.config.ema_updates


def require_same_length(config: TokenizerTrainConfig, output: Path) -> None:
    """Refuse to prolong a finished stage: its rates are at their end, and stage 2 starts from it.

    Raises:
        ValueError: naming the steps that it was trained for.
    """
    for number in config.all_stages:
        folder = output / f"stage{number}" / "model"
        trained, asked = trained_steps(folder), config.stage_config(number).max_steps
        if 0 < trained < asked:
            raise ValueError(
                f"{folder} is finished after {trained} steps, got stage{number}.max_steps={asked}: "
                f"set stage{number}.max_steps={trained}, or another output_dir"
            )


def require_resumable(checkpoint: Path, *, zero: int) -> None:
    """Refuse a checkpoint whose ZeRO parts are for other processes; ValueError says what to set."""
    folder = checkpoint / "train_state"
    require_same_partition(folder, read_json(folder / STATE_FILE), zero=zero)


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a stage moves, saved and loaded in place.

    Attributes:
        ema: of the main process, which alone writes models.
        engines: by name; each saves its network, its optimizer and the random number generators.
        counters: equal on all processes.
        windows: counted by each process for itself. Their sums are saved, so that any number of
            processes may continue.
    """

    model: VQRAEModel
    ema: WeightAverage | None
    engines: dict[str, Accelerator]
    counters: dict[str, nn.Module]
    windows: dict[str, LossWindow | CodeUsage]

    def finish(self, run: Run, steps: int) -> None:
        """Write the model folders of a finished stage."""
        require_finite(self.model, str(run.path))
        if is_main_process():
            for name, model in self._models().items():
                with atomic_path(run.path / name) as temporary:
                    model.save_pretrained(temporary)
                    mark_trained(temporary, steps)
        self._wait()

    def save(self, run: Run, step: int, *, zero: int, keep: int) -> None:
        """Write `step-N/`, whole or not at all: model folders and, apart, what a resume needs.

        Args:
            keep: newest checkpoints to leave.
        """
        require_finite(self.model, f"{run.path}, step {step}")
        with shared_path(run.path / f"step-{step}") as temporary:
            folder = temporary / "train_state"
            if is_main_process():
                for name, model in self._models().items():
                    model.save_pretrained(temporary / name)
            for name, engine in self.engines.items():
                self._wait()
                engine.save_state(str(folder / name))
            self._wait()
            for window in self.windows.values():
                window.gather(engine)
            if is_main_process():
                parts = {name: part.state_dict() for name, part in self._counted().items()}
                torch.save(parts, folder / COUNTERS_FILE)
                state = {"step": step, "zero": zero, "processes": world_size()}
                write_json(folder / STATE_FILE, state)
        if is_main_process():
            run.prune_checkpoints(keep)
        self._leave_windows_to_main()
        self._wait()

    def load(self, checkpoint: Path) -> int:
        """Read what `save` wrote and return its step."""
        folder = checkpoint / "train_state"
        for name, engine in self.engines.items():
            engine.load_state(str(folder / name))
            # Micro-batches since the last step; the saved number may be of another accumulation.
            engine.step = 0
        # Without a place, every process would load onto the main one's GPU. On CPU accelerate
        # numbers devices, which torch.load does not know.
        device = engine.device if engine.device.type != "cpu" else torch.device("cpu")
        parts = torch.load(folder / COUNTERS_FILE, weights_only=True, map_location=device)
        for name, part in self._counted().items():
            part.load_state_dict(parts[name])
        self._leave_windows_to_main()
        if self.ema is not None and (checkpoint / "model_ema").is_dir():  # else it starts here
            self.ema.load(checkpoint / "model_ema")
        return read_json(folder / STATE_FILE)["step"]

    def roll_back(self, run: Run, failure: str, tried: Path | None, *, last: bool) -> Path:
        """Return weights and optimizers to the newest checkpoint, and give it.

        Time goes on: the images that led to the failure are not seen again.

        Args:
            tried: the checkpoint of the previous time.
            last: whether no step follows.

        Raises:
            FloatingPointError: when there is no checkpoint, or no use in going back to it.
        """
        newest = run.latest_checkpoint()
        if newest is None or newest == tried or last:
            outcome = "the stage ends here"
            if newest is None:
                outcome = "there is no checkpoint"
            elif newest == tried:
                outcome = f"going back to {newest} did not help"
            raise FloatingPointError(
                f"{failure}, and {outcome}: look at metrics.jsonl for the loss that grew, and "
                "train again with lower learning rates in another output_dir"
            )
        if is_main_process():
            print(f"{failure}: going on from {newest}", flush=True)
        counters = [c for c in self.counters.values() if isinstance(c, SkippedSteps)]
        totals = [counter.total.clone() for counter in counters]
        self.load(newest)
        for counter, total in zip(counters, totals, strict=True):
            counter.total.copy_(total)
        return newest

    def _models(self) -> dict[str, VQRAEModel]:
        # `model` comes last: a stage that has it is finished.
        average = {} if self.ema is None else {"model_ema": self.ema.model}
        return average | {"model": self.model}

    def _counted(self) -> dict[str, nn.Module | LossWindow | CodeUsage]:
        return {**self.counters, **self.windows}

    def _leave_windows_to_main(self) -> None:
        if not is_main_process():
            for window in self.windows.values():
                window.clear()

    def _wait(self) -> None:
        self.engines["tokenizer"].wait_for_everyone()
