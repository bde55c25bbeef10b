"""Rows in the engine's order give the codes and pixels of `vqrae generate`; bad requests are told.

vLLM-Omni is not needed: a loop over transformers' Qwen3 stands for its engine.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import DynamicCache, Qwen3Config

from vqrae.common.images import tensor_to_image
from vqrae.generation.generator import Generator
from vqrae.generation.sampling import SamplingConfig, sample_codes
from vqrae_vllm_omni import plugin, prompts
from vqrae_vllm_omni.guidance import SUFFIX, next_ids
from vqrae_vllm_omni.pixels import PixelStage, post_process

CAPTIONS = ["a red circle", "a photo of a blue star on the left"]
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def ours(generator: Path) -> Generator:
    return Generator.from_pretrained(generator, device="cpu")


@pytest.fixture
def served(ours: Generator) -> prompts.Prompts:
    prompts.serve(ours.model.config)
    return prompts._served[0]


def _parameters(seed: int | None = 0, **second: Any) -> list[Any]:
    return [SimpleNamespace(seed=seed), SimpleNamespace(**second)]


@torch.inference_mode()
def _engine(ours: Generator, requests: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """The ids that each request gets: a forward pass of every row in every step, in that order."""
    vocabulary = ours.encode_prompt.vocabulary
    news = {request: prompt["prompt_token_ids"] for request, prompt in requests.items()}
    caches = {request: DynamicCache() for request in requests}
    steps = []
    for place in range(vocabulary.num_codes):
        logits, infos = [], []
        for request, prompt in requests.items():
            given = {"input_ids": torch.tensor([news[request]]), "logits_to_keep": 1}
            row = ours.model(**given, past_key_values=caches[request]).logits[0, -1]
            logits.append(row[vocabulary.code_rows])
            kept = {"global_request_id": [request], "generated_len": place}
            infos.append({**prompt["additional_information"], **kept})
        steps.append(next_ids(torch.stack(logits), infos, vocabulary))
        news = dict(zip(requests, steps[-1][:, None].tolist(), strict=True))
    return dict(zip(requests, torch.stack(steps, dim=1).tolist(), strict=True))


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of vLLM-Omni that the hooks answer with."""
    answers = {
        "vllm_omni.model_executor.stage_input_processors.bagel": ["ExpandedPrompt"],
        "vllm_omni.diffusion.data": ["DiffusionOutput"],
    }
    for name, classes in answers.items():
        module = ModuleType(name)
        for each in classes:
            setattr(module, each, lambda *values, **named: SimpleNamespace(values=values, **named))
        monkeypatch.setitem(sys.modules, name, module)


def test_codes_and_pixels_are_those_of_generate(
    ours: Generator, served: prompts.Prompts, generator: Path, hooks: None
) -> None:
    requests = {}
    for number, (caption, seed) in enumerate(zip(CAPTIONS, SEEDS, strict=True)):
        requests[f"r{number}"] = prompts.transform({"prompt": caption}, _parameters(seed))
        [companion] = prompts.expand(caption, None)
        prompt, role, suffix = companion.values
        assert (role, suffix) == ("uncond", SUFFIX)
        requests[f"r{number}{suffix}"] = prompt
    shuffled = sorted(requests, key=lambda request: request[::-1])
    ids = _engine(ours, {request: requests[request] for request in shuffled})
    vocabulary = ours.encode_prompt.vocabulary
    given = [ours.encode_prompt(caption) for caption in CAPTIONS]
    blank = ours.encode_prompt.unconditional
    expected = sample_codes(ours.model, given, blank, vocabulary, ours.sampling, SEEDS)
    stage = PixelStage(od_config=SimpleNamespace(model=str(generator)))
    asked = []
    for number, codes in enumerate(expected.tolist()):
        assert ids[f"r{number}"] == ids[f"r{number}{SUFFIX}"]
        answer = SimpleNamespace(cumulative_token_ids=ids[f"r{number}"])
        asked.append(prompts.to_pixels([SimpleNamespace(outputs=[answer])], ""))
        assert asked[-1]["codes"] == codes
    outputs = stage.forward(SimpleNamespace(prompts=asked))
    images = ours.images(CAPTIONS, seeds=SEEDS)
    for output, image in zip(outputs, images, strict=True):
        assert torch.equal(output.output[0], image)
        [shown] = post_process(None)(output.output)
        assert shown.tobytes() == tensor_to_image(image).tobytes()
    assert stage.load_weights([]) == set(dict(stage.named_parameters()))


def test_a_request_says_how_it_is_sampled(served: prompts.Prompts) -> None:
    given = {"prompt": "a star", "sampling": {"top_k": 3}}
    parameters = _parameters(7, guidance_scale=1.5, guidance_scale_provided=True)
    values = served.with_caption(given, parameters)["additional_information"]["vqrae"]
    assert values["seed"] == 7
    assert SamplingConfig(**values["sampling"]) == SamplingConfig(guidance_scale=1.5, top_k=3)
    first, second = (served.with_caption("a star", _parameters(None)) for _ in range(2))
    assert first != second  # a seed of their own


def test_images_at_other_places_and_with_other_sampling_share_a_step(
    ours: Generator, served: prompts.Prompts
) -> None:
    vocabulary = ours.encode_prompt.vocabulary
    images: dict[str, tuple[int, dict[str, Any]]] = {
        "a": (0, {"temperature": 0.0}),
        "b": (9, {"guidance_schedule": "cosine", "guidance_end": 0.5}),
        "c": (9, {}),
    }
    infos: list[dict[str, Any]] = []
    for name, (place, sampling) in images.items():
        prompt = served.with_caption({"prompt": "", "sampling": sampling}, _parameters(1))
        for request, each in ((name, prompt), (name + SUFFIX, served.without_caption())):
            kept = {"global_request_id": [request], "generated_len": place}
            infos.append({**each["additional_information"], **kept})
    logits = torch.randn(6, vocabulary.codebook_size, generator=torch.Generator().manual_seed(0))
    together = next_ids(logits, infos, vocabulary)
    for start in (0, 2, 4):
        pair = slice(start, start + 2)
        assert together[pair].equal(next_ids(logits[pair], infos[pair], vocabulary))
    with pytest.raises(ValueError, match="expected each with its companion"):
        next_ids(logits[1:], infos[1:], vocabulary)


@pytest.mark.parametrize("ids", [[], [128] * 63, [127] * 64, [192] * 64])
def test_an_answer_that_is_no_image_is_refused(served: prompts.Prompts, ids: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="expected 64 codes"):
        served.codes(ids)


def test_requests_that_cannot_be_served_are_refused(
    served: prompts.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="got 4 images of a request, expected 1"):
        served.with_caption("a star", _parameters(num_outputs_per_prompt=4))
    monkeypatch.setattr(served, "without_guidance", True)
    with pytest.raises(ValueError, match="trained with caption_dropout 0"):
        served.with_caption("a star", _parameters())
    several = {"offset": 9, "codebook_size": 4, "num_codes": 2, "num_codebooks": 8}
    with pytest.raises(ValueError, match="got a generator of 8 codes a position, expected 1"):
        plugin.pipeline(Qwen3Config(visual_vocabulary=several))
    assert plugin.pipeline(Qwen3Config()) is None  # another model


def test_what_the_package_declares_exists() -> None:
    package = Path(plugin.__file__).parent
    text = (package.parent / "pyproject.toml").read_text()
    declared = dict(re.findall(r'entry-points."(.+)"]\nvqrae = "(.+)"', text))
    assert set(declared) == {"vllm.general_plugins", "vllm_omni.general_plugins"}
    assert set(declared.values()) == {f"{plugin.__name__}:{plugin.register.__name__}"}
    stages = yaml.safe_load((package / "deploy.yaml").read_text())["stages"]
    # What the scheduler of pairs demands.
    assert stages[0]["max_num_batched_tokens"] >= 2 * stages[0]["max_model_len"]
    wanted = ("enable_prefix_caching", "enable_chunked_prefill", "async_scheduling")
    assert not any(stages[0][name] for name in wanted)
