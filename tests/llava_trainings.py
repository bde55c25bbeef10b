"""Trainings of a tiny LLaVA for tests, in this process or in others."""

import weakref
from unittest import mock

from vqrae.understanding import train

STEPS = {
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "logging_steps": 1,
    "lr_scheduler_type": "constant_with_warmup",
    "optimizer": "adamw",
}


def train_and_count_models(arguments: list[str]) -> None:
    """Train, and print how many models of earlier stages each stage finds alive."""
    build, models = train.load_or_build, []

    def load_or_build(config, stage):
        alive = sum(model() is not None for model in models)
        print(stage, "finds alive:", alive, flush=True)
        model, processor = build(config, stage)
        models.append(weakref.ref(model))
        return model, processor

    with mock.patch.object(train, "load_or_build", load_or_build):
        train.main(arguments)
