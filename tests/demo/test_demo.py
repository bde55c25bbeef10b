"""What the page shows: codes and their neighbours, edits, images code by code, answers."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.demo import codes as coding
from vqrae.demo import figures, talk
from vqrae.demo.models import open_models
from vqrae.demo.server import MAX_BODY, Bounded
from vqrae.generation.generator import Generator
from vqrae.scripts import cli
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.chat import Chat


@pytest.fixture(params=["tokenizer_folder", "unitok_folder"])
def model(request: pytest.FixtureRequest) -> VQRAEModel:
    """A tokenizer with one codebook, and one with four."""
    return VQRAEModel.from_pretrained(request.getfixturevalue(request.param)).eval()


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return Image.fromarray(SceneDataset("validation").pixels(3))


def test_an_image_is_read_as_the_tokenizer_reads_it(model: VQRAEModel, scene: Image.Image) -> None:
    found = coding.read_image(model, scene.resize((100, 80)))
    with torch.inference_mode():
        output = model(found.original[None])
    assert torch.equal(found.codes, output.codes[0])
    assert torch.equal(found.reconstruction, output.reconstruction[0])
    error = (found.original - found.reconstruction).square().mean()
    assert found.psnr == pytest.approx(-10 * error.log10().item(), abs=1e-3)
    assert figures.reading(found, 5).count("data-patch") == len(found.codes)


def test_neighbors_are_the_nearest_codes_decoded_in_place(
    model: VQRAEModel, scene: Image.Image
) -> None:
    found = coding.read_image(model, scene)
    number, grid = model.config.num_codebooks, model.config.grid_size
    patch, size = grid + 1, 3 * 64 // grid
    near = coding.neighbors(model, found.codes, patch)
    tables = model.code_vectors().view(number, model.config.codebook_size, -1)
    own = coding.codes_at(found.codes, patch)
    for codebook in range(number):
        each = [one for one in near if one.codebook == codebook]
        assert each[0].code == own[codebook]
        assert torch.allclose(each[0].image, found.reconstruction[:, :size, :size], atol=1e-5)
        expected = (tables[codebook] - tables[codebook, own[codebook]]).norm(dim=-1).sort().values
        distances = torch.tensor([one.distance for one in each])
        assert torch.allclose(distances, expected[: len(each)], atol=1e-5)
        brush = [*own]
        brush[codebook] = each[-1].code
        image = coding.decode(model, coding.paint(found.codes, [patch], brush))
        assert torch.allclose(each[-1].image, image[:, :size, :size], atol=1e-5)
    assert all(str(code) in figures.neighborhood(near, patch, grid) for code in own)
    with pytest.raises(ValueError, match="got patch 64, expected 0 to "):
        coding.neighbors(model, found.codes, 64)


def test_codes_are_painted_and_exchanged(model: VQRAEModel, scene: Image.Image) -> None:
    codes = coding.read_image(model, scene).codes
    before = codes.clone()
    brush = coding.read_brush(", ".join(["3"] * model.config.num_codebooks), model)
    painted = coding.paint(codes, [0, 5], brush)
    assert coding.codes_at(painted, 0) == coding.codes_at(painted, 5) == brush
    assert torch.equal(painted[6:], codes[6:])
    swapped = coding.swap(codes, 1, 14)
    assert torch.equal(swapped[1], codes[14])
    assert torch.equal(coding.swap(swapped, 14, 1), codes)
    assert torch.equal(codes, before)
    for text in ("", "x", "-1", "64", "1.5", "9" * 5000, "1 " * 9):
        with pytest.raises(ValueError, match=r"expected (a code|4 codes) from 0 to 63"):
            coding.read_brush(text, model)
    for patches in (["0"], [None], [-1]):
        with pytest.raises(ValueError, match="expected 0 to "):
            coding.paint(codes, patches, brush)


def test_an_image_appears_code_by_code(generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "FRAME_SECONDS", 0.0)
    maker = Generator.from_pretrained(generator)
    request: dict[str, Any] = {"seeds": [3, 4], "sampling": maker.sampling}
    frames = list(coding.generate(maker, "a red circle", **request, seconds=100))
    expected = maker.images(["a red circle"] * 2, seeds=[3, 4])
    assert torch.equal(frames[-1].images, expected)
    assert [frame.done for frame in frames] == sorted({frame.done for frame in frames})
    first = frames[0]
    assert first.done < first.total == frames[-1].done
    assert bool((first.images[..., -8:, -8:] == torch.tensor(coding.BLANK)).all())
    with pytest.raises(ValueError, match=r"stopped after 0 s with 1 of 64 codes"):
        list(coding.generate(maker, "a red circle", **request, seconds=0))


def test_codes_of_several_codebooks_appear_too(unitok_folder: Path, scene: Image.Image) -> None:
    model = VQRAEModel.from_pretrained(unitok_folder).eval()
    found = coding.read_image(model, scene)
    part = coding.decode_part(model, [code[None] for code in found.codes], len(found.codes))
    assert torch.equal(part[0], found.reconstruction)


def test_an_answer_grows_to_what_the_chat_answers(llava: Path, scene: Image.Image) -> None:
    chat = Chat.from_pretrained(llava, device="cpu", max_new_tokens=12)
    session = chat.session()
    texts = list(talk.answer(session, "what is it ?", [scene, scene], seconds=100))
    assert texts[-1] == chat.answer([([scene, scene], "what is it ?")])[0]
    assert len(texts) > 3
    assert texts[0] in texts[-2]
    assert len(session.messages) == 2
    for refused in ("word " * 5000, "<image>"):
        with pytest.raises(ValueError, match="expected"):
            list(talk.answer(session, refused, [], seconds=100))
    assert len(session.messages) == 2
    chat.max_new_tokens = 400
    started = time.monotonic()
    cut = list(talk.answer(chat.session(), "what is it ?", [], seconds=0.01))
    assert cut[-1].endswith(talk.ENDING)
    assert time.monotonic() - started < 10


def test_it_shows_what_is_there_and_says_what_makes_the_rest(
    tokenizer_folder: Path, llava: Path, generator: Path, llm_folder: Path, tmp_path: Path
) -> None:
    for name, folder in (("tokenizer", tokenizer_folder), ("llm", llm_folder)):
        shutil.copytree(folder, tmp_path / "runs" / name / "model")
    (tmp_path / "runs" / "codes").mkdir()
    models = open_models([tmp_path / "runs"])
    assert models.tokenizer is not None
    assert models.missing("tokenizer") == ""
    expected = "there is no understanding model here; `bash scripts/train_llava.sh` makes one"
    assert models.missing("chat") == expected
    both = open_models([llava, generator])
    assert both.chat is not None
    assert both.generator is not None
    assert both.tokenizer is both.generator.tokenizer
    damaged = tmp_path / "damaged"
    shutil.copytree(generator, damaged)
    (damaged / "model.safetensors").write_bytes(b"no")
    models = open_models([tmp_path / "runs", damaged])
    assert "the weights of damaged are damaged" in models.missing("generator")
    assert str(tmp_path) not in models.missing("generator")
    for nothing in (llm_folder, tmp_path / "runs" / "codes", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"scripts/quickstart.sh makes all"):
            open_models([nothing])


def test_without_a_run_it_says_at_once_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 2
    assert "bash scripts/quickstart.sh makes it; or give a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/", (b"content-length", b"%d" % (MAX_BODY + 1)), 413),
        ("/", (b"transfer-encoding", b"chunked"), 411),
        ("/gradio_api/upload", (b"content-length", b"5"), 404),
        ("/gradio_api/queue/join", (b"content-length", b"5"), None),
    ],
)
def test_long_requests_and_files_are_refused(path: str, header: tuple, status: int | None) -> None:
    response = Bounded.refusal({"type": "http", "path": path, "headers": [header]})
    assert (response and response.status_code) == status
