"""The generator's training, and sampling, on a GPU, of which tests/fake_gpu.py says what it is."""

from pathlib import Path

import pytest
from fake_gpu import NoWaiting, fake_gpu
from transformers import Qwen3ForCausalLM

from vqrae.generation import train
from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.sampling import SamplingConfig, sample_codes
from vqrae.generation.train import GeneratorTrainer

WAITS = ("transformers/masking_utils.py",)  # whether a mask hides anything


@pytest.mark.parametrize("data", ["codes", "scenes"])
def test_the_host_waits_for_no_step(
    data: str, train_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From code shards; and with images that are encoded while it trains, whose search settles near ties."""
    waits = WAITS if data == "codes" else (*WAITS, "quantizers/search.py")
    given = [
        argument
        for argument in train_arguments
        if data == "codes" or not argument.startswith("data=")
    ]
    options = [f"output_dir={tmp_path}", "optimization.logging_steps=10", "model.attention=sdpa"]
    options += [] if data == "codes" else ["data=scenes"]
    with fake_gpu() as gpu:
        watch = NoWaiting(gpu, *waits)
        watch.follow(GeneratorTrainer, monkeypatch)
        train.main([*given, *options])
    assert watch.steps == 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05},
        {"guidance_start": 0.3, "guidance_schedule": "cosine"},
        {"temperature": 0.0, "guidance_start": 0.25, "guidance_end": 0.5},
    ],
)
def test_every_option_of_sampling_runs_on_the_gpu(
    options: dict, model: Qwen3ForCausalLM, vocabulary: VisualVocabulary
) -> None:
    model.set_attn_implementation("sdpa")
    boi = vocabulary.begin_of_image
    prompts = [[1, 2, boi], [3, boi], [3, boi]]
    with fake_gpu() as gpu:
        model.to("cuda")
        progress = []

        def watch(done: int, total: int) -> None:
            if progress and len(progress) < 3:
                gpu.check(())
            progress.append(done)
            gpu.waits.clear()

        codes = sample_codes(
            model, prompts, [boi], vocabulary, SamplingConfig(**options), [0, 1, 2], progress=watch
        )
    assert codes.shape == (3, vocabulary.num_codes)
    assert codes.device.type == "cpu"
    assert progress[-1] == vocabulary.num_codes
