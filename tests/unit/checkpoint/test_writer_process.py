"""Files that another process writes of memory that it shares, and archives of tensors against PyTorch's."""

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

from titanlite.checkpoint.background import BackgroundSaver
from titanlite.checkpoint.tensor_writer import bytes_of, head_and_tail
from titanlite.checkpoint.writer_process import SentFile, WriterProcess

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.float64, torch.bool]


@pytest.fixture
def writer() -> Iterator[WriterProcess]:
    writer = WriterProcess({"large": torch.empty(600, 1000), "small": torch.empty(3, dtype=torch.bfloat16)})
    writer.tensors["large"].copy_(torch.randn(600, 1000))
    writer.tensors["small"].fill_(2)
    yield writer
    writer.close()


def write(writer: WriterProcess, path: Path) -> tuple[SentFile, bytes]:
    """Write shared and other contents; return the file, and what it should hold."""
    large = bytes_of(writer.tensors["large"])
    parts = [b"head", large, b"", bytes(300_000), bytes_of(writer.tensors["small"]), large[1_000_000:]]
    with writer.open(path) as file:
        for part in parts:
            file.write(part)
        assert file.tell() == sum(map(len, parts))
    return file, b"".join(parts)


def test_files_hold_what_was_written(writer: WriterProcess, tmp_path: Path) -> None:
    for name in ("a", "b"):
        writer.tensors["large"].mul_(3)
        file, expected = write(writer, tmp_path / name)
        assert (tmp_path / name).read_bytes() == expected
        assert file.digest == hashlib.sha256(expected).hexdigest()


def test_shared_contents_are_not_sent(writer: WriterProcess) -> None:
    large = bytes_of(writer.tensors["large"])
    assert writer.place_of(large) == (0, 2_400_000)
    assert writer.place_of(large[4096:8193]) == (4096, 8193)
    assert writer.place_of(memoryview(bytes(10_000))) is None


def test_errors_are_those_of_the_system(writer: WriterProcess, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        write(writer, tmp_path / "none" / "a")
    with pytest.raises(OSError, match="No space left on device"):
        write(writer, Path("/dev/full"))
    _, expected = write(writer, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == expected


def test_one_file_is_open_at_a_time(writer: WriterProcess, tmp_path: Path) -> None:
    with writer.open(tmp_path / "a"), pytest.raises(RuntimeError, match="another file is open"):
        writer.open(tmp_path / "b")


def test_a_process_that_died_in_a_file_is_said_and_replaced(writer: WriterProcess, tmp_path: Path) -> None:
    file = writer.open(tmp_path / "b")
    writer._process.kill()
    with pytest.raises(OSError, match="ended with the status -9"):
        file.write(bytes(1_000_000))
    with pytest.raises(OSError, match="ended with the status -9"):
        file.close()
    _, expected = write(writer, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == expected


def test_a_process_that_died_between_files_costs_none(
    writer: WriterProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer._process.kill()
    writer._process.wait()
    _, expected = write(writer, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == expected
    assert "ended with the status -9; another one starts" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_request_to_stop_does_not_end_it(writer: WriterProcess, tmp_path: Path, number: int) -> None:
    with writer.open(tmp_path / "a") as file:
        writer._process.send_signal(number)
        file.write(b"a")
    assert (tmp_path / "a").read_bytes() == b"a"


def test_nobody_waits_for_a_process_that_was_forked_meanwhile() -> None:
    writer = WriterProcess({"a": torch.empty(3)})
    forked = os.fork()
    if not forked:
        time.sleep(30)
        os._exit(0)
    begin = time.monotonic()
    writer.close()
    assert time.monotonic() - begin < 10
    os.kill(forked, signal.SIGKILL)
    os.waitpid(forked, 0)


@pytest.mark.parametrize("executable", ["/none", "", "/bin/false"])
def test_a_thread_writes_where_no_process_starts(
    executable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    saver, path = BackgroundSaver(torch.device("cpu"), pin=False), tmp_path / "a"

    def save(copies: dict[str, torch.Tensor], failure: Exception | None) -> None:
        assert failure is None
        with saver.new_file(path) as file:
            file.write(bytes_of(copies["a"]))

    for value in (1, 2):
        saver.start(value, {"a": torch.full((3,), value, dtype=torch.uint8)}, save)
        saver.wait()
        assert path.read_bytes() == bytes([value] * 3)
    saver.close()
    assert caplog.text.count("because another process cannot") == 1


def test_buffers_follow_the_shapes_and_dtypes() -> None:
    saver = BackgroundSaver(torch.device("cpu"), pin=False)
    for tensor in (torch.ones(3), torch.full((3,), 1 << 30), torch.ones(5), torch.ones(5, 2)):
        copies = saver._copy({"a": tensor}, None)
        assert copies["a"].dtype is tensor.dtype
        assert torch.equal(copies["a"], tensor)
    saver.close()


PARENT = """
import os, sys, time, torch
from titanlite.checkpoint.writer_process import WriterProcess
file = WriterProcess({"a": torch.empty(3)}).open(sys.argv[1])
if not os.fork():  # as a process of the data loader, which has the pipe too
    os.closerange(1, 3)
    time.sleep(5)
    os._exit(0)
print(file._process._process.pid, flush=True)
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
    head, tail = head_and_tail(first)
    archive = io.BytesIO()
    with torch.utils.serialization.config.patch({"save.compute_crc32": False}):
        torch.save(second, archive)
    assert head + bytes(bytes_of(second)) + tail == archive.getvalue()
