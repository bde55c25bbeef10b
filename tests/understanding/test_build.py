"""The assembled model reads the tokenizer's features and opens in plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from vqrae.common.config import load_config, shipped_config
from vqrae.common.files import weights_fingerprint
from vqrae.common.images import image_to_tensor
from vqrae.data.scenes.dataset import SceneDataset
from vqrae.tokenizer.configuration import VQRAEConfig
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.build import (
    add_rows,
    build_llava,
    build_processor,
    check_features,
    load_processor,
    require_tokenizer,
)
from vqrae.understanding.chat import Chat
from vqrae.understanding.train import TrainConfig, load_or_build


@pytest.mark.parametrize("features", ["continuous", "quantized"])
@pytest.mark.parametrize("encoder", ["siglip", "internvit", "unitok"])
def test_projector_reads_the_features(encoder, features, make_tokenizer, llm_folder, tmp_path):
    tokenizer = make_tokenizer(encoder, feature_norm="standardize")
    tokenizer.save_pretrained(tmp_path)
    num_tokens, size = tokenizer.config.grid_size**2, tokenizer.config.image_size
    model, processor = build_llava(tmp_path, llm_folder, features=features)
    is_plain = type(model.model.vision_tower) is type(tokenizer.encoder)
    assert is_plain == (features == "continuous" and encoder != "unitok")
    assert model.config.vision_feature_layer == -1
    has_class_token = is_plain and encoder == "internvit"
    strategy = "default" if has_class_token else "full"
    assert model.config.vision_feature_select_strategy == strategy
    image = Image.fromarray(SceneDataset(image_size=size).pixels(0))
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[processor.image_token_id] * num_tokens]
    received = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: received.append(args[0])
    )
    with torch.no_grad():
        model(**inputs)
        is_quantized = features == "quantized"
        compute = tokenizer.quantized_features if is_quantized else tokenizer.encode_features
        expected = compute(image_to_tensor(image)[None])
    assert received[0].shape == (1, num_tokens, 32)
    torch.testing.assert_close(received[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", ["siglip", "unitok"])
def test_codes_of_the_tower_are_those_of_fp32(encoder, make_tokenizer, llm_folder, tmp_path):
    tokenizer = make_tokenizer(encoder)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model, processor = build_llava(tmp_path / "tokenizer", llm_folder, features="quantized")
    # Nothing of the tokenizer but what its features need, and not for an optimizer or DeepSpeed.
    names = {name.partition(".")[0] for name in model.model.vision_tower.state_dict()}
    assert names == {"encoder", "in_proj", "quantizer", "out_proj", "feature_mean", "feature_std"}
    parameters = {name for name, _ in model.model.vision_tower.named_parameters()}
    assert {name.partition(".")[0] for name in parameters} == {"encoder"}
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    half = Chat.from_pretrained(tmp_path / "model", dtype="bfloat16").model
    tower = half.train().model.vision_tower
    assert not tower.training
    exact = VQRAEModel.from_pretrained(
        tmp_path / "tokenizer", dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        received = tower(tokenizer.normalize(images)).hidden_states[-1]
        torch.testing.assert_close(received, exact.quantized_features(images).bfloat16())
    with pytest.raises(ValueError, match=r"expected torch\.float32: codes need it"):
        half.to(torch.bfloat16).model.vision_tower(images)


def test_plain_transformers_names_the_tower_that_it_lacks(
    tokenizer_folder, llm_folder, tmp_path, monkeypatch
):
    for part in build_llava(tokenizer_folder, llm_folder, features="quantized"):
        part.save_pretrained(tmp_path)
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "vqrae_features")
    with pytest.raises(ValueError, match="vqrae_features"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_folders_without_their_quantizer_are_refused(fresh_llava, tokenizer_folder, tmp_path):
    model, _ = fresh_llava
    model.config.vqrae_features = "quantized"  # as earlier versions wrote
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"by an earlier version.*train it again"):
        Chat.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"by an earlier version.*train it again"):
        require_tokenizer(model.config, tokenizer_folder, tmp_path)


def test_the_border_has_its_colour(tokenizer_folder, llm_folder, tmp_path):
    options = {"aspect_ratio": "pad", "border_color": (122, 116, 104)}
    with pytest.raises(ValueError, match="plain LLaVA folder, which pads in the mean"):
        load_processor(tokenizer_folder, llm_folder, **options)
    load_processor(tokenizer_folder, llm_folder, features="quantized", **options).save_pretrained(
        tmp_path
    )
    processor = AutoProcessor.from_pretrained(tmp_path).image_processor
    pixel_values = processor(Image.new("RGB", (64, 32)), return_tensors="pt").pixel_values
    corner = (pixel_values[0, :, 0, 0] * 0.5 + 0.5) * 255
    assert corner.round().tolist() == [122, 116, 104]


def test_attention_reaches_every_part(tokenizer_folder, llm_folder):
    for choice in ("eager", "sdpa"):
        model, _ = build_llava(tokenizer_folder, llm_folder, choice)
        for part in (model.model.vision_tower.encoder, model.model.language_model):
            assert part.layers[0].self_attn.config._attn_implementation == choice


def test_foreign_features_are_refused(tokenizer_folder, llm_folder, tmp_path):
    encoder = VQRAEConfig.from_pretrained(tokenizer_folder).encoder_config
    sizes = {"codebook_size": 64, "codebook_dim": 32, "feature_tap": "last_hidden_state"}
    VQRAEModel(VQRAEConfig(encoder_config=encoder, **sizes)).save_pretrained(tmp_path)
    message = r"feature_tap 'last_hidden_state', expected 'hidden_states\[-1\]'"
    with pytest.raises(ValueError, match=message):
        build_llava(tmp_path, llm_folder)


def test_features_of_other_weights_are_refused(tokenizer_folder, llm_folder):
    model, processor = build_llava(tokenizer_folder, llm_folder)
    tokenizer = VQRAEModel.from_pretrained(tokenizer_folder).eval()
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(1.1)
    with pytest.raises(ValueError, match="differs from encode_features"):
        check_features(model, processor, tokenizer)


def test_plain_transformers_reads_the_folder(tokenizer_folder, llm_folder, tmp_path):
    folder, image = tmp_path / "model", tmp_path / "wide.png"
    for part in build_llava(tokenizer_folder, llm_folder):
        part.save_pretrained(folder)
    Image.fromarray(SceneDataset().pixels(0)).resize((120, 80)).save(image)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(folder)
    for part in (model, processor, processor.image_processor, processor.tokenizer):
        assert type(part).__module__.startswith("transformers.")
    content = [{"type": "image", "url": str(image)}, {"type": "text", "text": "what ?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 64
    model.generate(**inputs, max_new_tokens=2)
    config = json.loads((folder / "config.json").read_text())
    assert config["vqrae_tokenizer_fingerprint"] == weights_fingerprint(tokenizer_folder)
    assert config["model_type"] == "llava"
    # Names on disk, which other readers of the format rely on.
    names = load_file(folder / "model.safetensors")
    for name in (
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
    ):
        assert name in names, sorted(names)[:5]


def test_another_tokenizer_is_refused(tokenizer_folder, llm_folder, make_tokenizer, tmp_path):
    make_tokenizer("internvit").save_pretrained(tmp_path)
    model, _ = build_llava(tokenizer_folder, llm_folder)
    require_tokenizer(model.config, tokenizer_folder, "model")
    with pytest.raises(ValueError, match="was made with tokenizer"):
        require_tokenizer(model.config, tmp_path, "model")


def test_image_token_and_padding_are_added_when_missing(vicuna_like, llm_folder):
    model = AutoModelForCausalLM.from_pretrained(llm_folder)
    model.resize_token_embeddings(len(vicuna_like))
    config = VQRAEConfig(encoder_config={"model_type": "siglip_vision_model"})
    build_processor(config, vicuna_like, "vicuna_v1")
    add_rows(model, len(vicuna_like))
    token = vicuna_like.convert_tokens_to_ids("<image>")
    assert vicuna_like.encode("<image>", add_special_tokens=False) == [token]
    assert token < model.get_input_embeddings().num_embeddings
    assert vicuna_like.pad_token == "<unk>"
    assert len(vicuna_like) == token + 1


def test_template_without_its_end_token_is_refused(
    tokenizer_folder, vicuna_like, llm_folder, tmp_path
):
    AutoModelForCausalLM.from_pretrained(llm_folder).save_pretrained(tmp_path)
    vicuna_like.save_pretrained(tmp_path)
    assert "<|im_end|>" not in AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    with pytest.raises(ValueError, match=r"chat_template: got 'chatml', whose end token"):
        build_llava(tokenizer_folder, tmp_path)


def test_weights_are_named_as_vllm_loads_them(tokenizer_folder, llm_folder, tmp_path):
    model, _ = build_llava(tokenizer_folder, llm_folder)
    model.save_pretrained(tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    golden = json.loads((Path(__file__).parent / "golden" / "vllm_keys.json").read_text())
    language_model = {name for name in weights if name.startswith("language_model.")}
    assert weights.keys() - language_model == set(golden["keys"])
    assert (
        "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj.weight" in golden["loaded"]
    )
    assert "no module or parameter named 'vision_tower.embeddings'" in golden["refused"]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "again"
    )
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_folders_with_the_names_of_before_are_read_and_written_anew(
    tokenizer_folder, llm_folder, tmp_path
):
    model, processor = build_llava(tokenizer_folder, llm_folder)
    folder = tmp_path / "pretrain" / "model"
    for part in (model, processor):
        part.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    before = {name.replace("vision_model.", ""): value for name, value in weights.items()}
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    assert before.keys() != weights.keys()
    given = [f"tokenizer={tokenizer_folder}", f"llm={llm_folder}", f"output_dir={tmp_path}"]
    read, _ = load_or_build(
        load_config(TrainConfig, shipped_config("vqrae.understanding", "tiny"), given), "sft"
    )
    assert all(
        torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items()
    )
    read.save_pretrained(tmp_path / "written")
    assert load_file(tmp_path / "written" / "model.safetensors").keys() == weights.keys()


def test_a_language_model_that_lacks_weights_is_refused(tokenizer_folder, llm_folder, tmp_path):
    folder = shutil.copytree(llm_folder, tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"llm lacks weights of .*: model\.norm\.weight"):
        build_llava(tokenizer_folder, folder)
