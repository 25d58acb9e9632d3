"""What a run tells: FLOPs, peaks, the log line, metrics.jsonl, TensorBoard and the summary."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlite.config.schema import Checkpoint, JobConfig, Training
from titanlite.errors import ConfigError, TrainingError
from titanlite.metrics.console import Console, ConsoleSink, TerminalSink, init_logging
from titanlite.metrics.device import peak_flops, peak_memory, total_memory
from titanlite.metrics.flops import ModelSize, flops_per_token
from titanlite.metrics.recorder import Recorder
from titanlite.metrics.report import end_above, next_command, summary
from titanlite.metrics.sinks import JsonlSink, Row, Sink
from titanlite.metrics.tensorboard import BY_TOKENS, TensorBoardSink, scalars_of

CPU = torch.device("cpu")


def row(**values: object) -> Row:
    return {
        "step": 10,
        "loss": 10.70694,
        "max_loss": 11.0,
        "grad_norm": 1.23449,
        "lr": 8e-4,
        "tps": 7033.6,
        "tflops": 407.349,
        "mfu": 41.188,
        "memory_gib": 30.987,
        "memory_pct": 32.6151,
        "step_time_s": 1.165,
        "data_loading_s": 0.01,
        "data_loading_pct": 0.86,
        "tokens_seen": 81920,
        "reserved_gib": 40.0,
        "reserved_pct": 42.5,
        "num_alloc_retries": 1,
        "num_ooms": 2,
        "skipped_steps": 0,
        "skipped_documents": 0,
        "truncated_examples": 0,
        **values,
    }


# ---- FLOPs and peaks


def test_flops_by_hand() -> None:
    size = ModelSize(params=1000, embedding_params=100, layers=2, heads=4, head_dim=8, dim=32, vocab_size=50)
    assert flops_per_token(size, seq_len=16) == 6 * 900 + 12 * 2 * 4 * 8 * 16 == 17688


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GB200", None),
        ("NVIDIA H20", None),
        ("NVIDIA H800", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("CPU, 2 threads", None),
        ("", None),
    ],
)
def test_peaks(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else pytest.approx(tera * 1e12))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_of_the_cpu_is_the_process_in_the_machine() -> None:
    held = b"x" * (64 * 2**20)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    memory = peak_memory(CPU)
    assert len(held) < 0.98 * resident <= memory.active <= memory.total == total_memory(CPU)
    assert (memory.reserved, memory.alloc_retries, memory.ooms) == (None, None, None)


# ---- the console


def line_of(sink: ConsoleSink, values: Row, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        sink.write(values)
    return caplog.messages[0]


def test_log_line(caplog: pytest.LogCaptureFixture) -> None:
    sink = ConsoleSink()
    assert line_of(sink, row(), caplog) == (
        "step: 10  loss: 10.7069  grad_norm:  1.2345  memory: 40.00GiB(42.50%)  tps: 7,034  tflops: 407.35  mfu: 41.19%"
    )
    assert line_of(sink, row(loss=math.nan, grad_norm=math.inf), caplog).startswith(
        "step: 10  loss:     nan  grad_norm:     inf  memory:"
    )
    on_cpu = {"memory_gib": 0.5, "reserved_gib": None, "reserved_pct": None}
    assert line_of(sink, row(step=3, loss=2.5, mfu=None, tps=999.4, tflops=1234.5, **on_cpu), caplog) == (
        "step:  3  loss:  2.5000  grad_norm:  1.2345  memory:  0.50GiB(32.62%)  tps: 999  tflops: 1,234.50  mfu: n/a"
    )


def test_log_line_has_seven_fields_two_spaces_apart(caplog: pytest.LogCaptureFixture) -> None:
    number = r"\s{1,2}[\d,.]+"
    fields = [rf"step:{number}", rf"loss:{number}", rf"grad_norm:{number}", rf"memory:{number}GiB\([\d.]+%\)"]
    fields += [rf"tps:{number}", rf"tflops:{number}", rf"mfu:{number}%"]
    assert re.fullmatch("  ".join(fields), line_of(ConsoleSink(), row(), caplog))


class Terminal(io.StringIO):
    """Of which a console thinks that it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Console(Terminal(), 0)


def test_the_line_on_a_terminal(
    terminal: Console, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch's loss and the mean, named so; the fields that fit, the most important ones first."""
    terminal.colored = False
    sink = TerminalSink(terminal, [11.0, 10.0], 1000)
    line = "step   10  loss 10.7069  mean 10.5000  grad_norm    1.23  tps 7,034  mfu 41.2%"
    monkeypatch.setattr("titanlite.metrics.console.columns_of", lambda stream: 80)
    assert line_of(sink, row(), caplog) == line
    monkeypatch.setattr("titanlite.metrics.console.columns_of", lambda stream: 120)
    assert line_of(sink, row(), caplog) == f"{line}  40.0 GiB  tflops 407.3"
    large = line_of(sink, row(loss=math.nan, grad_norm=math.inf, mfu=None, tflops=0.01), caplog)
    assert large == "step   10  loss     nan  mean 10.5000  grad_norm     inf  tps 7,034  40.0 GiB"
    assert "loss   7e+06  " in line_of(sink, row(loss=7e6), caplog)


def test_colors_say_something(terminal: Console, caplog: pytest.LogCaptureFixture) -> None:
    """And change nothing but the color."""
    losses = [5.0]
    sink = TerminalSink(terminal, losses, 100)

    def colors(**values: object) -> dict[str, str]:
        line = line_of(sink, row(**values), caplog)
        return {name: color for color, name in re.findall(r"\033\[(\d+)m(\w+)", line)}

    assert colors() == {"step": "1", "mean": "32"}
    losses.append(6.0)
    assert colors(tps=1000.0) == {"step": "1", "mean": "33", "tps": "33"}  # the loss rises, the speed falls
    losses.append(1.0)
    assert colors(mfu=None, reserved_pct=90.0) == {"step": "1", "mean": "32", "40": "33"}
    assert colors(mfu=None, reserved_pct=97.0) == {"step": "1", "mean": "33", "40": "31"}  # no better than before
    with_color = line_of(TerminalSink(terminal, [5.0], 100), row(), caplog)
    terminal.colored = False
    assert re.sub(r"\033\[\d+m", "", with_color) == line_of(TerminalSink(terminal, [5.0], 100), row(), caplog)


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for value, colored in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", value)
        assert Console(Terminal(), 0).colored == colored
    assert not Console(io.StringIO(), 0).colored


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize(
    ("rank", "log_rank", "shown"), [(0, None, True), (1, None, False), (1, "0,1", True), (0, "1", False)]
)
def test_only_the_chosen_ranks_log(
    rank: int,
    log_rank: str | None,
    shown: bool,
    root_logger: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("LOG_RANK", raising=False)
    if log_rank is not None:
        monkeypatch.setenv("LOG_RANK", log_rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    init_logging(rank)
    root_logger.info("hello")
    root_logger.warning("look out")
    prefix = rf"\[rank{rank}\]:\[titan\] \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} - root"
    expected = rf"{prefix} - INFO - hello\n" * shown + rf"{prefix} - WARNING - look out\n"
    assert re.fullmatch(expected, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("log_rank", "why"), [("first", "must be rank numbers"), ("-1", "must be rank numbers"), ("2,7", "are 0 to 1")]
)
def test_log_rank_must_be_ranks(
    root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, log_rank: str, why: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOG_RANK", log_rank)
    with pytest.raises(ConfigError, match=f"LOG_RANK={log_rank}: .*{why}"):
        init_logging(0)


# ---- metrics.jsonl and TensorBoard


def test_jsonl_appends_and_is_written_through(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [row(step=1, mfu=None), row(step=2)]
    for written, values in enumerate(rows, 1):
        sink = JsonlSink(path)
        sink.write(values)
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:written]
        sink.close()


def test_what_is_not_finite_is_null_in_jsonl(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(row(loss=math.nan, max_loss=math.inf, grad_norm=-math.inf))
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row(loss=None, max_loss=None, grad_norm=None)


class SmallDisk(io.FileIO):
    room = 700

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(data[: self.room])
        self.room -= written
        return written


def test_a_full_disk_delays_rows_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink._file._file = disk = SmallDisk(path, "ab")
    rows = [row(step=step) for step in range(1, 6)]
    for values in rows[:4]:
        sink.write(values)
    assert path.stat().st_size == 700
    assert caplog.text.count("metrics.jsonl CANNOT BE WRITTEN: [Errno 28] No space left on device") == 1
    with pytest.raises(TrainingError, match=r"metrics.jsonl lacks its last rows \(.*No space left on device\)"):
        recorder(sink).check_complete()
    disk.room = 1 << 20
    sink.write(rows[4])
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert "can be written again" in caplog.text
    recorder(sink).check_complete()


TAGS = {
    "loss_metrics/global_avg_loss": "loss",
    "loss_metrics/global_max_loss": "max_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "throughput(tps)": "tps",
    "tflops": "tflops",
    "mfu(%)": "mfu",
    "time_metrics/end_to_end(s)": "step_time_s",
    "time_metrics/data_loading(s)": "data_loading_s",
    "time_metrics/data_loading(%)": "data_loading_pct",
    "memory/max_active(GiB)": "memory_gib",
    "memory/max_active(%)": "memory_pct",
    "memory/max_reserved(GiB)": "reserved_gib",
    "memory/max_reserved(%)": "reserved_pct",
    "memory/num_alloc_retries": "num_alloc_retries",
    "memory/num_ooms": "num_ooms",
    "skipped_steps": "skipped_steps",
    "skipped_documents": "skipped_documents",
    "truncated_examples": "truncated_examples",
}


@pytest.mark.parametrize("unknown", [set(), {"mfu", "reserved_gib", "reserved_pct", "num_alloc_retries", "num_ooms"}])
def test_tensorboard_reads_back(tmp_path: Path, unknown: set[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    rows = [{**row(step=step, loss=7.5 - step), **dict.fromkeys(unknown)} for step in (1, 10)]
    for values in rows:
        sink.write(values)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = {tag for tag, key in TAGS.items() if key not in unknown}
    assert set(events.Tags()["scalars"]) == {*tags, BY_TOKENS}
    by_tokens = [(event.step, event.value) for event in events.Scalars(BY_TOKENS)]
    assert by_tokens == [(values["tokens_seen"], values["loss"]) for values in rows]
    for tag in tags:
        read = [(event.step, event.value) for event in events.Scalars(tag)]
        assert read == [(values["step"], pytest.approx(values[TAGS[tag]], rel=1e-6)) for values in rows]


@pytest.mark.parametrize("begins_after", [0, 1, 2])
def test_tensorboard_hides_what_is_made_again(tmp_path: Path, begins_after: int) -> None:
    """Also where a run begins again after step 0, that of a seed checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, losses in ((0, [9.0, 8.0, 7.0]), (begins_after, [5.0])):
        kept = enumerate([9.0, 8.0][:step], 1)
        earlier = [row(step=number, loss=loss, tokens_seen=2 * number - 1) for number, loss in kept]
        sink = TensorBoardSink(tmp_path, step, earlier)
        for number, loss in enumerate(losses, step + 1):
            sink.write(row(step=number, loss=loss, tokens_seen=2 * number - 1))
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in ("loss_metrics/global_avg_loss", BY_TOKENS):
        assert [event.value for event in events.Scalars(tag)] == [*[9.0, 8.0][:begins_after], 5.0]


def test_a_tensorboard_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "tb").touch()
    with pytest.raises(ConfigError, match="cannot be written: Not a directory") as raised:
        TensorBoardSink(tmp_path / "tb" / "rank_0")
    assert raised.value.key == "metrics.save_tb_folder"


def test_tensorboard_has_each_expert_of_a_few_and_each_layer_of_many() -> None:
    few = scalars_of({"expert_tokens": {"layers.1": [3, 1], "layers.2": [0, 0]}})
    assert (few["experts/tokens/layers.1/0"], few["experts/tokens/layers.1/1"]) == (3, 1)
    many = scalars_of({"expert_tokens": {f"layers.{i}": [3] + [1] * 255 for i in range(58)}})
    assert sum(tag.startswith("experts/") and value is not None for tag, value in many.items()) == 58
    assert many["experts/largest_share/layers.7"] == pytest.approx(3 / 258)


def test_tensorboard_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for values in (row(step=1), row(step=2, loss=math.nan, grad_norm=math.inf, skipped_steps=1)):
        sink.write(values)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss_metrics/global_avg_loss")] == [1]
    assert [e.step for e in events.Scalars("grad_norm")] == [1]
    assert [(e.step, e.value) for e in events.Scalars("skipped_steps")] == [(1, 0), (2, 1)]


VALIDATION = {"step": 100, "loss": 3.12341, "bits_per_byte": 1.23451, "tokens": 7, "time_s": 2.06}


def test_the_validation_line(caplog: pytest.LogCaptureFixture) -> None:
    for values, bits in ((VALIDATION, "1.2345"), ({**VALIDATION, "bits_per_byte": None}, "n/a")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            ConsoleSink().write_validation(values)
        assert caplog.messages == [f"validate step: 100  loss:  3.1234  bits per byte: {bits}  (2.1 s)"]
    with caplog.at_level(logging.INFO):
        ConsoleSink().write_validation({**VALIDATION, "accuracy": 0.25})
    assert "  bits per byte: 1.2345  accuracy: 0.2500  (2.1 s)" in caplog.messages[-1]


def test_validations_have_a_file_of_their_own(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", tmp_path / "validation.jsonl")
    sink.write_validation(VALIDATION)
    assert json.loads((tmp_path / "validation.jsonl").read_text()) == VALIDATION
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    sink.close()


def test_tensorboard_reads_validations_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.write_validation({**VALIDATION, "step": 1, "bits_per_byte": None})
    sink.write_validation(VALIDATION)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("validation_metrics/loss")] == [1, 100]
    assert [event.value for event in events.Scalars("validation_metrics/bits_per_byte")] == [pytest.approx(1.23451)]


def test_tensorboard_has_the_configuration_and_hparams_with_final_metrics(tmp_path: Path) -> None:
    """Without a list of options for the experiment, of which TensorBoard would take that of one run for all."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import plugin_data_pb2

    for name, lr in (("first", 0.5), ("second", 0.25)):
        sink = TensorBoardSink(tmp_path / "tb" / name)
        sink.describe("[optimizer]\nlr = 0.5\n", {"optimizer.lr": lr, "model.converters": ["x"]})
        for step in range(1, 5):
            sink.write(row(step=step, loss=float(step)))
        sink.write_validation(VALIDATION)
        sink.close()
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert {*events.Runs()} == {"tb/first", "tb/second"}
    for name in events.Runs():
        final = {tag: events.Scalars(name, tag)[-1].value for tag in events.Runs()[name]["scalars"] if "final" in tag}
        assert final["final/loss"] == 3.5
        assert final["final/validation_loss"] == pytest.approx(3.12341)
        (text,) = events.Tensors(name, "config/text_summary")
        assert b"    [optimizer]\n    lr = 0.5\n" in text.tensor_proto.string_val[0]
    content = events.PluginRunToTagToContent("hparams")["tb/second"]
    assert {*content} == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    hparams = start.session_start_info.hparams
    assert (hparams["optimizer.lr"].number_value, hparams["model.converters"].string_value) == (0.25, '["x"]')


# ---- the recorder


class Kept(list[Row]):
    def write(self, row: Row) -> None:
        self.append(row)

    def write_validation(self, row: Row) -> None:
        self.append({**row, "validation": True})

    def lacks(self) -> str:
        return ""

    def close(self, failed: bool = False) -> None:
        self.clear()


def recorder(*sinks: Sink, **options: int) -> Recorder:
    return Recorder(sinks, CPU, **{"flops_per_token": 1_000_000, "log_freq": 10, "last_step": 25, **options})


def log(recorder: Recorder, step: int, loss: float = 1.0) -> Row:
    recorder.log(step, loss=loss, max_loss=2.0, grad_norm=3.0, lr=4.0, skipped_steps=0, skipped_documents=0)
    assert recorder.last is not None
    return recorder.last


def test_logged_are_the_first_every_nth_and_the_last_step() -> None:
    assert [step for step in range(1, 26) if recorder().is_due(step)] == [1, 10, 20, 25]
    assert [step for step in range(1, 4) if recorder(log_freq=1, last_step=3).is_due(step)] == [1, 2, 3]


def test_a_window_holds_its_own_steps_alone() -> None:
    kept = Kept()
    made = recorder(kept, tokens_seen=1000)
    made.step_done(64, 256, data_loading_s=5.0)
    log(made, 1)
    start = time.perf_counter()
    for _ in range(4):
        made.step_done(64, 256, data_loading_s=0.01)
        time.sleep(0.02)
    entry = log(made, 5)
    elapsed = time.perf_counter() - start
    assert [entry["step"] for entry in kept] == [1, 5]
    assert entry["tokens_seen"] == 1000 + 5 * 256
    assert 0.08 <= 4 * entry["step_time_s"] <= elapsed * 1.5
    assert entry["tps"] * entry["step_time_s"] == pytest.approx(64)
    assert entry["tflops"] == pytest.approx(entry["tps"] * 1e6 / 1e12)
    assert entry["data_loading_s"] == pytest.approx(0.01)
    assert entry["data_loading_pct"] == pytest.approx(100 * 0.01 / entry["step_time_s"])
    assert (entry["step"], entry["loss"], entry["max_loss"], entry["grad_norm"], entry["lr"]) == (5, 1.0, 2.0, 3.0, 4.0)
    made.close()
    assert not kept


def test_a_row_has_the_keys_that_are_promised() -> None:
    made = recorder()
    made.step_done(1, 1, 0.0)
    promised = (
        "step loss max_loss grad_norm lr tps tflops mfu memory_gib memory_pct step_time_s data_loading_s tokens_seen"
    )
    entry = json.loads(json.dumps(log(made, 1)))
    assert set(promised.split()) <= entry.keys()
    assert set(TAGS.values()) <= entry.keys()
    assert [key for key in promised.split() if entry[key] is None] == ["mfu"]
    assert entry["memory_gib"] == pytest.approx(peak_memory(CPU).active / 2**30, rel=0.1)
    assert entry["memory_pct"] == pytest.approx(100 * entry["memory_gib"] * 2**30 / total_memory(CPU))


def test_mfu_is_over_the_bf16_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlite.metrics.recorder.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    made = recorder()
    made.step_done(64, 64, 0.0)
    entry = log(made, 1)
    assert entry["mfu"] == pytest.approx(100 * entry["tflops"] / 989.5)


def test_medians_leave_out_the_first_window() -> None:
    made = recorder()
    assert made.median("tps") is None
    made.remember(row(tps=1.0, mfu=None))
    assert made.median("tps") is None
    for tps in (10.0, 30.0, 20.0):
        made.remember(row(tps=tps, mfu=None))
    assert made.median("tps") == 20.0
    assert made.median("mfu") is None


def test_summary() -> None:
    made = recorder()
    assert summary(made, {}) == "stopped before the first step"
    made.tokens_seen = 12345
    for logged in (
        row(step=1, loss=9.0, tps=1.0, memory_gib=2.0, reserved_gib=3.0, reserved_pct=30.0),
        row(step=10, tps=1000.0, mfu=40.0, memory_gib=2.5, reserved_gib=2.6),
        row(step=20, loss=4.5, tps=2000.6, mfu=41.0, memory_gib=2.0, reserved_gib=2.6),
    ):
        made.remember(logged)
    title, *lines = summary(made, {"metrics": "outputs/metrics.jsonl"}).splitlines()
    assert title == "training stopped early"
    assert [re.split(r"\s{2,}", line.strip()) for line in lines] == [
        ["steps", "1 to 20 of 25"],
        ["tokens", "12,345"],
        ["loss", "9.0000 -> 4.5000"],
        ["median tps per device", "1,500"],
        ["median mfu", "40.50%"],
        ["peak memory", "3.00 GiB (30.00%)"],
        ["metrics", "outputs/metrics.jsonl"],
    ]
    made.remember(row(step=25))
    assert summary(made, {}).startswith("training finished\n")
    assert "skipped" not in summary(made, {})


def test_the_summary_of_a_run_that_continued_begins_with_its_first_step() -> None:
    """Which is not the first that was logged."""
    made = recorder(steps_before=15, tokens_seen=1500)
    made.remember(row(step=20, loss=5.0))
    lines = [re.split(r"\s{2,}", line.strip()) for line in summary(made, {}, start=9.0).splitlines()]
    assert ["steps", "16 to 20 of 25"] in lines
    assert ["loss", "9.0000 at step 1, 5.0000 -> 5.0000"] in lines


@pytest.mark.parametrize(
    ("options", "commands"),
    [
        ({}, {"run it again": "CONFIG_FILE='a b/config.toml' './my clone/run_train.sh'"}),
        ({"enable_checkpoint": True}, {"train longer": "CONFIG_FILE='a b/config.toml' './my clone/run_train.sh' --tr"}),
        ({"enable_checkpoint": True, "last_save_model_weights_only": True}, {}),  # it cannot be continued
    ],
)
def test_the_next_command_can_be_pasted(
    options: dict[str, bool], commands: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TITANLITE_COMMAND", "./my clone/run_train.sh")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = JobConfig(training=Training(steps=8), checkpoint=Checkpoint(**options))
    shown = next_command(config, Path("a b/config.toml"), 8, 1)
    assert shown.keys() == commands.keys()
    assert all(shown[purpose].startswith(command) for purpose, command in commands.items())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)  # and one process, which is not the default there
    assert all(command.startswith("NGPU=1 ") for command in next_command(config, Path("x"), 8, 1).values())


def test_no_text_moves_the_cursor(
    root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOG_RANK", raising=False)
    init_logging(0)
    root_logger.info("a \033[31mred\033[0m\tname\n of \033]52;c;x\a two\r lines \x9b2J")
    shown = "a \033[31mred\033[0m\tname\n of \\x1b]52;c;x\\x07 two\\r lines \\x9b2J\n"
    assert capsys.readouterr().out.endswith(shown)


@pytest.mark.parametrize(
    ("start", "losses", "end"),
    [
        (7.7, [7.7, *[9.0] * 19], 9.0),
        (7.7, [7.7, *[9.0] * 12, *[6.0] * 7], None),  # it came back
        (7.7, [7.7, *[6.0] * 95, 8.0, 6.0, 6.0, 6.0], None),  # one hard batch
        (7.7, [7.7, *[6.0] * 95, 9.0, 9.0, 5.0, 9.0], None),
        (7.7, [7.7, *[6.0] * 80, *[7.8] * 10], 7.8),  # a little, but for good
        (7.7, [7.7, *[7.8, 7.6] * 30], None),  # it learned nothing, but lost nothing
        (7.7, [7.7, 7.9], None),  # one batch
        (7.7, [7.7, 7e6, 7e6], 7e6),
        (7.7, [9.0] * 128, 9.0),  # of a run of 2000 steps, the last 128
        (7.7, [7.7], None),
        (7.7, [], None),
        (None, [9.0] * 20, None),
    ],
)
def test_a_loss_that_ends_above_where_it_began(start: float | None, losses: list[float], end: float | None) -> None:
    steps = 2000 if len(losses) == 128 else len(losses)
    assert end_above(start, losses, steps) == end
    made = recorder()
    made.remember(row(step=1, loss=7.7))
    made.remember(row(step=steps, loss=losses[-1] if losses else 7.7))
    title, *lines = summary(made, {}, start, losses).splitlines()
    assert ("ABOVE WHERE IT BEGAN" in title) == (end is not None)
    assert any("of step 1" in line for line in lines) == (end is not None)


def test_summary_of_a_run_that_skipped_steps() -> None:
    for loss, shown in ((math.nan, "nan"), (None, "not finite")):  # as seen, and as read back
        made = recorder()
        made.remember(row(step=1))
        made.remember(row(step=2, loss=loss, skipped_steps=3))
        lines = [re.split(r"\s{2,}", line.strip()) for line in summary(made, {}).splitlines()]
        assert ["loss", f"10.7069 -> {shown}"] in lines
        assert ["skipped steps", "3"] in lines
