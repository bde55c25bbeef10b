"""Models are found where people mean them, and loaded whole or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from vqrae.common.checkpoints import load_model, require_kind, resolve_model
from vqrae.common.files import require_same_tokenizer, weights_fingerprint


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs/siglip2_512 does not exist"):
        resolve_model("runs/siglip2_512")
    assert resolve_model("org/name") == "org/name"
    with pytest.raises(
        FileNotFoundError, match=r"^org/name is not a folder here, and the hub gave no config.json"
    ):
        require_kind("org/name", ("llava",), "a LLaVA")


def test_the_kind_is_read_before_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vqrae"}')
    with pytest.raises(ValueError, match="is a 'vqrae' model, expected a LLaVA"):
        require_kind(tmp_path, ("llava",), "a LLaVA")
    assert require_kind(tmp_path, ("llava", "vqrae"), "one of these") == {"model_type": "vqrae"}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A small language model, to be damaged."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=8, tie_word_embeddings=True, **sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_missing_of_other_shapes_or_not_finite_are_refused(broken: Path) -> None:
    # The tied head is not missed.
    assert load_model(Qwen3ForCausalLM, broken, dtype=torch.float32).dtype == torch.float32
    name = "model.norm.weight"
    for value in (torch.nan, torch.inf):
        _change(broken, lambda weights, value=value: weights[name][:1].fill_(value))
        with pytest.raises(ValueError, match=rf"model: {name} holds values that are not finite"):
            load_model(Qwen3ForCausalLM, broken)
    _change(broken, lambda weights: weights.update({name: torch.zeros(3)}))
    with pytest.raises(ValueError, match=f"has weights of other shapes .*, 1 of them: {name}"):
        load_model(Qwen3ForCausalLM, broken)
    _change(broken, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"lacks weights of a Qwen3ForCausalLM, 1 of them: {name}"):
        load_model(Qwen3ForCausalLM, broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"the weights of .* are damaged"):
        load_model(Qwen3ForCausalLM, broken)


def test_fingerprint_is_of_the_weights(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert len(weights_fingerprint(tokenizer_folder)) == 64
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder"):
        weights_fingerprint(tmp_path)
    with pytest.raises(ValueError, match=r"codes was made with tokenizer bbb, .* in use is aaa"):
        require_same_tokenizer("aaa", "bbb", "codes")


def test_models_are_found_where_people_point(tmp_path: Path) -> None:
    runs = ("run/model", "run/step-9/model", "half/step-9/model", "half/step-10/model")
    for folder in (*runs, "plain"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    assert resolve_model(tmp_path / "plain") == str(tmp_path / "plain")
    assert resolve_model(tmp_path / "run") == str(tmp_path / "run" / "model")
    assert resolve_model(tmp_path / "half") == str(tmp_path / "half" / "step-10" / "model")
    assert resolve_model("google/siglip2-so400m-patch16-256") == "google/siglip2-so400m-patch16-256"
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(FileNotFoundError):
            resolve_model(name)
