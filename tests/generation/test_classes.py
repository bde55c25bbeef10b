"""Class-conditional generation: folders of classes, ten crops, LlamaGen's configuration."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from vqrae.common.config import load_config, shipped_config
from vqrae.common.files import read_json
from vqrae.data.code_shards import CodeDataset
from vqrae.data.samples import fit_image
from vqrae.data.sources import classes_of, open_pairs
from vqrae.generation import extract_codes, train
from vqrae.generation.config import GeneratorConfig
from vqrae.generation.generator import Generator
from vqrae.generation.modeling import VisualVocabulary
from vqrae.generation.sampling import SamplingConfig
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel

CLASSES = ["a red circle", "green star", "square"]
several_codes = pytest.mark.parametrize("num_codebooks", [4], indirect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each of three classes."""
    root = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(4):
            pixels = np.random.default_rng(10 * number + i).integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@several_codes
def test_classes_train_and_draw(folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    codes, run = tmp_path / "codes", tmp_path / "run"
    common = ["c2i_xxl", f"tokenizer={tokenizer_path}", "num_workers=0"]
    extract_codes.main([*common, f"source={folder}", f"output_dir={codes}"])
    shards = CodeDataset(codes)
    assert (len(shards), shards.manifest.crop, classes_of(shards)) == (120, "ten", CLASSES)
    sizes = "hidden_size=32 intermediate_size=64 num_hidden_layers=2 num_attention_heads=2"
    sizes += " num_key_value_heads=2"
    given = [f"model.llm_config.{size}" for size in sizes.split()]
    steps = "max_steps=4 global_batch_size=6 micro_batch_size=3 save_steps=2 logging_steps=1"
    steps += " dataloader_num_workers=0"
    given += [f"optimization.{step}" for step in steps.split()]
    command = ["c2i_xxl", f"tokenizer={tokenizer_path}", f"data={codes}", f"output_dir={run}"]
    train.main([*command, *given])
    config = read_json(run / "model" / "config.json")
    assert (config["classes"], config["grid_size"], config["dropout"]) == (CLASSES, 4, 0.1)
    generator = Generator.from_pretrained(run)
    images = generator.images(CLASSES, seeds=[0, 1, 2])
    assert images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(generator.images(CLASSES[1:2], seeds=[1])[0], images[1])
    with pytest.raises(ValueError, match="did you mean 'green star'"):
        generator.images(["green stars"], seeds=[0])
    with pytest.raises(ValueError, match="caption_dropout 0"):
        generator.images(CLASSES[:1], seeds=[0], sampling=SamplingConfig(guidance_scale=2.0))


def test_ten_crops_are_corners_centre_and_their_mirror_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (35, 35, 3), np.uint8)
    image = Image.fromarray(pixels)  # a tenth more than 32
    crops = [fit_image(image, 32, "ten", number=i) for i in range(11)]
    whole = pil_to_tensor(image)
    assert torch.equal(crops[0], whole[:, :32, :32])
    assert torch.equal(crops[3], whole[:, 3:, 3:])
    assert torch.equal(crops[8], crops[2].flip(-1))
    assert torch.equal(crops[10], crops[0])


def test_captions_without_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="has no captions"):
        open_pairs(str(tmp_path), image_size=32)
    assert classes_of(open_pairs(str(folder), image_size=32, split="all")) == CLASSES
    with pytest.raises(ValueError, match="scenes have captions, no classes"):
        classes_of(open_pairs("scenes", image_size=32))


PARAMETERS = {
    # of UniTok's LlamaGen, counted by its code: width, layers, heads, width of the MLP
    (768, 12, 12, 2048): 164_376_064,
    (1024, 24, 16, 2816): 427_857_920,
    (1280, 36, 20, 3584): 897_921_536,
    (1536, 48, 24, 4096): 1_574_566_912,
}


@pytest.mark.parametrize(("size", "parameters"), PARAMETERS.items())
def test_the_configuration_has_the_size_of_llamagen(
    size: tuple[int, int, int, int], parameters: int
) -> None:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    values = dict(zip(names, size, strict=True)) | {"num_key_value_heads": size[2]}
    overrides = [f"training.model.llm_config.{name}={value}" for name, value in values.items()]
    path = shipped_config("vqrae.generation", "c2i_xxl")
    config = load_config(GeneratorConfig, path, overrides).training
    if size[0] == 1536:
        assert config == load_config(GeneratorConfig, path).training
    visual = VQRAEConfig(num_codebooks=8, codebook_size=4096, quantizer="mcq", codebook_dim=64)
    vocabulary = VisualVocabulary(
        offset=1001, num_classes=1000, codebook_size=4096, num_codes=256, num_codebooks=8
    )
    with torch.device("meta"):
        model, _ = train.build_model(config, vocabulary, VQRAEModel(visual))
    added = (vocabulary.num_rows - 1000) * size[0]  # no class, and a round number of rows
    assert model.num_parameters() == parameters + added
    optimization = config.optimization
    assert (optimization.learning_rate, optimization.weight_decay) == (3e-4, 0.05)
    assert optimization.max_steps == 300 * (1_281_167 // optimization.global_batch_size)
