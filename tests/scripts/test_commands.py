"""The `vqrae` command on images of every kind, with small random models."""

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqrae.common.files import weights_fingerprint
from vqrae.scripts.cli import main
from vqrae.tokenizer.modeling import VQRAEModel

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vqrae(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command, `model=` and other options as keywords; its exit code, stdout and stderr."""

    def run(*words: str | Path, **options: str | Path) -> tuple[int, str, str]:
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        code = main([*map(str, words), *flags])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Palette, RGBA, 16-bit grey, rotated, 1 px wide, and two that share a stem."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    noise.convert("P").save(folder / "palette.gif")
    noise.convert("RGBA").save(folder / "alpha.png")
    grey = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 20
    Image.fromarray(grey).save(folder / "grey16.png")
    rotated = Image.Exif()
    rotated[274] = 6
    noise.save(folder / "rotated.jpg", exif=rotated)
    noise.resize((1, 500)).save(folder / "sub" / "thin.webp")
    noise.save(folder / "same.png")
    noise.save(folder / "same.jpg")
    return folder


def test_help_answers_at_once() -> None:
    code = "import sys; from vqrae.scripts.cli import main; main(['--help'])"
    code += "; assert 'torch' not in sys.modules"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "reconstruct" in result.stdout
    assert time.perf_counter() - start < 2


# ---- images


def test_reconstruct_takes_every_kind_of_image_and_counts_broken_ones(
    images: Path, tokenizer_folder: Path, tmp_path: Path, vqrae: Run
) -> None:
    out = tmp_path / "out"
    assert vqrae("reconstruct", model=tokenizer_folder, images=images, out=out)[0] == 0
    report = json.loads((out / "metrics.json").read_text())
    assert len(report["psnr"]) == 7
    assert report["tokenizer"] == weights_fingerprint(tokenizer_folder)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    names = {"palette.png", "alpha.png", "grey16.png", "rotated.png", "sub/thin.png"}
    assert written == names | {"same.png.png", "same.jpg.png", "grid.png"}
    assert Image.open(out / "rotated.png").size == (2 * 64 + 12, 64 + 8)
    broken, again = images / "alpha.png", tmp_path / "again"
    broken.write_bytes(broken.read_bytes()[:100])
    code, output, errors = vqrae("reconstruct", model=tokenizer_folder, images=images, out=again)
    assert code == 0
    assert "skipped" in errors
    assert "alpha.png" in errors
    assert "6 images, 1 broken and skipped" in output
    assert json.loads((again / "metrics.json").read_text())["broken"] == ["alpha.png"]


@pytest.mark.parametrize("several", [(), (4,)])
def test_encode_then_decode_equals_the_model(
    several: tuple[int, ...],
    images: Path,
    make_tokenizer: Callable[..., VQRAEModel],
    tokenizer_folder: Path,
    tmp_path: Path,
    vqrae: Run,
) -> None:
    codes, out, copies = tmp_path / "codes.npz", tmp_path / "decoded", tmp_path / "copies"
    model = {"model": tokenizer_folder}
    if several:
        model = {"model": tmp_path / "model"}
        make_tokenizer(quantizer="mcq", num_codebooks=4).save_pretrained(model["model"])
    assert vqrae("encode", images=images, out=codes, **model)[0] == 0
    stored = np.load(codes)
    assert stored["codes"].shape == (7, 64, *several)
    assert stored["codes"].dtype == np.uint16
    assert vqrae("decode", codes=codes, out=out, **model)[0] == 0
    assert len(list(out.rglob("*.png"))) == 7
    vqrae("reconstruct", images=images / "palette.gif", out=copies, **model)
    side_by_side = np.array(Image.open(copies / "palette.png"))[4:68, -68:-4]
    decoded = np.array(Image.open(out / "palette.png")).astype(int)
    assert np.abs(side_by_side - decoded).max() <= 1


def test_decode_refuses_other_codes(tokenizer_folder: Path, tmp_path: Path, vqrae: Run) -> None:
    good = {
        "codes": np.zeros((1, 64), np.uint16),
        "names": np.array(["a.png"]),
        "tokenizer": "0" * 64,
        "codebook_size": 64,
    }
    np.savez(tmp_path / "other.npz", **good)
    np.savez(tmp_path / "outside.npz", **{**good, "names": np.array(["../../a.png"])})
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:200])
    for name, message in (
        ("other", "made with tokenizer 0000000000000000"),
        ("outside", "cannot be trusted"),
        ("damaged", "is damaged"),
        ("nowhere", "does not exist"),
    ):
        options = {"model": tokenizer_folder, "codes": tmp_path / f"{name}.npz", "out": tmp_path}
        code, _, errors = vqrae("decode", **options)
        assert code == 2
        assert message in errors


def test_weights_that_are_cut_short_or_of_another_size_are_named(
    images: Path, tokenizer_folder: Path, tmp_path: Path, vqrae: Run
) -> None:
    cut, other = (shutil.copytree(tokenizer_folder, tmp_path / name) for name in ("cut", "other"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "codebook_size": 32}))
    for model, message in ((cut, "are damaged"), (other, "has weights of other shapes")):
        code, _, errors = vqrae("encode", model=model, images=images, out=tmp_path / "codes.npz")
        assert code == 2
        assert str(model) in errors
        assert message in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reconstruct", "--images", "nowhere"], "nowhere does not exist"),
        (["encode", "--images", "."], "ends in .npz"),
        (["reconstruct", "--images", ".", "--device", "cuda:7"], "sees 0 GPUs"),
        (["reconstruct", "--images", ".", "--device", "gpu"], "device gpu cannot be used here"),
        (["reconstruct", "--imgs", "."], "Did you mean 'images'"),
        (["generate", "--prompt", "a circle"], "is a 'vqrae' model, expected a generator"),
        (["generate"], "--prompts-file"),
    ],
)
def test_mistakes_get_one_line(
    words: list[str], message: str, tokenizer_folder: Path, tmp_path: Path, vqrae: Run
) -> None:
    code, _, errors = vqrae(*words, model=tokenizer_folder, out=tmp_path / "out")
    assert code == 2
    assert errors.startswith("vqrae: ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check-data", "scenes", "--limit", "0"], "limit: got 0"),
        (["check-data", "hf:"], "hf:: expected hf:NAME"),
        (["check-data", "scenes", "max_length=3"], "give --config"),
        (["plan", "siglip2_256", "--gpu-memory", ".nan"], "gpu_memory: got nan"),
        (["plan", "siglip2_256", "stage1.end_lr=[1"], "is not valid YAML"),
        (["reconstrct"], "Did you mean 'reconstruct'"),
        (["chat", "--model", "m", "--question", " "], "question: got an empty one"),
        (["chat", "--model", "m", "--questions", "q.jsonl"], "belong together"),
        (["inspect-batch", "--config", "tiny", "--samples", "0"], "samples: got 0"),
    ],
)
def test_mistakes_without_a_model_get_one_line(words: list[str], message: str, vqrae: Run) -> None:
    code, _, errors = vqrae(*words)
    assert code == 2
    [line] = errors.splitlines()
    assert message in line


# ---- generate


def test_generate_writes_images_that_can_be_made_again(
    generator: Path, tmp_path: Path, vqrae: Run
) -> None:
    (tmp_path / "prompts.txt").write_text("a photo of a star\n\n")
    call = ["generate", "--prompt", "a photo of a circle", "--top-k", "5"]
    out, again = tmp_path / "out", tmp_path / "again"
    more = {"num_images": "2", "seed": "3", "prompts_file": tmp_path / "prompts.txt"}
    assert vqrae(*call, model=generator, out=out, **more)[0] == 0
    names = ["0000-3", "0000-4", "0001-3", "0001-4"]
    assert sorted(path.stem for path in out.glob("*.json")) == names
    assert sorted(path.stem for path in out.glob("*.png")) == [*names, "grid"]
    record = json.loads((out / "0000-4.json").read_text())
    assert (record["prompt"], record["seed"]) == ("a photo of a circle", 4)
    assert record["sampling"]["top_k"] == 5
    assert record["sampling"]["guidance_scale"] == 2  # as the generator recommends
    assert vqrae(*call, model=generator, out=again, num_images="1", seed="4")[0] == 0
    pixels = [np.array(Image.open(folder / "0000-4.png")).astype(int) for folder in (out, again)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_generate_makes_what_is_missing(generator: Path, tmp_path: Path, vqrae: Run) -> None:
    call = {"model": generator, "prompt": "a photo of a circle", "out": tmp_path}
    quick = {"batch_size": "1", "guidance_schedule": "linear", "sampling.guidance_end": "0.5"}
    assert "generate 2/2" in vqrae("generate", num_images="2", **call, **quick)[2]
    first, second, third = (tmp_path / f"0000-{seed}.png" for seed in range(3))
    written = first.stat().st_mtime_ns
    second.unlink()
    _, output, errors = vqrae("generate", num_images="3", **call, **quick)
    assert "3 images" in output
    assert "1 of them from before" in output
    assert "2/2" in errors
    assert first.stat().st_mtime_ns == written
    assert second.exists()
    assert third.exists()
    vqrae("generate", num_images="1", **call)  # with other settings
    assert first.stat().st_mtime_ns > written


def test_prompts_as_json_lines_and_what_prompts_lose(
    generator: Path, tmp_path: Path, vqrae: Run
) -> None:
    file, out = tmp_path / "metadata.jsonl", tmp_path / "out"
    zebra = '{"tag": "single_object", "prompt": "a photo of a\\u2028zebra"}'
    file.write_text(f"{zebra}\n{{caption}} of a circle\n", encoding="utf-8-sig")
    call = {"model": generator, "num_images": "1", "out": out}
    code, _, errors = vqrae("generate", prompts_file=file, **call)
    assert code == 0
    prompts = [json.loads((out / f"000{i}-0.json").read_text())["prompt"] for i in range(2)]
    assert prompts == ["a photo of a\u2028zebra", "{caption} of a circle"]
    assert "1 words have no id and are read as unknown: zebra" in errors
    errors = vqrae("generate", prompt="star " * 200, **call)[2]
    assert "its end is cut: 200 tokens, of which 32 are read" in errors
    file.write_text('{"caption": "a circle"}')
    errors = vqrae("generate", prompts_file=file, **call)[2]
    assert "metadata.jsonl, line 1: got JSON without a text under the key prompt" in errors


# ---- chat


def test_chat_answers_once_and_in_turns(
    llava: Path, images: Path, monkeypatch: pytest.MonkeyPatch, vqrae: Run
) -> None:
    call = {"model": llava, "max_new_tokens": "4"}
    two = ["--image", images / "palette.gif", "--image", images / "alpha.png"]
    code, output, _ = vqrae("chat", *two, question="what is the red thing ?", **call)
    assert (code, output.count("\n")) == (0, 1)
    nowhere, same = images / "nowhere.png", images / "same.png"
    typed = f"what is it ?\n/image {nowhere}\n/image {same}\nand this ?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code, output, errors = vqrae("chat", image=images / "palette.gif", **call)
    assert code == 0
    assert output.count("> ") == 5
    assert "no such file" in errors


def test_chat_about_a_broken_image_or_with_another_model(
    llava: Path, generator: Path, tmp_path: Path, vqrae: Run
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    code, _, errors = vqrae("chat", model=llava, image=tmp_path / "a.png", question="what ?")
    assert code == 2
    assert "not a readable image" in errors
    errors = vqrae("chat", model=generator, question="what ?")[2]
    assert "is a 'qwen3' model, expected an understanding model" in errors


def test_chat_answers_a_file(llava: Path, images: Path, tmp_path: Path, vqrae: Run) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    lines = ['{"image": "palette.gif", "question": "what ?"}', '{"question": "how many ?"}']
    questions.write_text("\n".join(lines))
    call = {"model": llava, "max_new_tokens": "3", "questions": questions, "out": out}
    assert "2 answers are in" in vqrae("chat", image_folder=images, **call)[1]
    answered = [json.loads(line)["question"] for line in out.read_text().splitlines()]
    assert answered == ["what ?", "how many ?"]
    assert "2 answers (2 from before)" in vqrae("chat", image_folder=images, **call)[1]


# ---- data


def test_check_data_names_broken_samples(images: Path, vqrae: Run) -> None:
    assert vqrae("check-data", images)[0] == 0
    (images / "same.png").write_bytes(b"")
    code, output, _ = vqrae("check-data", images)
    assert code == 1
    assert "same.png" in output
    assert "7 of 7 samples read, 1 problem" in output
    assert vqrae("check-data", "scenes", limit="3")[0] == 0


@pytest.fixture
def run(tokenizer_folder: Path, llm_folder: Path, tmp_path: Path) -> list[str]:
    """A LLaVA run on a file with a short and a long record, as options."""
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    question = {"from": "human", "value": "<image>\nwhat color is the star ?"}
    turns = [question, {"from": "gpt", "value": "red"}]
    long = [{"from": "human", "value": "how many ?"}, {"from": "gpt", "value": "two " * 300}]
    records = [
        {"id": "short", "image": "a.png", "conversations": turns},
        {"id": "long", "conversations": long},
    ]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(records))
    words = [f"tokenizer={tokenizer_folder}", f"llm={llm_folder}", f"data={file}"]
    return ["--config", "tiny", *words]


@pytest.mark.parametrize("batching", ["random", "packed", "separate"])
def test_a_batch_is_printed_with_its_trained_tokens(
    batching: str, run: list[str], vqrae: Run
) -> None:
    code, printed, _ = vqrae("inspect-batch", *run, f"batching={batching}", "max_length=512")
    assert code == 0
    assert "<image x 64>" in printed
    assert "what color is the star" in printed
    assert "[[red<|im_end|>]]" in printed.replace(" <|im_end|>", "<|im_end|>")
    assert "[[two two" in printed
    assert "1 images" in printed
    assert printed.count("--- row") == 2


def test_pretraining_trains_the_caption(run: list[str], vqrae: Run) -> None:
    words = ["data=scenes", "--stage", "pretrain", "--samples", "1"]
    assert "<image x 64>[[a photo of" in vqrae("inspect-batch", *run, *words)[1]


def test_check_data_finds_what_is_too_long(run: list[str], tmp_path: Path, vqrae: Run) -> None:
    call = ["check-data", tmp_path / "chat.json", *run]
    code, printed, _ = vqrae(*call)
    assert code == 0
    assert "max_length" not in printed
    code, printed, _ = vqrae(*call, "max_length=200")
    assert code == 0
    assert "note: 1 conversations longer than max_length 200" in printed
    assert "record long" in printed
    code, printed, _ = vqrae(*call, "max_length=64")
    assert code == 1
    assert "problem: 1 conversations with an image beyond max_length 64" in printed
