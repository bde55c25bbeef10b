"""Tars by the thousand, far away, with dotted names, on storage that stumbles."""

import errno
import functools
import http.server
import io
import itertools
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vqrae.common import files
from vqrae.data import remote, tars
from vqrae.data.sources import fingerprint, open_images, open_pairs, source_kind
from vqrae.data.stream import Draw, Mixture, OwnOrderSampler, StreamSampler
from vqrae.data.tars import TarDataset


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_tars(folder: Path, count: int, samples: int) -> list[Path]:
    """Tar i, sample j shows the value i * samples + j, and its caption says it."""
    paths = []
    for i in range(count):
        values = range(i * samples, (i + 1) * samples)
        members = {
            f"{v:04d}.{suffix}": data
            for v in values
            for suffix, data in (("png", png(v)), ("txt", str(v).encode()))
        }
        paths.append(write_tar(folder / f"{i:04d}.tar", members))
    return paths


def shown(samples: list[dict]) -> list[int]:
    return [int(sample["image"][0, 0, 0]) for sample in samples]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"vqrae-tars-{os.getuid()}"


# ---- what a tar holds


def test_names_with_dots_are_samples_and_fields_of_a_sample_are_not(tmp_path: Path) -> None:
    members = {
        "a.png": png(1), "a.mask.png": png(99), "a.txt": b"a",
        "shot v2.0 (final).png": png(2), "shot v2.0 (final).txt": b"b",
        "b.v1.png": png(3), "b.v1.json": b'{"caption": "c"}', "b.v2.png": png(4), "b.v2.txt": b"d",
        "c.x.png": png(5), "c.txt": b"e",
        "dir.1/d.png": png(6), "dir.1/d.txt": b"f",
    }  # fmt: skip
    pairs = open_pairs(str(write_tar(tmp_path / "a.tar", members)), image_size=8, split="all")
    samples = [pairs[i] for i in range(len(pairs))]
    assert [sample["caption"] for sample in samples] == ["a", "b", "c", "d", "e", "f"]
    assert shown(samples)[:3] + shown(samples)[4:] == [1, 2, 3, 5, 6]
    assert len(set(tars.tar_index(str(tmp_path / "a.tar"))[1:, 5].tolist())) == 6, (
        "each has a hash of its own"
    )


def test_every_format_that_pillow_reads_counts(tmp_path: Path) -> None:
    members = {}
    for form in ("gif", "bmp", "tiff", "ppm", "avif"):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 0, 0)).save(stream, form)
        members[f"{form}.{form}"] = stream.getvalue()
    dataset = open_images(str(write_tar(tmp_path / "a.tar", members)), image_size=8, split="all")
    assert all(abs(value - 200) < 4 for value in shown([dataset[i] for i in range(5)]))


def test_captions_are_read_only_where_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = write_tars(tmp_path, 1, 4)
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(
        tars.os, "pread", lambda fd, size, offset: sizes.append(size) or pread(fd, size, offset)
    )
    for captions, reads in ((False, 1), (True, 2), ("optional", 2)):
        sizes.clear()
        assert (
            TarDataset(str(path), image_size=8, captions=captions, split="all")[1]["image"]
            is not None
        )
        assert len(sizes) == reads


# ---- descriptors

MANY = """
import os, resource, sys
from torch.utils.data import DataLoader
from vqrae.data import tars
from vqrae.data.sources import open_images
folder = sys.argv[1]
for _ in range(2):  # indices are made, then read
    train, validation = (open_images(f"{folder}/*.tar", image_size=8, split=s) for s in ("train", "validation"))
    assert len(train) + len(validation) == 2200
    assert len(list(DataLoader(train, 64, num_workers=1))) == 33
    assert len([validation[i] for i in range(len(validation))]) == 110
    print("open", len(os.listdir("/proc/self/fd")))
held = []
try:
    while True:
        held.append(open(os.devnull))
except OSError:
    pass
try:
    tars.tar_index(f"{folder}/0000.tar")
except OSError as error:
    held.clear()
    print(type(error).__name__, error.errno, error)
"""


@pytest.mark.slow
def test_more_tars_than_a_process_may_open_files(tmp_path: Path) -> None:
    write_tars(tmp_path, 1100, 2)
    command = f"ulimit -n 1024; exec {sys.executable} -c '{MANY}' {tmp_path}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second, error = done.stdout.splitlines()
    assert max(int(first.split()[1]), int(second.split()[1])) < 200
    assert f"OSError {errno.EMFILE} [Errno {errno.EMFILE}] Too many open files" in error
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_tar_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = write_tars(tmp_path, 1, 2)

    def refuse(*_: object) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(tars.tarfile, "open", refuse)
    with pytest.raises(OSError, match=r"0000\.tar cannot be read: Too many open files"):
        tars.tar_index(str(path))


# ---- storage that stumbles


def test_transient_errors_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    [path] = write_tars(tmp_path, 1, 2)
    dataset = open_images(str(path), image_size=8, split="all")
    pread, failures = os.pread, iter([errno.EIO, errno.ESTALE, errno.ETIMEDOUT])

    def stumble(*arguments: int) -> bytes:
        if (number := next(failures, None)) is not None:
            raise OSError(number, os.strerror(number))
        return pread(*arguments)

    monkeypatch.setattr(tars.os, "pread", stumble)
    assert shown([dataset[1]]) == [1]
    assert (len(pauses), dataset.broken.found) == (3, set())

    failures = itertools.chain([errno.EIO] * 4)
    assert shown([dataset[0]]) == [1], "after the last try the sample counts as broken"
    assert dataset.broken.found == {0}
    failures = itertools.chain([errno.EMFILE])
    with pytest.raises(OSError, match="Too many open files"):
        dataset[1]


def test_files_are_tried_again_and_pipes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    (tmp_path / "a").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe")
    real, failures = os.open, iter([errno.ESTALE])

    def stumble(*arguments: object) -> int:
        if (number := next(failures, None)) is not None:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(files.os, "open", stumble)
    assert files.read_bytes(tmp_path / "a") == b"content"
    for name, message in (
        ("pipe", "not a regular file"),
        ("none", "no such file"),
        (".", "not a regular file"),
    ):
        with pytest.raises(ValueError, match=message):
            files.read_bytes(tmp_path / name)


# ---- far away


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server for the folder `far`."""
    (tmp_path / "far").mkdir()
    handler = functools.partial(Quiet, directory=tmp_path / "far")
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


def order(
    dataset: object,
    count: int,
    *,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> list[int]:
    """The values of `count` samples of a process in the order of training."""
    sampler = StreamSampler(dataset, start=start, rank=rank, world_size=world_size)
    batches = DataLoader(dataset, 4, sampler=sampler, num_workers=workers)
    return [
        int(image[0, 0, 0])
        for batch in itertools.islice(batches, count // 4)
        for image in batch["image"]
    ]


def test_tars_of_a_web_server_train_as_local_ones_do(
    tmp_path: Path, server: str, own_cache: Path
) -> None:
    write_tars(tmp_path / "far", 12, 8)
    remote, local = f"{server}/{{0000..0011}}.tar,buffer=2", f"{tmp_path}/far/*.tar,buffer=2"
    dataset = open_images(remote, image_size=8, split="all")
    expected = order(dataset, 192)
    assert sorted(expected[:96]) == sorted(expected[96:]) == list(range(96))
    assert expected[:96] != expected[96:]
    assert len(list(own_cache.rglob("*.tar"))) <= 4, "the copies are bounded"
    for block in np.reshape(expected, (-1, 16)):
        assert len({*(block // 8).tolist()}) == 2, "two tars at a time"
        assert (block != np.sort(block)).any()

    for workers, start in ((2, 0), (2, 60), (0, 124)):
        again = open_images(remote, image_size=8, split="all")
        assert order(again, 192 - start, start=start, workers=workers) == expected[start:]
    ranks = [
        order(open_images(remote, image_size=8, split="all"), 96, rank=r, world_size=2, workers=1)
        for r in range(2)
    ]
    assert [value for pair in zip(*ranks, strict=True) for value in pair] == expected
    assert order(open_images(local, image_size=8, split="all"), 96) == expected[:96]
    assert len(open_images(remote, image_size=8)) == 91
    assert fingerprint(remote).startswith(f"{remote}: 12 tars, crc32")


def test_remote_tars_that_are_gone_or_changed_are_named(
    tmp_path: Path,
    server: str,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    write_tars(tmp_path / "far", 2, 4)
    with pytest.raises(ValueError, match=r"0002\.tar: no such file"):
        open_images(f"{server}/{{0000..0002}}.tar", image_size=8)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/0000\.tar: cannot be read"):
        open_images("http://127.0.0.1:9/0000.tar", image_size=8)
    dataset = open_images(f"{server}/0000.tar", image_size=8, split="all")
    for copy in own_cache.rglob("*.tar"):
        copy.unlink()
    (tmp_path / "far" / "0000.tar").write_bytes(b"")
    dataset = open_images(f"{server}/0000.tar", image_size=8, split="all")
    with pytest.raises(RuntimeError, match="none of its 4 samples can be read"):
        dataset[0]
    assert "has changed since it was scanned" in capsys.readouterr().err


def test_globs_of_any_file_system(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in write_tars(tmp_path, 3, 4):
        memory.put_file(str(path), f"/set/{path.name}")
    assert source_kind("memory://set/*.tar") == "tar"
    pairs = open_pairs("memory://set/*.tar,buffer=1", image_size=8, split="all")
    assert sorted(int(pairs[i]["caption"]) for i in range(12)) == list(range(12))
    for source, message in (
        ("s3://bucket/pairs.jsonl", "only tars are read from URLs"),
        ("memory://set/0000.tar,bufer=1", "expected FILE.tar, then ,caption=KEY"),
        ("memory://set/0000.tar,buffer=0", "expected FILE.tar, then ,caption=KEY"),
        ("unknown://x/{0..1}.tar", "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pairs(source, image_size=8)
    assert source_kind("hf://datasets/owner/name/{0..1}.tar") == "tar"


def test_a_mixture_keeps_the_order_of_tars_with_a_buffer(tmp_path: Path) -> None:
    write_tars(tmp_path, 6, 8)
    part = open_images(f"{tmp_path}/*.tar,buffer=1", image_size=8, split="all")
    mixture = Mixture([part, part], [0.5, 0.5])
    drawn = [mixture.locate(i) for i in range(96)]
    values = [int(part[draw]["image"][0, 0, 0]) for which, draw in drawn if which == 0]
    assert len({value // 8 for value in values[:8]}) == 1
    assert sorted(values) == list(range(48))


def test_shuffling_depends_on_seed_and_epoch(tmp_path: Path) -> None:
    write_tars(tmp_path, 6, 8)
    source = f"{tmp_path}/*.tar,buffer=2"
    orders = {
        (seed, epoch): order(
            open_images(source, image_size=8, split="all", seed=seed), 48, start=48 * epoch
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(values) for values in orders.values()}) == 4
    assert all(sorted(values) == list(range(48)) for values in orders.values())
    assert np.mean([values == sorted(values) for values in orders.values()]) == 0


def test_a_copy_that_another_process_removes_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [tar] = write_tars(tmp_path, 1, 4)
    stage = remote.Stage("source", capacity=2)
    expected = os.pread(stage.descriptor(str(tar)), 10_000, 0)
    stage.files.clear()
    touch = os.utime

    def remove_first(path: Path, *arguments: object) -> None:
        if path.suffix == ".tar":
            monkeypatch.setattr(remote.os, "utime", touch)
            path.unlink()
        touch(path)

    monkeypatch.setattr(remote.os, "utime", remove_first)
    assert os.pread(stage.descriptor(str(tar)), 10_000, 0) == expected


def test_reading_in_stored_order_keeps_images_across_epochs(tmp_path: Path) -> None:
    """Code extraction asks for other crops of an image by epoch."""
    write_tars(tmp_path, 4, 4)
    dataset = open_images(f"{tmp_path}/*.tar,buffer=1", image_size=8, split="all", crop="zoom")
    assert (
        shown([dataset[Draw(i, epoch)] for epoch in (0, 1) for i in range(16)]) == [*range(16)] * 2
    )


def test_the_next_tars_are_fetched_ahead_in_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tars(tmp_path, 6, 4)
    asked: list[str] = []
    monkeypatch.setattr(remote.Stage, "fetch_soon", lambda self, url: asked.append(url))
    dataset = open_images(f"{tmp_path}/*.tar,buffer=2", image_size=8, split="all")
    assert shown([dataset[i] for i in range(24)]) == [*range(24)]
    assert asked == []
    values = order(dataset, 24)
    tars_in_order = list(dict.fromkeys(value // 4 for value in values))
    assert {int(Path(url).stem) for url in asked} == {*tars_in_order[2:]}


def test_trainers_read_an_epoch_in_the_order_of_the_data(tmp_path: Path) -> None:
    write_tars(tmp_path, 4, 4)
    dataset = open_images(f"{tmp_path}/*.tar,buffer=2", image_size=8, split="all")
    sampler = OwnOrderSampler(dataset)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert shown([dataset[draw] for draw in sampler]) == order(dataset, 16, start=16 * epoch)
