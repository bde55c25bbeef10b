"""Zero-shot scores against open_clip, brute force and SigLIP itself; what is asked; the command."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel

from vqrae.common.files import read_json
from vqrae.common.images import save_image, tensor_to_image
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.data.scenes.language import object_phrases, vocabulary_texts
from vqrae.data.stream import Draw
from vqrae.data.word_tokenizer import END, build_word_tokenizer
from vqrae.eval.zeroshot import evaluate as zeroshot
from vqrae.eval.zeroshot.scores import class_vectors, ranks, recalls
from vqrae.eval.zeroshot.tasks import TEMPLATES, labels_of, open_labelled, prompts_of, read_names
from vqrae.eval.zeroshot.texts import OwnTextSide, SiglipTextSide, embed_all, encoder_siglip
from vqrae.tokenizer.modeling import VQRAEModel


def text_vector(text: str) -> torch.Tensor:
    """That of golden/zero_shot.py."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(4, generator=torch.Generator().manual_seed(seed))


def test_clips_prompts_classify_as_in_open_clip() -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "zero_shot.json").read_text())
    templates = [line[3:-1] for line in TEMPLATES.read_text().splitlines()[1:]]
    assert hashlib.sha256("\n".join(templates).encode()).hexdigest() == golden["templates"]
    names = ("tench", "great white shark", "crane")
    texts = [template.format(name) for name in names for template in templates]
    prompts = F.normalize(torch.stack(list(map(text_vector, texts))), dim=-1).view(3, 80, -1)
    classes = class_vectors(prompts_of(prompts, "row"))
    torch.testing.assert_close(classes, torch.tensor(golden["classifier"]))
    images = [F.normalize(text_vector(f"image {i}"), dim=-1) for i in range(12)]
    right = (torch.arange(12) % 3)[:, None] == torch.arange(3)
    found = recalls(ranks(torch.stack(images), classes, right), "top", 1, 2)
    assert list(found.values()) == golden["top"]


def test_ranks_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: many keys are equally near.
    queries = torch.randint(-2, 3, (40, 3), generator=generator).float()
    keys = torch.randint(-2, 3, (9, 3), generator=generator).float()
    right = torch.rand(40, 9, generator=generator) < 0.2
    right[torch.arange(40), torch.arange(40) % 9] = True
    expected = []
    for query, own in zip(queries, right, strict=True):
        order = sorted(range(9), key=lambda place: (-float(keys[place] @ query), place))
        expected.append(next(i for i, place in enumerate(order) if own[place]))
    assert ranks(queries, keys, right).tolist() == expected
    same = torch.zeros(9, 3)  # a collapsed space finds nothing by chance alone
    assert recalls(ranks(same, same, torch.eye(9, dtype=torch.bool)), "r", 1, 5) == {
        "r1": pytest.approx(1 / 9),
        "r5": pytest.approx(5 / 9),
    }


def test_prompts_say_what_images_show(tmp_path: Path) -> None:
    scenes = open_labelled("scenes", 64, 9, None)
    emoji = open_labelled("emoji", 64, 9, None)
    assert scenes is not None
    assert emoji is not None
    for i in range(9):
        label = scenes.dataset[i]["label"]
        [item] = scenes.dataset.scenes.scene(scenes.dataset.indices[i]).objects  # type: ignore[attr-defined]
        names = scenes.dataset.scenes.sprites.names  # type: ignore[attr-defined]
        phrase = object_phrases(item, names)[1]
        assert scenes.texts[label] == f"a photo of {phrase}"
        kinds = [int(labels_of(label, scenes.columns, k)) for k in ("row", "column")]
        assert kinds == [item.name, item.color]
        sample = emoji.dataset.emoji.encoded(Draw(i, 0))  # type: ignore[attr-defined]
        assert emoji.texts[emoji.dataset[i]["label"]] == sample.caption
    assert len(scenes.texts) == scenes.rows * scenes.columns == 8 * 10
    table = torch.arange(12.0).view(3, 4, 1)
    assert prompts_of(table, "column")[1].flatten().tolist() == [1, 5, 9]
    assert prompts_of(table, "cell").shape == (12, 1, 1)


def test_names_of_folders(tmp_path: Path) -> None:
    folders = ["n01440764", "n01484850"]
    assert read_names(None, ["great_white_shark"]) == ["great white shark"]
    (tmp_path / "names.txt").write_text("tench\nshark\n")
    assert read_names(str(tmp_path / "names.txt"), folders) == ["tench", "shark"]
    (tmp_path / "names.json").write_text('{"n01484850": "shark", "n01440764": "tench"}')
    assert read_names(str(tmp_path / "names.json"), folders) == ["tench", "shark"]
    with pytest.raises(ValueError, match="names no class of the folders n0"):
        read_names(str(tmp_path / "names.json"), [*folders, "n0"])
    with pytest.raises(ValueError, match="holds 2 names, expected one a line for each of the 3"):
        read_names(str(tmp_path / "names.txt"), [*folders, "n0"])


# ---- text sides


@pytest.fixture
def siglip(make_tokenizer, tmp_path: Path) -> tuple[VQRAEModel, str]:
    """A tokenizer on the tower of a random SigLIP."""
    model = make_tokenizer()
    text_tokenizer = build_word_tokenizer(vocabulary_texts(["star"]), end_with=END)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 12, "projection_size": 32}
    text = {**sizes, "vocab_size": len(text_tokenizer)}
    vision = {**model.config.encoder_config, "vision_use_head": True}
    torch.manual_seed(1)
    whole = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path / "siglip")
    text_tokenizer.save_pretrained(tmp_path / "siglip")
    tower = SiglipVisionModel.from_pretrained(tmp_path / "siglip", vision_use_head=False)
    model.encoder.load_state_dict(tower.state_dict())
    return model, str(tmp_path / "siglip")


@torch.no_grad()
def test_an_encoders_siglip_reads_its_features(siglip, make_tokenizer) -> None:
    model, folder = siglip
    side, whole = SiglipTextSide(model, folder), SiglipModel.from_pretrained(folder).eval()
    images = torch.rand(2, 3, 64, 64)
    expected = whole.get_image_features(model.normalize(images)).pooler_output
    found = side.embed_images(model.encode_features(images))
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)
    texts = ["a photo of a star", "two stars"]
    ids = side.text_tokenizer(
        texts, padding="max_length", max_length=12, return_tensors="pt"
    ).input_ids
    expected = whole.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(embed_all(side, texts), F.normalize(expected, dim=-1))
    run = Path(folder).parent
    assert encoder_siglip(run) is None
    for encoder, expected in ((str(run), folder), ("org/siglip2", "org/siglip2")):
        (run / "config.yaml").write_text(f"model: {{encoder: {encoder}}}\n")
        assert encoder_siglip(run) == expected
    with pytest.raises(ValueError, match="expected those of the tokenizer's internvl_vision"):
        SiglipTextSide(make_tokenizer("internvit"), folder)


def score(output: Path, *arguments: str) -> dict:
    zeroshot.main([*arguments, f"output={output}"])
    return read_json(output)


@torch.no_grad()
def test_the_command_scores_both_kinds_of_features(unitok_folder: Path, tmp_path: Path) -> None:
    arguments = [f"model={unitok_folder}", "num_images=30", "batch_size=8"]
    values = score(tmp_path / "z.json", *arguments)
    model = VQRAEModel.from_pretrained(unitok_folder).eval()
    side = OwnTextSide(model, str(unitok_folder))
    # Brute force, one image and one text at a time.
    scenes = SceneDataset("validation", 30, item="detailed_pair")
    compute = {"continuous": model.encode_features, "quantized": model.quantized_features}
    for kind, features in compute.items():
        images, captions = [], [scenes[i]["caption"] for i in range(30)]
        for i in range(30):
            embedding = model.image_embeddings(features(scenes[i]["image"][None].float() / 255))
            images.append(embedding[0])
        texts = {caption: side.embed_texts([caption])[0] for caption in captions}
        found = 0
        for image, caption in zip(images, captions, strict=True):
            found += max(texts, key=lambda text: float(texts[text] @ image)) == caption
        scores = values["stages"]["model"][kind]
        assert scores["image_to_text"]["r1"] == pytest.approx(found / 30)
    assert values["tasks"]["object"] == {"chance": 1 / 80, "count": 30}
    assert values["tasks"]["text_to_image"]["count"] == len(texts)
    assert "| model | quantized |" in (tmp_path / "z.md").read_text()


def test_a_folder_of_classes_and_what_has_no_text_side(
    unitok_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    for name in ("dark_thing", "light_thing"):
        save_image(tensor_to_image(torch.rand(3, 40, 48)), tmp_path / "classes" / name / "1.png")
    data = f"data={tmp_path / 'classes'}"
    values = score(tmp_path / "z.json", f"model={unitok_folder}", data)
    assert set(values["stages"]["model"]["quantized"]) == {"class"}
    assert "'dark'" in values["notes"][0]  # a word that scenes do not have
    with pytest.raises(ValueError, match=r"has no text side.*give text_model="):
        score(tmp_path / "x.json", f"model={tokenizer_folder}", data)
