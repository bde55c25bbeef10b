import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqrae.common import run as runs
from vqrae.common.checkpoints import resolve_model
from vqrae.common.distributed import fit_batch
from vqrae.common.files import atomic_path, require_same_tokenizer, weights_fingerprint, write_json
from vqrae.common.images import image_grid, image_to_tensor, open_image, tensor_to_uint8
from vqrae.common.optim import warmup_cosine
from vqrae.common.run import format_duration, read_metrics
from vqrae.data.stream import StreamSampler


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of ")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_fingerprint_is_of_the_weights(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert len(weights_fingerprint(tokenizer_folder)) == 64
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder"):
        weights_fingerprint(tmp_path)
    with pytest.raises(
        ValueError, match="codes was made with tokenizer bbb, but the tokenizer in use is aaa"
    ):
        require_same_tokenizer("aaa", "bbb", "codes")


def test_rounding_not_truncation() -> None:
    assert tensor_to_uint8(torch.tensor([0.999, -1.0, 2.0, 0.5])).tolist() == [255, 0, 255, 128]
    levels = torch.arange(256) / 255
    assert torch.equal(tensor_to_uint8(levels), torch.arange(256, dtype=torch.uint8))


def test_images_of_any_mode(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((4, 6), 40000, dtype=np.uint16))
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    palette = Image.new("RGB", (6, 4), "red").convert("P")
    turned = Image.new("RGB", (6, 4), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    grey.save(tmp_path / "grey.png")
    clear.save(tmp_path / "clear.png")
    palette.save(tmp_path / "palette.png")
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (156, 156, 156)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 0, 0)
    assert open_image(tmp_path / "turned.jpg").size == (4, 6)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for name, message in (("broken.png", "not a readable image"), ("absent.png", "no such file")):
        with pytest.raises(ValueError, match=message):
            open_image(tmp_path / name)


def test_grid_is_as_large_as_its_parts() -> None:
    image = image_to_tensor(Image.new("RGB", (8, 8), "red"))
    grid = image_grid([[image, image], [image]], scale=2, gap=4)
    assert grid.size == (2 * 20 + 4, 2 * 20 + 4)
    assert grid.getpixel((5, 5)) == (255, 0, 0)
    assert grid.getpixel((30, 30)) == (255, 255, 255)


def test_a_long_label_costs_a_bounded_margin() -> None:
    image = image_to_tensor(Image.new("RGB", (8, 8), "red"))
    assert image_grid([[image]], labels=["x" * 1_000_000]).width < 1100


def test_global_batch_is_kept_or_refused() -> None:
    assert fit_batch(256, 16, 8) == (16, 2)
    assert fit_batch(32, 32, 2) == (16, 1)  # more processes than the micro-batch was chosen for


@pytest.mark.parametrize(
    ("batch", "micro", "processes"),
    [(256, 16, 6), (256, 16, 3), (256, 12, 8), (2, 1, 3), (96, 20, 4)],
)
def test_advice_on_batches_works(batch: int, micro: int, processes: int) -> None:
    with pytest.raises(ValueError, match="global_batch_size") as error:
        fit_batch(batch, micro, processes)
    advice = str(error.value).partition(": ")[2]
    numbers = [int(number) for number in re.findall(r"\d+", advice)]
    if "micro_batch_size to" in advice:
        assert fit_batch(batch, numbers[0], processes)[0] == numbers[0]
    else:
        *counts, multiple_of, example = numbers
        assert multiple_of == processes
        assert all(fit_batch(batch, 1, count) for count in counts)
        assert fit_batch(example, 1, processes)


def test_schedule_ends_where_it_should() -> None:
    factors = [warmup_cosine(step, warmup_steps=4, total_steps=20, end=0.1) for step in range(20)]
    assert 0 < factors[0] < factors[3] < factors[4] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_stream_covers_everything_once_for_any_number_of_processes() -> None:
    one = iter(StreamSampler(range(10), seed=3))
    expected = [next(one) for _ in range(20)]
    assert sorted(expected[:10]) == list(range(10))
    assert expected[:10] != expected[10:]
    ranks = [iter(StreamSampler(range(10), seed=3, rank=r, world_size=2)) for r in range(2)]
    assert [next(ranks[i % 2]) for i in range(20)] == expected
    resumed = iter(StreamSampler(range(10), seed=3, start=13))
    assert [next(resumed) for _ in range(7)] == expected[13:]


def test_models_are_found_where_people_point(tmp_path: Path) -> None:
    for folder in (
        "run/model",
        "run/step-9/model",
        "half/step-9/model",
        "half/step-10/model",
        "plain",
    ):
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


def test_metrics_survive_a_crash_and_a_rewind(tmp_path: Path) -> None:
    run = runs.open(tmp_path)
    run.begin()
    for step in (1, 2, 3):
        run.log(step, {"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    run.rewind(2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {"command", "git_commit", "packages", "seed"} <= set(manifest)


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (75, "1m15s"), (3720, "1h02m")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
