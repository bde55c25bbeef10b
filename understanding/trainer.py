"""What LLaVA adds to `Trainer`: LoRA, its samplers, small checkpoints and a strict resume."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import LlavaForConditionalGeneration
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vqrae.common.config import check_range
from vqrae.common.trainer import WholeTrainer
from vqrae.data.stream import GroupedSampler, OwnOrderSampler
from vqrae.understanding.build import cast_parameters
from vqrae.understanding.projector import (
    PROJECTOR,
    PROJECTOR_FILE,
    load_projector,
    save_projector,
)

if TYPE_CHECKING:
    from peft import PeftModel


class LlavaTrainer(WholeTrainer):
    """`Trainer` that knows LLaVA's parts.

    Args:
        projector_only: checkpoints hold the projector alone, as LLaVA's `mm_projector.bin`; the
            other weights are those that the stage started from. (DeepSpeed keeps a whole copy of
            its own.)
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
        if self.grouped:
            return GroupedSampler(
                dataset.modality_lengths(),
                micro_batch_size=self.args.train_batch_size,
                micro_batches=self.args.gradient_accumulation_steps * self.args.world_size,
                seed=self.args.seed,
            )
        if getattr(dataset, "training_index", None):
            return OwnOrderSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        if torch.is_tensor(count := options.get("num_items_in_batch")):
            # A step whose records were all left out has loss 0, not 0/0.
            options["num_items_in_batch"] = count.clamp(min=1)
        return super().compute_loss(model, inputs, *args, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.projector_learning_rate is None:
            return optimizer
        named = (model or self.model).named_parameters()
        projector = {id(parameter) for name, parameter in named if PROJECTOR in name}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in projector]
            group["params"] = [p for p in group["params"] if id(p) not in projector]
            if own:
                rate = self.projector_learning_rate
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        # ZeRO refuses empty groups.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not (self.projector_only and folder.name.startswith(PREFIX_CHECKPOINT_DIR)):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            weights = state_dict or self.model.state_dict()
            projector = {name: value for name, value in weights.items() if PROJECTOR in name}
            save_projector(projector, folder / PROJECTOR_FILE)
            self.model.config.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load the weights of a checkpoint, strictly (not under DeepSpeed, which keeps its own).

        LLaVA's weights have other names on disk than in memory. transformers 5.23 would load the
        file by the names in memory and not strictly: it finds none, warns and trains on from the
        initial weights. So whole models go through `from_pretrained`.
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


# ---- LoRA: adapters on every linear layer of the language model, with the whole projector


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Defaults are those of LLaVA-1.5's `finetune_lora.sh`."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    learning_rate: float = 2e-4
    """Of the adapters, instead of sft.learning_rate."""
    projector_learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        check_range(self, "rank", "alpha", low=1)
        check_range(self, "dropout", low=0, high=1)
        check_range(self, "learning_rate", "projector_learning_rate", low=0)


def add_lora(model: LlavaForConditionalGeneration, settings: LoraSettings) -> "PeftModel":
    """Freeze everything but new adapters and the projector, which become float32."""
    from peft import LoraConfig, get_peft_model

    modules = model.model.language_model.named_modules()
    linear = {name.rpartition(".")[2] for name, m in modules if isinstance(m, nn.Linear)}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(linear))})",
        modules_to_save=["multi_modal_projector"],
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the optimizer works on it
    return adapted


def merge_lora(
    model: LlavaForConditionalGeneration, adapter: str | Path
) -> LlavaForConditionalGeneration:
    """The model that an adapter was trained on -> an ordinary one with it in its weights.

    The sum is made in float32: in bfloat16 most of a small update would be rounded away twice.
    """
    from peft import PeftModel

    dtype = model.dtype
    cast_parameters(model, torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    cast_parameters(merged, dtype)
    return merged
