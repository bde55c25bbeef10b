"""Files that are whole or absent, and text as people bring it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqrae.common import files
from vqrae.common.files import (
    atomic_path,
    json_lines,
    parse_json,
    printable,
    raw_lines,
    read_json,
    text_lines,
    write_json,
    write_text,
)
from vqrae.common.run import read_metrics
from vqrae.data.image_files import scan_jsonl
from vqrae.understanding.chat import read_questions

SEPARATORS = "a\u2028b\u2029c\u0085d\u000ce\u001ff"  # `str.splitlines` cuts at each


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(f"\ufeff{SEPARATORS}\r\n\nlast".encode())
    assert list(text_lines(path)) == [(1, SEPARATORS), (2, ""), (3, "last")]


def test_readers_of_json_lines_take_separators_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for record, read in (
        ({"question": SEPARATORS}, lambda: [r["question"] for r in read_questions(path)]),
        (
            {"image": "0.jpg", "caption": SEPARATORS},
            lambda: [caption for _, caption in scan_jsonl(path)[0]],
        ),
    ):
        plain = json.dumps(record, ensure_ascii=False)
        path.write_bytes(f"\ufeff{plain}\n\n{json.dumps(record)}\n".encode())
        assert read() == [SEPARATORS, SEPARATORS]
    row = json.dumps({"step": 1, "note": SEPARATORS}, ensure_ascii=False)
    (tmp_path / "metrics.jsonl").write_text(f"{row}\n")
    assert read_metrics(tmp_path) == [{"step": 1, "note": SEPARATORS}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "caf\xe9"}', r"not UTF-8 text \(byte 0xe9\)"),
        ("\ufeff{}".encode("utf-16-le"), r"not UTF-8 text \(byte 0xff\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 10_000, "Exceeds the limit"),
        (b"{", "not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_line(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}\n' + line)
    with pytest.raises(ValueError, match=rf"lines\.jsonl, line 2: .*{message}"):
        list(json_lines(path))
    path.write_bytes(line)
    with pytest.raises(ValueError, match=rf"lines\.jsonl: .*{message}"):
        parse_json(path.read_bytes(), path)


def test_the_line_of_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(b'["a",\n\n"caf\xe9"]')
    with pytest.raises(ValueError, match=r"value\.json, line 3: not UTF-8"):
        read_json(path)


def test_names_are_printed_without_control_characters() -> None:
    assert (
        printable("a\x1b]0;title\x07\r\ud800\udc80\u00e9\U0001f600\n")
        == "a\\x1b]0;title\\x07\\r\\ud800\\udc80\u00e9\U0001f600\n"
    )
    assert parse_json('"\\u001b"', "x") == "\x1b"
    assert list(raw_lines(os.devnull)) == []


@pytest.mark.slow
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    kill = (
        "import os, signal, sys; from vqrae.common.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    path.mkdir(); (path / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", kill, str(tmp_path / "model")], check=False)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".model.")
    assert left.name.endswith(".tmp")
    alive = tmp_path / left.name.replace(left.name.split("@")[0], f".other.{os.getppid()}")
    elsewhere = tmp_path / f".other.{left.name.split('.')[2].split('@')[0]}@00000000.tmp"
    abandoned = tmp_path / ".third.1@00000000.tmp"
    for path in (alive, elsewhere, abandoned):
        path.write_text("x")
    os.utime(abandoned, (time.time() - 90_000,) * 2)
    write_text(tmp_path / "model", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "model", alive, elsewhere])


def test_a_folder_is_replaced_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("first", "second"):
        with atomic_path(tmp_path / "model") as folder:
            folder.mkdir()
            (folder / "weights").write_text(text)
    assert (tmp_path / "model" / "weights").read_text() == "second"

    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "model" and ".old." not in Path(source).name:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="no space"), atomic_path(tmp_path / "model") as folder:
        folder.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "second"


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
