"""Models without weights, on the meta device: what a training starts from, where it is and where it is not on this machine.

Runs and models that are not here are known from the shipped configuration that would make them, or from `PUBLIC_MODELS`.
"""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, LlavaForConditionalGeneration, PreTrainedConfig

from vqrae.common.checkpoints import resolve_model
from vqrae.common.config import ConfigError, did_you_mean, load_config
from vqrae.common.memory import PLANNING_ATTENTION
from vqrae.quickstart.pretrain_encoder import EncoderPretrainingConfig
from vqrae.quickstart.train_llm import TinyLLMConfig
from vqrae.tokenizer.build import build_tokenizer
from vqrae.tokenizer.config import ModelConfig, TokenizerTrainConfig
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.build import llava_config
from vqrae.understanding.train import TrainConfig


def _llama(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    vocabulary: int = 32000,
    key_heads: int | None = None,
) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads or heads,
        "vocab_size": vocabulary,
    }


def _qwen(
    kind: str,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int,
    vocabulary: int,
    **more: Any,
) -> dict:
    return {
        **_llama(width, inner, layers, heads, vocabulary, key_heads),
        "model_type": kind,
        **more,
    }


# What the `config.json` of these says of their shapes.
PUBLIC_MODELS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": _llama(4096, 11008, 32, 32),
    "lmsys/vicuna-13b-v1.5": _llama(5120, 13824, 40, 40),
    "Qwen/Qwen2.5-7B-Instruct": _qwen("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen3-0.6B": _qwen(
        "qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 1536, 30, 9, 49152, 3)
    | {"tie_word_embeddings": True},
}
# Folders that a command of ours makes from a public model (`vqrae.understanding.smollm2`).
MADE_FROM = {"runs/smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def config_folder(package: str) -> Path:
    return Path(str(resources.files(f"vqrae.{package}"))) / "configs"


def _shipped_run(package: str, cls: type, output_dir: str) -> Any:
    """The shipped configuration that would make the run `output_dir`, or None."""
    for file in sorted(config_folder(package).glob("*.yaml")):
        try:
            config: Any = load_config(cls, file)
        except ConfigError:
            continue
        if config.output_dir == output_dir:
            return config
    return None


def tokenizer_config(name: str) -> VQRAEConfig:
    """The configuration of a tokenizer that is on this machine, or that a shipped configuration would make."""
    if Path(name).is_dir():
        return VQRAEConfig.from_pretrained(resolve_model(name))
    config = _shipped_run("tokenizer", TokenizerTrainConfig, name)
    if config is None:
        raise ValueError(
            f"tokenizer {name}: not on this machine, and no shipped configuration makes it: give tokenizer=FOLDER"
        )
    return build_like(config.model).config


def llm_config(name: str) -> PreTrainedConfig:
    """The configuration of a language model that is on this machine, or known by its name."""
    if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return AutoConfig.from_pretrained(resolve_model(name), local_files_only=True)
    name = MADE_FROM.get(name, name)
    if name in PUBLIC_MODELS:
        values = dict(PUBLIC_MODELS[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    config = _shipped_run("quickstart", TinyLLMConfig, name)
    if config is not None:
        return AutoConfig.for_model("qwen3", **{"vocab_size": 128, **config.model})
    raise ValueError(
        f"language model {name}: not on this machine. {did_you_mean(name, PUBLIC_MODELS)}"
    )


def build_like(config: ModelConfig) -> VQRAEModel:
    """The tokenizer without weights; where its encoder is not known, the shapes that the configuration names."""
    values = config.encoder_config
    if config.encoder and Path(config.encoder).is_dir():
        values, _ = PreTrainedConfig.get_config_dict(resolve_model(config.encoder))
        values = values.get("vision_config", values)
    elif values is None:
        source = _shipped_run("quickstart", EncoderPretrainingConfig, str(config.encoder))
        if source is None:
            raise ValueError(
                f"encoder {config.encoder}: not on this machine: give model.encoder=FOLDER or model.encoder_config"
            )
        values = source.vision
    values = {"model_type": "siglip_vision_model", **values}
    if values["model_type"] == "siglip_vision_model":
        values["vision_use_head"] = False
    with torch.device("meta"):
        return build_tokenizer(
            dataclasses.replace(config, encoder=None, encoder_config=values), PLANNING_ATTENTION
        )


def empty_llava(config: TrainConfig) -> LlavaForConditionalGeneration:
    """The LLaVA of a configuration in bf16: every shape, no weight."""
    text_config = llm_config(config.llm)
    llava = llava_config(
        tokenizer_config(config.tokenizer), text_config, image_token_id=text_config.vocab_size - 1
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration._from_config(
            llava, attn_implementation=PLANNING_ATTENTION, dtype=torch.bfloat16
        )
