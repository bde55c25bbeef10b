"""`Trainer` for LLaVA: resume that works, small checkpoints of the projector, grouped sampling, a rate for the projector."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import LlavaForConditionalGeneration
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vqrae.common.trainer import WholeTrainer
from vqrae.data.stream import GroupedSampler, OwnOrderSampler
from vqrae.understanding.projector import PROJECTOR, PROJECTOR_FILE, load_projector, save_projector


class LlavaTrainer(WholeTrainer):
    """`Trainer` that knows LLaVA's parts.

    Args:
        projector_only: checkpoints hold the projector alone, as LLaVA's `mm_projector.bin`, beside all that a resume needs; the
            other weights are those that the stage started from. (DeepSpeed keeps a whole copy of its own in each checkpoint.)
        grouped: sample by modality and length, as LLaVA does.
        projector_learning_rate: of the projector, where it is not that of the rest.
    """

    def __init__(
        self,
        *args: Any,
        projector_only: bool = False,
        grouped: bool = False,
        projector_learning_rate: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.projector_only, self.grouped = projector_only, grouped
        self.projector_learning_rate = projector_learning_rate

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = train_dataset or self.train_dataset
        if not self.grouped:
            orders_itself = getattr(dataset, "training_index", None)
            return (
                OwnOrderSampler(dataset)
                if orders_itself
                else super()._get_train_sampler(train_dataset)
            )
        return GroupedSampler(
            dataset.modality_lengths(),
            micro_batch_size=self.args.train_batch_size,
            micro_batches=self.args.gradient_accumulation_steps * self.args.world_size,
            seed=self.args.seed,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any
    ) -> Any:
        if torch.is_tensor(count := options.get("num_items_in_batch")):
            options["num_items_in_batch"] = count.clamp(
                min=1
            )  # a step whose records were all left out has loss 0, not 0/0
        return super().compute_loss(model, inputs, *args, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.projector_learning_rate is not None:
            projector = {
                id(p) for name, p in (model or self.model).named_parameters() if PROJECTOR in name
            }
            split_group(optimizer, projector, self.projector_learning_rate)
        return optimizer

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not (self.projector_only and folder.name.startswith(PREFIX_CHECKPOINT_DIR)):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            weights = state_dict or self.model.state_dict()
            projector = {
                name.partition(PROJECTOR)[2]: value
                for name, value in weights.items()
                if PROJECTOR in name
            }
            save_projector(projector, folder / PROJECTOR_FILE)
            self.model.config.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load the weights of a checkpoint, strictly (not under DeepSpeed, which keeps its own).

        LLaVA's weights have other names on disk than in memory. transformers 5.23 loads the file by the names in memory,
        not strictly: it finds none, warns and trains on from the initial weights. So whole models go through `from_pretrained`.
        """
        model = model or self.model
        projector = Path(resume_from_checkpoint) / PROJECTOR_FILE
        if not isinstance(model, LlavaForConditionalGeneration):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # an adapter
        elif projector.is_file():
            load_projector(model.model.multi_modal_projector, projector)
        else:
            saved = LlavaForConditionalGeneration.from_pretrained(
                resume_from_checkpoint, dtype=torch.float32
            )
            model.load_state_dict(saved.state_dict())


def split_group(optimizer: torch.optim.Optimizer, chosen: set[int], learning_rate: float) -> None:
    """Give the parameters with these ids groups of their own, with another learning rate."""
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in chosen]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
    optimizer.param_groups[:] = [
        group for group in optimizer.param_groups if group["params"]
    ]  # ZeRO refuses empty ones
