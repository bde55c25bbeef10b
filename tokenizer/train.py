"""Train the tokenizer, in two stages (VQRAE section 3.3): first quantizer and decoder on a frozen encoder, then
everything together, with the encoder held by distillation to its frozen original.

    python -m vqrae.tokenizer.train tiny output_dir=runs/tokenizer model.encoder=runs/encoder
    torchrun --standalone --nproc_per_node 2 -m vqrae.tokenizer.train tiny zero=2 ...

Relaunching the same command continues where it stopped.
"""

import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.trainer_utils import set_seed

from vqrae.common.checkpoints import resolve_model
from vqrae.common.config import load_config, shipped_config
from vqrae.common.distributed import attention_implementation, is_main_process
from vqrae.common.files import atomic_path, weights_fingerprint
from vqrae.common.run import RunDirectory
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.tokenizer.stage import StageTrainer
from vqrae.tokenizer.train_config import ModelConfig, TokenizerTrainConfig


def build_tokenizer(config: ModelConfig, attention: str) -> VQRAEModel:
    """A tokenizer whose encoder has its pretrained weights (or random ones, when only a configuration is given)."""
    if (config.encoder is None) == (config.encoder_config is None):
        raise ValueError("model: give either encoder (pretrained weights) or encoder_config (random ones)")
    encoder: PreTrainedModel | None = None
    encoder_config = config.encoder_config
    if config.encoder:
        source = resolve_model(config.encoder)
        loaded = AutoConfig.from_pretrained(source)
        options = {"vision_use_head": False} if "siglip" in loaded.model_type else {}
        encoder = AutoModel.from_pretrained(source, attn_implementation=attention, **options)
        encoder_config = encoder.config.to_diff_dict() | {"model_type": encoder.config.model_type}
    tokenizer_config = VQRAEConfig(
        encoder_config=encoder_config,
        feature_tap=config.feature_tap,
        feature_norm=config.feature_norm,
        quantizer=config.quantizer,
        quantizer_options=config.quantizer_options,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
        output_patch_size=config.output_patch_size,
        output_basis=config.output_basis,
        attn_implementation=attention,
    )
    model = VQRAEModel(tokenizer_config)
    if encoder is not None:
        model.encoder.load_state_dict(encoder.state_dict())
    return model


def main(argv: list[str] | None = None) -> None:
    name, *overrides = argv if argv is not None else sys.argv[1:]
    config = load_config(TokenizerTrainConfig, shipped_config("vqrae.tokenizer", name), overrides)
    attention = attention_implementation(config.attention)
    output = Path(config.output_dir)
    stages = [1, 2] if config.stage == "both" else [config.stage]
    RunDirectory(output, config, seed=config.seed)
    for number in stages:
        folder, previous = output / f"stage{number}", output / "stage1" / "model"
        if (folder / "model").is_dir():
            print(f"stage {number} is finished: {folder / 'model'}")
            continue
        if number == 2 and not previous.is_dir():
            raise FileNotFoundError(f"stage 2 starts from {previous}, which does not exist: run stage=1 first, or stage=both")
        set_seed(config.seed)
        if number == 1:
            model = build_tokenizer(config.model, attention)
        else:
            model = VQRAEModel.from_pretrained(previous, attn_implementation=attention)
        run = RunDirectory(folder, seed=config.seed)
        StageTrainer(config, number, model, run).train()
    if is_main_process():
        with atomic_path(output / "model") as temporary:
            shutil.copytree(output / f"stage{stages[-1]}" / "model", temporary)
        print(f"tokenizer {weights_fingerprint(output / 'model')[:16]} in {output / 'model'}")


if __name__ == "__main__":
    main()
