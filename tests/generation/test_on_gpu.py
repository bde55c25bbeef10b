"""Training and sampling on a GPU without content (tests/fake_gpu.py): the host never waits."""

from pathlib import Path

import pytest
from fake_gpu import NoWaiting, fake_gpu
from transformers import PreTrainedModel

from vqrae.generation import train
from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.sampling import SamplingConfig, sample_codes
from vqrae.generation.train import GeneratorTrainer


@pytest.mark.parametrize(
    ("num_codebooks", "data"),
    [(None, "codes"), (None, "scenes"), (4, "codes")],
    indirect=["num_codebooks"],
)
def test_the_host_waits_for_no_step(
    data: str, train_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From code shards; and with images, whose exact search compares candidates on the host."""
    waits = ["transformers/masking_utils.py"]  # whether a mask hides anything
    options = [f"output_dir={tmp_path}", "optimization.logging_steps=10", "model.attention=sdpa"]
    options += ["optimization.max_steps=2"]
    if data == "scenes":
        waits.append("quantizers/search.py")
        options.append("data=scenes")
    with fake_gpu() as gpu:
        watch = NoWaiting(gpu, *waits)
        watch.follow(GeneratorTrainer, monkeypatch)
        train.main([*train_arguments, *options])
    assert watch.steps == 2


@pytest.mark.parametrize(
    ("num_codebooks", "options"),
    [
        (None, {"guidance_scale": 1.0}),
        (None, {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "guidance_schedule": "cosine"}),
        (None, {"temperature": 0.0, "guidance_start": 0.25, "guidance_end": 0.5}),
        (4, {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "guidance_schedule": "cosine"}),
    ],
    indirect=["num_codebooks"],
)
def test_sampling_waits_for_the_codes_alone(
    options: dict, model: PreTrainedModel, vocabulary: VisualVocabulary
) -> None:
    model.set_attn_implementation("sdpa")
    boi, steps = vocabulary.begin_of_image, []
    prompts = [[1, 2, boi], [3, boi], [3, boi]]
    with fake_gpu() as gpu:
        model.to("cuda")

        def watch(done: int, total: int) -> None:
            if steps:
                gpu.check(())
            steps.append(done)
            gpu.waits.clear()

        config = SamplingConfig(**options)
        codes = sample_codes(model, prompts, [boi], vocabulary, config, [0, 1, 2], progress=watch)
    assert codes.shape == (3, *vocabulary.code_shape)
    assert codes.device.type == "cpu"
    assert steps[-1] == vocabulary.num_codes
