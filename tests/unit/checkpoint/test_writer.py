"""Files that another process writes of memory that it shares, and archives of tensors that are made of known parts."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from titanlite.checkpoint.tensor_writer import _around_elements, _bytes_of
from titanlite.checkpoint.writer import SentFile, Writer

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.float64, torch.bool]


@pytest.fixture
def writer() -> Iterator[Writer]:
    writer = Writer({"large": torch.empty(600, 1000), "small": torch.empty(3, dtype=torch.bfloat16)})
    writer.tensors["large"].copy_(torch.randn(600, 1000))
    writer.tensors["small"].fill_(2)
    yield writer
    writer.close()


def write(writer: Writer, path: Path) -> tuple[SentFile, bytes]:
    """Write shared and other contents; return the file, and what it should hold."""
    large = _bytes_of(writer.tensors["large"])
    parts = [b"head", large, b"", bytes(300_000), _bytes_of(writer.tensors["small"]), large[1_000_000:]]
    with writer.open(path) as file:
        for part in parts:
            file.write(part)
        assert file.tell() == sum(map(len, parts))
    return file, b"".join(parts)


def test_files_hold_what_was_written(writer: Writer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        writer.tensors["large"].mul_(3)
        file, expected = write(writer, tmp_path / name)
        assert (tmp_path / name).read_bytes() == expected
        assert file.digest == hashlib.sha256(expected).hexdigest()


def test_shared_contents_are_not_sent(writer: Writer) -> None:
    large = _bytes_of(writer.tensors["large"])
    assert writer.place_of(large) == (0, 2_400_000)
    assert writer.place_of(large[4096:8193]) == (4096, 8193)
    assert writer.place_of(memoryview(bytes(10_000))) is None


def test_errors_are_those_of_the_system(writer: Writer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        write(writer, tmp_path / "none" / "a")
    with pytest.raises(OSError, match="No space left on device"):
        write(writer, Path("/dev/full"))
    _, expected = write(writer, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == expected


@pytest.mark.parametrize("moment", ["before", "in"])
def test_a_dead_process_is_said_and_replaced(writer: Writer, tmp_path: Path, moment: str) -> None:
    write(writer, tmp_path / "a")
    process = writer._process
    assert process is not None
    file = writer.open(tmp_path / "b") if moment == "in" else None
    process.kill()
    with pytest.raises(OSError, match="ended with the status -9"):
        write(writer, tmp_path / "b") if file is None else file.write(bytes(1_000_000))
    _, expected = write(writer, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_does_not_end_it(writer: Writer, tmp_path: Path, number: int) -> None:
    with writer.open(tmp_path / "a") as file:
        assert writer._process is not None
        writer._process.send_signal(number)
        file.write(b"a")
    assert (tmp_path / "a").read_bytes() == b"a"


PARENT = """
import os, sys, time, torch
from titanlite.checkpoint.writer import Writer
file = Writer({"a": torch.empty(3)}).open(sys.argv[1])
if not os.fork():  # as a process of the data loader, which has the pipe too
    os.closerange(1, 3)
    time.sleep(5)
    os._exit(0)
print(file._writer._process.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
        end = time.monotonic() + 3
        while is_running(pid):
            assert time.monotonic() < end, "it outlives its parent"
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (5, 7), (1024, 999)], ids=str)
def test_archives_are_those_of_pytorch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    first, second = torch.zeros(shape).to(dtype), torch.randint(0, 2, shape).to(dtype)
    before, after = _around_elements(first)
    archive = io.BytesIO()
    with torch.utils.serialization.config.patch({"save.compute_crc32": False}):
        torch.save(second, archive)
    assert before + bytes(_bytes_of(second)) + after == archive.getvalue()
