"""The `vqrae` command on images of every kind, with small random models."""

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM

from vqrae.common.files import weights_fingerprint
from vqrae.data.scenes.language import vocabulary_texts
from vqrae.data.scenes.sprites import load_sprites
from vqrae.data.word_tokenizer import build_word_tokenizer
from vqrae.generation.modeling import build_generator
from vqrae.generation.vocabulary import VisualVocabulary
from vqrae.scripts.cli import main
from vqrae.understanding.build import build_llava


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A palette image, RGBA, 16-bit grey, a rotated photograph, one 1 px wide, two that share a stem."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    noise.convert("P").save(folder / "palette.gif")
    noise.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 20).save(
        folder / "grey16.png"
    )
    rotated = Image.Exif()
    rotated[274] = 6
    noise.save(folder / "rotated.jpg", exif=rotated)
    noise.resize((1, 500)).save(folder / "sub" / "thin.webp")
    noise.save(folder / "same.png")
    noise.save(folder / "same.jpg")
    return folder


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    code = "import sys; from vqrae.scripts.cli import main; main(['--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "reconstruct" in result.stdout
    assert (
        time.perf_counter() - start < 1.0
    )  # 0.06 s on an idle machine; importing torch takes seconds


def test_reconstruct_takes_every_kind_of_image(
    images: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert (
        main(
            [
                "reconstruct",
                "--model",
                str(tokenizer_folder),
                "--images",
                str(images),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    report = json.loads((out / "metrics.json").read_text())
    assert len(report["psnr"]) == 7
    assert report["tokenizer"] == weights_fingerprint(tokenizer_folder)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    names = {
        "palette.png",
        "alpha.png",
        "grey16.png",
        "rotated.png",
        "sub/thin.png",
        "same.png.png",
        "same.jpg.png",
        "grid.png",
    }
    assert written == names
    assert Image.open(out / "rotated.png").size == (2 * 64 + 12, 64 + 8)


def test_broken_images_are_named_skipped_and_counted(
    images: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = images / "alpha.png"
    broken.write_bytes(broken.read_bytes()[:100])
    out = tmp_path / "out"
    assert (
        main(
            [
                "reconstruct",
                "--model",
                str(tokenizer_folder),
                "--images",
                str(images),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    output = capsys.readouterr()
    assert "skipped" in output.err
    assert "alpha.png" in output.err
    assert "6 images, 1 broken and skipped" in output.out
    assert json.loads((out / "metrics.json").read_text())["broken"] == ["alpha.png"]


def test_encode_then_decode_equals_the_model(
    images: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    codes, out = tmp_path / "codes.npz", tmp_path / "decoded"
    model = ["--model", str(tokenizer_folder)]
    assert main(["encode", *model, "--images", str(images), "--out", str(codes)]) == 0
    stored = np.load(codes)
    assert stored["codes"].shape == (7, 64)
    assert stored["codes"].dtype == np.uint16
    assert main(["decode", *model, "--codes", str(codes), "--out", str(out)]) == 0
    assert len(list(out.rglob("*.png"))) == 7
    reconstructed = tmp_path / "reconstructed"
    main(
        [
            "reconstruct",
            *model,
            "--images",
            str(images / "palette.gif"),
            "--out",
            str(reconstructed),
        ]
    )
    side_by_side = np.array(Image.open(reconstructed / "palette.png"))[4:68, -68:-4]
    decoded = np.array(Image.open(out / "palette.png")).astype(int)
    assert np.abs(side_by_side - decoded).max() <= 1


def test_decode_refuses_other_codes(
    images: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = ["--model", str(tokenizer_folder), "--out", str(tmp_path / "decoded")]
    good = {
        "codes": np.zeros((1, 64), np.uint16),
        "names": np.array(["a.png"]),
        "tokenizer": "0" * 64,
        "codebook_size": 64,
    }
    np.savez(tmp_path / "other.npz", **good)
    assert main(["decode", "--codes", str(tmp_path / "other.npz"), *model]) == 2
    assert "made with tokenizer 0000000000000000" in capsys.readouterr().err
    np.savez(tmp_path / "outside.npz", **{**good, "names": np.array(["../../a.png"])})
    assert main(["decode", "--codes", str(tmp_path / "outside.npz"), *model]) == 2
    assert "cannot be trusted" in capsys.readouterr().err
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:200])
    assert main(["decode", "--codes", str(tmp_path / "damaged.npz"), *model]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check-data", "scenes", "--limit", "0"], "got --limit 0"),
        (["check-data", "hf:"], "hf:: got no name"),
        (["plan", "siglip2_256", "--gpu-memory", "nan"], "--gpu-memory nan"),
        (["plan", "siglip2_256", "stage1.end_lr=[1"], "is not valid YAML"),
    ],
)
def test_mistakes_without_a_model_get_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_tokenizer_whose_weights_are_cut_short_or_of_another_size_is_named(
    images: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["encode", "--images", str(images), "--out", str(tmp_path / "codes.npz"), "--model"]
    cut, other = (shutil.copytree(tokenizer_folder, tmp_path / name) for name in ("cut", "other"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    assert main([*call, str(cut)]) == 2
    assert f"the weights of {cut} are damaged" in capsys.readouterr().err
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "codebook_size": 32}))
    assert main([*call, str(other)]) == 2
    assert f"{other} has other shapes of weights of a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:7", "sees 0 GPUs"),
        ("gpu", "device gpu cannot be used here: "),
        ("xpu", "device xpu cannot be used here: "),
    ],
)
def test_a_device_that_is_not_there_is_named(
    device: str,
    message: str,
    images: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = [
        "encode",
        "--model",
        str(tokenizer_folder),
        "--images",
        str(images),
        "--out",
        str(tmp_path / "codes.npz"),
    ]
    assert main([*call, "--device", device]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("vqrae: device ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reconstruct", "--images", "nowhere"], "nowhere does not exist"),
        (["encode", "--images", "."], "ends in .npz"),
        (["decode", "--codes", "nowhere.npz"], "nowhere.npz does not exist"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str],
    message: str,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments, "--model", str(tokenizer_folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vqrae: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_model_of_another_kind_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    call = ["reconstruct", "--images", str(images), "--out", str(tmp_path / "out"), "--model"]
    assert main([*call, str(tmp_path)]) == 2
    assert main([*call, str(tmp_path / "nowhere")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "is a 'llava' model, expected a tokenizer" in errors[0]
    assert "does not exist" in errors[1]


# ---- language


@pytest.fixture(scope="module")
def generator_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vocabulary = VisualVocabulary(offset=128, codebook_size=64, num_codes=64)
    torch.manual_seed(0)
    model = build_generator(
        vocabulary, llm_config={**sizes, "num_key_value_heads": 2, "head_dim": 16}
    )
    model.config.prompt_template, model.config.max_caption_tokens, model.config.caption_dropout = (
        "{caption}",
        32,
        0.1,
    )
    model.config.sampling = {"guidance_scale": 2.0}
    model.config.vqrae_tokenizer = str(tokenizer_folder)
    model.config.vqrae_tokenizer_fingerprint = weights_fingerprint(tokenizer_folder)
    model.save_pretrained(folder)
    build_word_tokenizer(vocabulary_texts(load_sprites("shapes").names)).save_pretrained(folder)
    return folder


def test_generate_writes_images_that_can_be_drawn_again(
    generator_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a photo of a star\n\n")
    call = [
        "generate",
        "--model",
        str(generator_folder),
        "--prompt",
        "a photo of a circle",
        "--top-k",
        "5",
    ]
    out = tmp_path / "out"
    options = ["--num-images", "2", "--seed", "3", "--prompts-file", str(tmp_path / "prompts.txt")]
    assert main([*call, *options, "--out", str(out)]) == 0
    names = ["0000-3", "0000-4", "0001-3", "0001-4"]
    assert sorted(path.stem for path in out.glob("*.json")) == names
    assert sorted(path.stem for path in out.glob("*.png")) == [*names, "grid"]
    record = json.loads((out / "0000-4.json").read_text())
    assert (record["prompt"], record["seed"], record["sampling"]["top_k"]) == (
        "a photo of a circle",
        4,
        5,
    )
    assert record["sampling"]["guidance_scale"] == 2  # as the generator recommends
    again = tmp_path / "again"
    assert main([*call, "--num-images", "1", "--seed", "4", "--out", str(again)]) == 0
    first, second = (
        np.array(Image.open(folder / "0000-4.png")).astype(int) for folder in (out, again)
    )
    assert np.abs(first - second).max() <= 1


def test_generate_draws_what_is_missing(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [
        "generate",
        "--model",
        str(generator_folder),
        "--prompt",
        "a photo of a circle",
        "--out",
        str(tmp_path),
    ]
    quick = [
        "--batch-size",
        "1",
        "--window",
        "2",
        "--guidance-schedule",
        "linear",
        "--guidance-end",
        "0.5",
    ]
    assert main([*call, *quick, "--num-images", "2"]) == 0
    assert "generate 2/2  0s left" in capsys.readouterr().err
    first, second, third = (tmp_path / f"0000-{seed}.png" for seed in range(3))
    written = first.stat().st_mtime_ns
    second.unlink()
    assert main([*call, *quick, "--num-images", "3"]) == 0
    output = capsys.readouterr()
    assert "3 images" in output.out
    assert "1 of them were there" in output.out
    assert "2/2" in output.err
    assert first.stat().st_mtime_ns == written
    assert second.exists()
    assert third.exists()
    assert main([*call, "--num-images", "1"]) == 0  # drawn another way
    assert first.stat().st_mtime_ns > written


def test_generate_without_a_prompt(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", str(generator_folder), "--out", str(tmp_path)]) == 2
    assert "--prompts-file" in capsys.readouterr().err


def test_prompts_as_json_lines_and_what_prompts_lose(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "metadata.jsonl", tmp_path / "out"
    lines = [
        '{"tag": "single_object", "prompt": "a photo of a\\u2028zebra"}',
        "{caption} of a circle",
        "",
    ]
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    call = [
        "generate",
        "--model",
        str(generator_folder),
        "--num-images",
        "1",
        "--out",
        str(out),
        "--prompts-file",
        str(file),
    ]
    assert main(call) == 0
    prompts = [json.loads((out / f"000{i}-0.json").read_text())["prompt"] for i in range(2)]
    assert prompts == ["a photo of a\u2028zebra", "{caption} of a circle"]
    assert "1 words have no id and are read as unknown: zebra" in capsys.readouterr().err
    assert main([*call[:-2], "--prompt", "star " * 200]) == 0
    assert "its end is cut: 200 tokens, of which 32 are read" in capsys.readouterr().err
    file.write_text('{"caption": "a circle"}')
    assert main(call) == 2
    assert (
        "metadata.jsonl, line 1: got JSON without a text under the key prompt"
        in capsys.readouterr().err
    )


def test_models_of_other_kinds_neither_draw_nor_chat(
    generator_folder: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = [
        [
            "generate",
            "--out",
            str(tmp_path),
            "--prompt",
            "a circle",
            "--model",
            str(tokenizer_folder),
        ],
        ["chat", "--question", "what ?", "--model", str(tokenizer_folder)],
        ["chat", "--question", "what ?", "--model", str(generator_folder)],
        ["chat", "--question", " ", "--model", str(generator_folder)],
    ]
    assert [main(call) for call in calls] == [2] * 4
    errors = capsys.readouterr().err.splitlines()
    assert "is a 'vqrae' model, expected a generator" in errors[0]
    assert "is a 'vqrae' model, expected an understanding model" in errors[1]
    assert "is a 'qwen3' model, expected an understanding model" in errors[2]
    assert "--question: got an empty one" in errors[3]
    assert len(errors) == 4


@pytest.fixture(scope="module")
def llava_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    words = build_word_tokenizer(vocabulary_texts(load_sprites("shapes").names))
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=128, num_key_value_heads=2, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder / "llm")
    words.save_pretrained(folder / "llm")
    model, processor = build_llava(tokenizer_folder, folder / "llm")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def test_chat_answers_once_and_in_turns(
    llava_folder: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = [
        "chat",
        "--model",
        str(llava_folder),
        "--max-new-tokens",
        "4",
        "--image",
        str(images / "palette.gif"),
    ]
    second = ["--image", str(images / "alpha.png")]
    assert main([*call, *second, "--question", "what is the red thing ?"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    typed = (
        f"what is it ?\n/image {images / 'nowhere.png'}\n/image {images / 'same.png'}\nand this ?\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(call) == 0
    output = capsys.readouterr()
    assert output.out.count("> ") == 5
    assert "no such file" in output.err


def test_chat_about_a_broken_image(
    llava_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    assert (
        main(
            [
                "chat",
                "--model",
                str(llava_folder),
                "--image",
                str(tmp_path / "a.png"),
                "--question",
                "what ?",
            ]
        )
        == 2
    )
    assert "not a readable image" in capsys.readouterr().err


def test_chat_answers_a_file(
    llava_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text(
        '{"image": "palette.gif", "question": "what ?"}\n{"question": "how many ?"}\n'
    )
    call = [
        "chat",
        "--model",
        str(llava_folder),
        "--max-new-tokens",
        "3",
        "--questions",
        str(questions),
    ]
    assert main([*call, "--out", str(out), "--image-folder", str(images)]) == 0
    assert "2 answers are in" in capsys.readouterr().out
    assert [json.loads(line)["question"] for line in out.read_text().splitlines()] == [
        "what ?",
        "how many ?",
    ]
    assert main([*call, "--out", str(out), "--image-folder", str(images)]) == 0
    assert "2 answers (2 from before)" in capsys.readouterr().out
    assert main(call) == 2
    assert "belong together" in capsys.readouterr().err


# ---- data


def test_check_data_names_broken_samples(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", str(images)]) == 0
    (images / "same.png").write_bytes(b"")
    assert main(["check-data", str(images)]) == 1
    output = capsys.readouterr().out
    assert "same.png" in output
    assert "7 of 7 samples read, 1 problem" in output
    assert main(["check-data", "scenes", "--limit", "3"]) == 0
