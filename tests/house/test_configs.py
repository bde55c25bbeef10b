"""Every shipped YAML is read by exactly one dataclass, and its header is complete."""

from pathlib import Path

import pytest

from vqrae.common.config import ConfigError, load_config
from vqrae.eval.ablations.suites import SUITES, Suite
from vqrae.generation.config import GeneratorConfig
from vqrae.mllm.config import MLLMConfig
from vqrae.quickstart.claims import ClaimList
from vqrae.quickstart.pretrain_encoder import EncoderPretrainingConfig
from vqrae.quickstart.train_llm import TinyLLMConfig
from vqrae.tokenizer.config import TokenizerTrainConfig
from vqrae.understanding.train import TrainConfig

ROOT = Path(__file__).parents[2]
READERS: dict[str, list[type]] = {
    "tokenizer": [TokenizerTrainConfig],
    "understanding": [TrainConfig],
    "generation": [GeneratorConfig],
    "mllm": [MLLMConfig],
    "ablations": [Suite],
    "quickstart": [EncoderPretrainingConfig, TinyLLMConfig, ClaimList],
}
CONFIGS = sorted(
    path for path in ROOT.glob("[a-z]*/**/configs/*.yaml") if "build" not in path.parts
)


def reader(path: Path, overrides: tuple[str, ...] = ()) -> list[type]:
    """The dataclasses that accept this file."""
    accepting = []
    for cls in READERS[path.parent.parent.name]:
        try:
            load_config(cls, path, overrides)
        except ConfigError:
            continue
        accepting.append(cls)
    return accepting


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_every_shipped_config_is_read(path: Path) -> None:
    assert len(reader(path)) == 1
    assert reader(path, ("no_such_key=1",)) == []
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Run:", "Hardware:", "Time:", "Result:"):
        assert any(word in line for line in header), f"{path}: the header has no {word}"


@pytest.mark.parametrize(
    ("package", "override"),
    [
        ("tokenizer", "stage1.micro_batch_size=0"),
        ("tokenizer", "stage2.decoder_lr=-1e-4"),
        ("tokenizer", "stage1.decoder_lr=.nan"),
        ("tokenizer", "stage1.decoder_lr=0.0"),
        ("tokenizer", "stage2.encoder_lr=.inf"),
        ("tokenizer", "stage1.max_grad_norm=-1.0"),
        ("tokenizer", "stage1.max_steps=-1"),
        ("tokenizer", "save_steps=0"),
        ("tokenizer", "keep_checkpoints=0"),
        ("tokenizer", "model.codebook_size=0"),
        ("tokenizer", "data.cutmix=1.5"),
        ("understanding", "max_length=0"),
        ("understanding", "lora.rank=0"),
        ("understanding", "lora.dropout=.nan"),
        ("generation", "extraction.batch_size=0"),
        ("generation", "extraction.size=0"),
        ("generation", "training.model.max_length=0"),
        ("mllm", "generation.weight=-1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(package: str, override: str) -> None:
    path = ROOT / package / "configs" / "tiny.yaml"
    with pytest.raises(ConfigError, match=rf"{override.partition('=')[0].rpartition('.')[2]}: got"):
        load_config(READERS[package][0], path, [override])


def test_every_package_ships_its_tiny_config() -> None:
    assert {path.parent.parent.name for path in CONFIGS if path.stem == "tiny"} == {
        "tokenizer",
        "understanding",
        "generation",
        "mllm",
    }


def test_every_shipped_suite_is_in_the_list_of_all() -> None:
    assert {path.stem for path in CONFIGS if path.parent.parent.name == "ablations"} == set(SUITES)
