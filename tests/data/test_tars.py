"""Tars by the thousand, remote, with dotted names, damaged, on storage with transient errors."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader

from vqrae.common import files
from vqrae.data import remote, tars
from vqrae.data.samples import TooManyBrokenSamples
from vqrae.data.sources import fingerprint, open_images, open_pairs, source_kind
from vqrae.data.stream import Draw, Mixture, OwnOrderSampler, StreamSampler
from vqrae.data.tars import tar_index

Png = Callable[..., bytes]  # see conftest
Write = Callable[..., list[Path]]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

ALL: dict[str, Any] = {"image_size": 8, "split": "all"}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def write_tars(png: Png) -> Write:
    """Write tars of which tar i, sample j is image and caption i * samples + j."""

    def write(folder: Path, count: int, samples: int) -> list[Path]:
        folder.mkdir(exist_ok=True)
        paths = []
        for i in range(count):
            members = {}
            for value in range(i * samples, (i + 1) * samples):
                members[f"{value:04d}.png"] = png(value % 256)
                members[f"{value:04d}.txt"] = str(value).encode()
            paths.append(write_tar(folder / f"{i:04d}.tar", members))
        return paths

    return write


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Indices and copies of this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"vqrae-tars-{os.getuid()}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server for the folder `far`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "far")
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


def shown(samples: list[dict[str, Any]]) -> list[int]:
    return [int(sample["image"][0, 0, 0]) for sample in samples]


def failing(monkeypatch: Patch, module: Any, name: str, *errors: int) -> None:
    """Let a function of the system fail with these errors first."""
    real, left = getattr(module, name), iter(errors)

    def call(*arguments: Any, **options: Any) -> Any:
        if (number := next(left, None)) is not None:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, call)


# ---- what a tar holds


def test_names_with_dots_are_samples_and_fields_of_a_sample_are_not(
    png: Png, tmp_path: Path
) -> None:
    members = {
        "a.png": png(1), "a.mask.png": png(99), "a.txt": b"a",
        "shot v2.0 (final).png": png(2), "shot v2.0 (final).txt": b"b",
        "b.v1.png": png(3), "b.v1.json": b'{"caption": "c"}', "b.v2.png": png(4), "b.v2.txt": b"d",
        "c.x.png": png(5), "c.txt": b"e",
        "dir.1/d.png": png(6), "dir.1/d.txt": b"f",
    }  # fmt: skip
    path = str(write_tar(tmp_path / "a.tar", members))
    pairs = open_pairs(path, **ALL)
    samples = [pairs[i] for i in range(len(pairs))]
    assert [sample["caption"] for sample in samples] == ["a", "b", "c", "d", "e", "f"]
    assert shown(samples) == [1, 2, 3, 4, 5, 6]
    assert len({*tar_index(path)[1:, 5].tolist()}) == 6, "each has a hash of its own"


def test_the_index_is_kept_and_made_again_when_the_tar_changes(
    write_tars: Write, tmp_path: Path
) -> None:
    [path] = write_tars(tmp_path, 1, 3)
    first, cache = tar_index(str(path)), tmp_path / ".0000.tar.index.npy"
    assert first.shape == (4, 6)
    assert np.array_equal(np.load(cache), first)
    cache.write_bytes(cache.read_bytes()[:40])
    assert np.array_equal(tar_index(str(path)), first)
    write_tars(tmp_path, 1, 5)
    assert len(tar_index(str(path))) == 6


def test_processes_share_the_scanning_and_read_only_tars_are_indexed_elsewhere(
    write_tars: Write, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    folder = tmp_path / "tars"
    paths = write_tars(folder, 4, 2)
    scanned: list[str] = []
    scan, atomic_path = tars._scan_tar, tars.atomic_path
    read_only = [folder]

    def refuse(path: Path) -> object:
        if any(path.is_relative_to(place) for place in read_only):
            raise PermissionError("read-only")
        return atomic_path(path)

    monkeypatch.setattr(tars, "_scan_tar", lambda p: scanned.append(Path(p).name) or scan(p))
    monkeypatch.setattr(tars, "atomic_path", refuse)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for _ in range(2):
        assert len(open_images(f"{folder}/*.tar", **ALL)) == 8
        assert scanned == [f"000{i}.tar" for i in (2, 3, 0, 1)], "once; rank 1 starts in the middle"
    assert sorted(folder.iterdir()) == paths
    read_only.append(tmp_path)
    assert len(tar_index(str(write_tar(folder / "4.tar", {"a.png": b"x"})))) == 2
    assert "not kept" in capsys.readouterr().err


def test_damaged_tars_are_refused_and_truncated_images_skipped(
    write_tars: Write, png: Png, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    members = {f"s{i}.png": png(i)[: 50 if i == 1 else None] for i in range(4)}
    dataset = open_images(str(write_tar(tmp_path / "a.tar", members)), **ALL)
    assert shown([dataset[i] for i in range(4)]) == [0, 2, 2, 3]
    assert "a.tar, s1.png: not a readable image" in capsys.readouterr().err
    [path] = write_tars(tmp_path, 1, 5)
    path.write_bytes(path.read_bytes()[:7900])
    with pytest.raises(ValueError, match=r"0000\.tar is damaged after \d samples .*fetch it again"):
        open_pairs(str(path), image_size=8)
    failing(monkeypatch, tars.tarfile, "open", errno.EMFILE)
    with pytest.raises(OSError, match=r"0000\.tar cannot be read: Too many open files"):
        tar_index(str(path))


# ---- descriptors and storage

MANY = """
import os, resource, sys
from torch.utils.data import DataLoader
from vqrae.data import tars
from vqrae.data.sources import open_images
folder = sys.argv[1]
for _ in range(2):  # indices are made, then read
    options = {"image_size": 8}
    train = open_images(f"{folder}/*.tar", split="train", **options)
    validation = open_images(f"{folder}/*.tar", split="validation", **options)
    assert len(train) + len(validation) == 900
    assert len(list(DataLoader(train, 64, num_workers=1))) == 14
    assert len([validation[i] for i in range(len(validation))]) == 45
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
def test_more_tars_than_a_process_may_open_files(write_tars: Write, tmp_path: Path) -> None:
    write_tars(tmp_path, 450, 2)
    command = f"ulimit -n 400; exec {sys.executable} -c '{MANY}' {tmp_path}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second, error = done.stdout.splitlines()
    assert max(int(first.split()[1]), int(second.split()[1])) < 200
    assert f"OSError {errno.EMFILE} [Errno {errno.EMFILE}] Too many open files" in error
    assert not list(tmp_path.glob(".*.tmp"))


def test_transient_errors_are_tried_again(
    write_tars: Write, tmp_path: Path, monkeypatch: Patch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    [path] = write_tars(tmp_path, 1, 2)
    dataset = open_images(str(path), **ALL)
    failing(monkeypatch, tars.os, "pread", errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
    assert shown([dataset[1]]) == [1]
    assert (len(pauses), dataset.broken.found) == (3, set())
    failing(monkeypatch, tars.os, "pread", *[errno.EIO] * 4)
    assert shown([dataset[0]]) == [1], "after the last try the sample counts as broken"
    assert dataset.broken.found == {0}
    failing(monkeypatch, files.os, "open", errno.ESTALE)
    assert files.read_bytes(path) == path.read_bytes()
    failing(monkeypatch, tars.os, "pread", errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        dataset[1]


# ---- remote tars and buffers


def order(
    dataset: Any,
    count: int,
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
) -> list[int]:
    """The values of `count` samples of a process in the order of training."""
    sampler = StreamSampler(dataset, start=start, rank=rank, world_size=world_size)
    batches = DataLoader(dataset, 4, sampler=sampler, num_workers=workers)
    images = (batch["image"] for batch in itertools.islice(batches, count // 4))
    return [int(image[0, 0, 0]) for image in itertools.chain.from_iterable(images)]


def test_tars_of_a_web_server_train_as_local_ones_do(
    write_tars: Write, tmp_path: Path, server: str, copies: Path
) -> None:
    write_tars(tmp_path / "far", 12, 8)
    url, local = f"{server}/{{0000..0011}}.tar,buffer=2", f"{tmp_path}/far/*.tar,buffer=2"
    expected = order(open_images(url, **ALL), 192)
    assert sorted(expected[:96]) == sorted(expected[96:]) == list(range(96))
    assert expected[:96] != expected[96:]
    assert len(list(copies.rglob("*.tar"))) <= 4, "the copies are bounded"
    for block in np.reshape(expected, (-1, 16)):
        assert len({*(block // 8).tolist()}) == 2, "two tars at a time"
        assert (block != np.sort(block)).any()
    for workers, start in ((2, 60), (0, 124)):
        rest = order(open_images(url, **ALL), 192 - start, start=start, workers=workers)
        assert rest == expected[start:]
    for rank in range(2):
        share = order(open_images(url, **ALL), 96, rank=rank, world_size=2, workers=1)
        assert share == expected[rank::2]
    assert order(open_images(local, **ALL), 96) == expected[:96]
    assert len(open_images(url, image_size=8)) == 91
    assert fingerprint(url).startswith(f"{url}: 12 tars, crc32")


def test_remote_tars_that_are_gone_or_changed_are_named(
    write_tars: Write,
    tmp_path: Path,
    server: str,
    copies: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    write_tars(tmp_path / "far", 2, 4)
    with pytest.raises(ValueError, match=r"0002\.tar: no such file"):
        open_images(f"{server}/{{0000..0002}}.tar", image_size=8)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/0000\.tar: cannot be read"):
        open_images("http://127.0.0.1:9/0000.tar", image_size=8)
    open_images(f"{server}/0000.tar", **ALL)
    for copy in copies.rglob("*.tar"):
        copy.unlink()
    (tmp_path / "far" / "0000.tar").write_bytes(b"")
    with pytest.raises(TooManyBrokenSamples, match="none of its 4 samples can be read"):
        open_images(f"{server}/0000.tar", **ALL)[0]
    assert "has changed since it was scanned" in capsys.readouterr().err


def test_globs_of_any_file_system(write_tars: Write, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in write_tars(tmp_path, 3, 4):
        memory.put_file(str(path), f"/set/{path.name}")
    assert source_kind("memory://set/*.tar") == "tar"
    pairs = open_pairs("memory://set/*.tar,buffer=1", **ALL)
    assert sorted(int(pairs[i]["caption"]) for i in range(12)) == list(range(12))
    for source, message in (
        ("memory://set/0000.tar,bufer=1", "expected FILE.tar, then ,caption=KEY"),
        ("memory://set/0000.tar,buffer=0", "expected FILE.tar, then ,caption=KEY"),
        ("unknown://x/{0..1}.tar", "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pairs(source, image_size=8)
    assert source_kind("hf://datasets/owner/name/{0..1}.tar") == "tar"


def test_a_buffer_orders_training_by_seed_and_epoch(
    write_tars: Write, tmp_path: Path, monkeypatch: Patch
) -> None:
    write_tars(tmp_path, 6, 8)
    source = f"{tmp_path}/*.tar,buffer=2"
    asked: list[str] = []
    monkeypatch.setattr(remote.Stage, "fetch_soon", lambda self, url: asked.append(url))
    dataset = open_images(source, crop="zoom", **ALL)
    stored = [dataset[Draw(i, epoch)] for epoch in (0, 1) for i in range(48)]
    assert shown(stored) == [*range(48)] * 2, "code extraction asks for other crops by epoch"
    assert asked == [], "tars are fetched ahead in training alone"
    values = order(dataset, 48)
    in_order = list(dict.fromkeys(value // 8 for value in values))
    assert {int(Path(url).stem) for url in asked} == {*in_order[2:]}

    orders = {tuple(values)}
    for seed, start in ((0, 48), (1, 0), (1, 48)):
        values = order(open_images(source, seed=seed, **ALL), 48, start=start)
        assert sorted(values) == list(range(48)) != values
        orders.add(tuple(values))
    assert len(orders) == 4
    sampler = OwnOrderSampler(dataset)
    sampler.set_epoch(1)
    own = [int(dataset[draw]["image"][0, 0, 0]) for draw in sampler]
    assert own == order(dataset, 48, start=48)

    part = open_images(f"{tmp_path}/*.tar,buffer=1", **ALL)
    mixture = Mixture([part, part], [0.5, 0.5])
    drawn = [draw for which, draw in map(mixture.locate, range(96)) if which == 0]
    values = shown([part[draw] for draw in drawn])
    assert len({value // 8 for value in values[:8]}) == 1, "a mixture keeps the order of tars"
    assert sorted(values) == list(range(48))


def test_a_copy_that_another_process_removes_is_fetched_again(
    write_tars: Write, tmp_path: Path, monkeypatch: Patch
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
