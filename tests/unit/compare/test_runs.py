"""The runs that ``titanlite compare`` finds, what they are called, and what it reads of them."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.support.synthetic_runs import Array, losses, write_run
from titanlite.commands import compare as command
from titanlite.compare import rows
from titanlite.compare.comparison import compare
from titanlite.compare.console_log import read_console_log
from titanlite.errors import ConfigError


def names(*paths: Path) -> list[str]:
    return [run.name for run in compare(paths).runs]


def test_runs_are_found(tmp_path: Path) -> None:
    few = losses(0)[0][:20]
    for name in ("runs/b", "runs/a", "runs/a/earlier/1", "runs/a/earlier/2", "runs/deep/er/c"):
        write_run(tmp_path / name, few)
    runs = tmp_path / "runs"
    assert names(runs) == ["a", "b", "c"]
    assert names(runs / "a") == ["1", "2", "a"]  # alone: with what it holds
    assert names(runs / "a", runs / "b") == ["a", "b"]
    assert names(runs / "a" / "earlier", runs / "b") == ["1", "2", "b"]
    assert names(runs / "b", runs / "b" / "metrics.jsonl", runs) == ["b", "a", "c"]


def test_what_cannot_be_read_in_a_folder_is_left_out(tmp_path: Path) -> None:
    """Such as a run that has no row yet; but not if it is named itself."""
    for name in "abc":
        write_run(tmp_path / name, losses(0)[0][: 0 if name == "b" else 20])
    comparison = compare([tmp_path])
    assert [run.name for run in comparison.runs] == ["a", "c"]
    (note,) = comparison.notes
    assert note.startswith(f"Left out: {tmp_path / 'b'}: ")
    with pytest.raises(ConfigError):
        compare([tmp_path, tmp_path / "b"])


@pytest.mark.parametrize("place", ["nothing", "empty", "no_rows"])
def test_no_run_is_an_error_with_the_path(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "no_rows", np.array([]))
    assert command.main([str(tmp_path / place)]) == 2
    assert place in capsys.readouterr().err


def test_a_pipe_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as ``<(ssh host cat torchtitan.log)``."""
    os.mkfifo(tmp_path / "pipe")
    assert command.main([str(tmp_path / "pipe")]) == 2
    assert "pipe: it is a pipe, a socket or a device; write its text to a file" in capsys.readouterr().err


def test_the_baseline(tmp_path: Path) -> None:
    few = losses(0)[0][:20]
    paths = [write_run(tmp_path / name, few) for name in "abc"]
    assert compare(paths).baseline.name == "a"
    assert compare(paths, "b").baseline.name == "b"
    assert compare(paths, str(paths[2])).baseline.name == "c"
    assert names(*paths[:2]) == ["a", "b"]
    assert [run.name for run in compare(paths[:2], str(paths[2])).runs] == ["c", "a", "b"]
    with pytest.raises(ConfigError) as error:
        compare(paths, "d")
    assert (error.value.key, error.value.value) == ("--baseline", "d")


def test_the_baseline_by_the_name_that_is_printed(tmp_path: Path) -> None:
    few, job = losses(0)[0][:20], {"job": {"name": "mine"}}
    paths = [write_run(tmp_path / "a", few, job), write_run(tmp_path / "b", few, job | {"optimizer": {"lr": 0.5}})]
    assert names(*paths) == ["mine lr=0.003", "mine lr=0.5"]
    assert compare(paths, "mine lr=0.5").baseline.path == paths[1]
    with pytest.raises(ConfigError) as error:  # the name of both
        compare(paths, "mine")
    assert "mine lr=0.003, mine lr=0.5" in str(error.value)


def test_a_baseline_is_one_run(tmp_path: Path) -> None:
    few = losses(0)[0][:20]
    paths = [write_run(tmp_path / f"runs/{name}", few) for name in "ab"]
    other = write_run(tmp_path / "c", few)
    with pytest.raises(ConfigError) as error:
        compare([other], str(tmp_path / "runs"))
    assert error.value.key == "--baseline"
    assert all(str(path) in str(error.value) for path in paths)
    write_run(paths[0] / "earlier" / "1", few)
    for place in (paths[0], paths[0] / "metrics.jsonl"):  # a run that holds an earlier one
        assert compare([other], str(place)).baseline.path == paths[0]
    assert compare([other, paths[1]], str(tmp_path / "c")).baseline.name == "c"


def test_names_have_what_changes_the_losses_of_runs_of_one_name(tmp_path: Path) -> None:
    few, job = losses(0)[0][:20], {"job": {"name": "mine"}}
    aside = {"checkpoint": {"interval": 7}, "comm": {"init_timeout_seconds": 9}, "compile": {"components": ["loss"]}}
    aside |= {"activation_checkpoint": {"mode": "full"}, "parallelism": {"data_parallel_shard_degree": 2}}
    other = {
        "float8": {"recipe_name": "rowwise"},
        "model": {"converters": ["float8"]},
        "lr_scheduler": {"warmup_steps": 3},
    }
    write_run(tmp_path / "a", few, job)
    write_run(tmp_path / "b", few, job | aside | {"optimizer": {"lr": 0.5}})
    write_run(tmp_path / "c", few, {"job": {"name": "other"}} | other)
    first, second, _ = names(tmp_path)
    assert first.startswith("mine lr=0.003 ")
    assert second.startswith("mine lr=0.5 ")
    assert "interval" not in second
    assert "recipe" not in second
    assert "mode=full" in second  # changes only the speed: after what changes the losses


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    few = losses(0)[0][:20]
    job = {"job": {"name": "mine"}}
    write_run(tmp_path / "a", few, job)
    write_run(tmp_path / "b", few, job | {"optimizer": {"lr": 0.5}})
    write_run(tmp_path / "c", few, job | {"optimizer": {"lr": 0.5}})
    write_run(tmp_path / "d", few)
    first, second, third, fourth = names(tmp_path)
    assert (first, fourth) == ("mine lr=0.003", "d")
    assert second == f"mine lr=0.5 ({tmp_path / 'b'})"
    assert third == f"mine lr=0.5 ({tmp_path / 'c'})"


def test_options_that_differ(tmp_path: Path) -> None:
    few = losses(0)[0][:20]
    options = {"model": {"converters": ["x"]}, "job": {"description": "y"}}
    comparison = compare([write_run(tmp_path / "a", few), write_run(tmp_path / "b", few, options)])
    assert comparison.options == {"model.converters": [[], ["x"]]}


# ---- reading rows


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    """A run that is being written, a row of another form, a step that stands there twice, values without a number."""
    a = write_run(tmp_path / "a", np.arange(20.0) + 2)
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 5.0}\nnothing\n[1]\n{"step": "x"}\n{"loss": 1}\n{"step": 21, "loss": NaN}\n')
        file.write('{"step": 22, "loss": null, "skipped_steps": 3}\n{"step": 23, "lo')
    (run,) = compare([a]).runs
    assert run.steps == 22
    assert run.metrics["loss"][-3] == 5.0
    assert np.isnan(run.metrics["loss"][-2:]).all()
    assert run.last("skipped_steps") == 3


def test_only_lines_that_are_no_rows_are_read_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is being written has one, and 20 such runs of 100,000 rows take seconds."""
    slow: list[int] = []
    by_line = rows._parsed_by_line

    def counted(text: bytes, wanted: list[str]) -> rows.Columns:
        slow.append(len(text))
        return by_line(text, wanted)

    monkeypatch.setattr(rows, "_parsed_by_line", counted)
    a = write_run(tmp_path / "a", np.arange(5000.0))
    lines = (a / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2000] = "no row\n"
    (a / "metrics.jsonl").write_text("".join(lines) + '{"step": 5001, "lo')
    (run,) = compare([a]).runs
    assert np.array_equal(run.metrics["step"], np.delete(np.arange(1, 5001), 2000))
    assert sum(slow) < 1 << 15 < (a / "metrics.jsonl").stat().st_size / 20


@pytest.mark.parametrize(
    "line", ["[" * 200_000, '{"a":' * 100_000, '{"step": 1e999, "loss": 1}', '{"step": 1' + "0" * 400 + "}"]
)
def test_hostile_rows_are_left_out(line: str, tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", np.arange(20.0))
    with (a / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    assert compare([a]).runs[0].steps == 20


def log_of(values: Array, torchtitan: bool) -> str:
    """A console log: torchtitan's of June 2025, with colours, or titanlite's."""
    when = "2025-06-04 08:{:02}:{:02},557 - root - INFO - "
    begin = "[rank0]:[titan] " + when.format(0, 0)
    if torchtitan:
        lines = [
            f"{begin}Starting job: Llama 3 8B training",
            f"{begin}Preparing c4 dataset from allenai/c4",
            f"{begin}Trainer is initialized with local batch size 1, global batch size 8, "
            "gradient accumulation steps 1, sequence length 8192, total steps 1000 (warmup 200).",
        ]
    else:
        lines = [f"{begin}my run", "    data             c4", "    tokens per step  65,536 = 8 sequences x 8192"]
    red, off = ("\x1b[31m", "\x1b[39m") if torchtitan else ("", "")
    for number, value in enumerate(values, 1):
        fields = (
            f"{red}step: {number:2}  \x1b[32mloss: {value:7.4f}  {off}grad_norm:  1.2345  memory: 30.99GiB(32.62%)  "
            f"tps: 7,034  tflops: 407.35  mfu: {'41.19%' if torchtitan else 'n/a'}"
        )
        for rank in (0, 1):
            lines.append(f"[rank{rank}]:[titan] {when.format(number // 60, number % 60)}{fields}")
    lines.append(f"{begin}validate step: 10  loss:  3.5000  memory: 30.99GiB(32.62%)")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("torchtitan", [True, False], ids=["torchtitan", "titanlite"])
def test_console_logs(torchtitan: bool, tmp_path: Path) -> None:
    first, second = losses(-1)
    log = tmp_path / "torchtitan.log"
    log.write_text(log_of(second, torchtitan))
    ours = write_run(tmp_path / "ours", first, {"training": {"dataset": "c4", "seq_len": 8192}}, tokens_per_step=65536)
    comparison = compare([ours, log])
    run = comparison.runs[1]
    assert run.name == ("Llama 3 8B training" if torchtitan else "torchtitan")
    assert run.steps == 600
    assert run.metrics["loss"] == pytest.approx(second, abs=6e-5)
    assert run.last("tokens_seen") == 600 * 65536
    assert run.last("hours") == pytest.approx(599 / 3600)
    assert (run.median("tps"), run.peak_memory()) == (7034, 30.99)
    assert run.median("mfu") == (41.19 if torchtitan else None)
    assert run.last_validation("loss") == 3.5
    sentence = comparison.verdicts[run.name]
    assert "lower loss" in sentence
    assert "tokenizer" in sentence  # which a log does not have
    log.write_text(log_of(second, torchtitan).replace("c4", "pile"))
    assert "other data" in next(iter(compare([ours, log]).verdicts.values()))


FIELDS = "grad_norm:  1.2345  memory: 30.99GiB(32.62%)  tps: 7,034  tflops: 407.35  mfu: N/A"


def log_of_rank(rank: int, values: Array) -> list[str]:
    begin = f"[rank{rank}]:[titan] 2026-08-04 08:{{:02}}:{{:02}},557 - root - INFO - "
    steps = enumerate(values, 1)
    return [f"{begin.format(n // 60, n % 60)}step: {n:2}  loss: {value:7.4f}  {FIELDS}" for n, value in steps]


def test_a_stage_of_a_pipeline_without_loss_does_not_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torchtitan logs a loss of -1 on ranks without the last stage."""
    first, second = losses(-1)
    ours = write_run(tmp_path / "ours", first)
    stage, last = log_of_rank(0, np.full(600, -1.0)), log_of_rank(7, second)
    (tmp_path / "both.log").write_text("\n".join(line for pair in zip(stage, last, strict=True) for line in pair))
    (tmp_path / "glued.log").write_text("\n".join(f"{line}{line.replace('loss: ', 'loss: 9')}" for line in last))
    assert compare([tmp_path / "glued.log"]).runs[0].metrics["loss"] == pytest.approx(second, abs=6e-5)
    (tmp_path / "stage.log").write_text("\n".join(stage))
    run = compare([ours, tmp_path / "both.log"]).runs[1]
    assert run.metrics["loss"] == pytest.approx(second, abs=6e-5)
    assert run.last("hours") == pytest.approx(599 / 3600)
    assert command.main([str(ours), str(tmp_path / "stage.log")]) == 2
    said = capsys.readouterr().err
    assert "rank0 in it has no loss" in said
    assert "LOG_RANK" in said


def test_rows_of_other_ranks_are_not_kept(tmp_path: Path) -> None:
    """A log of many ranks has 32 of a first stage, and 32 of the last."""
    values = losses(0)[0][:100]
    ranks = [log_of_rank(rank, values if rank >= 32 else np.full(100, -1.0)) for rank in range(64)]
    validation = ["[rank0]:validate step: 0  loss: -1.0000", "[rank32]:validate step: 0  loss:  9.5000"]
    lines = [*validation, *(line for step in zip(*ranks, strict=True) for line in step)]
    (tmp_path / "x.log").write_text("\n".join(lines))
    tracemalloc.start()
    log = read_console_log(tmp_path / "x.log")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert log.metrics["loss"] == pytest.approx(values, abs=6e-5)
    assert list(log.validation["loss"]) == [9.5]
    assert peak < 500_000  # with the rows of all ranks 2.9 MB


def test_a_log_of_torchtitan_of_2026(tmp_path: Path) -> None:
    first, second = losses(-1)
    begin = "[rank0]:[titan] 2026-08-04 08:00:00,557 - root - INFO - Trainer is initialized with "
    sizes = "8192 tokens per DP rank, 65536 tokens per train step, gradient accumulation steps 1, "
    sizes += "maximum context length 8192, total steps 1000 (warmup 200)"
    (tmp_path / "x.log").write_text("\n".join([begin + sizes, *log_of_rank(0, second)]))
    ours = write_run(tmp_path / "ours", first, {"training": {"dataset": "c4", "seq_len": 8192}}, tokens_per_step=65536)
    comparison = compare([ours, tmp_path / "x.log"])
    assert comparison.runs[1].facts == {"training.seq_len": 8192, "tokens per step": 65536}
    assert comparison.difference(comparison.runs[1], "loss", "tokens") is not None
    assert "not known if they have the same data, tokenizer." in comparison.verdicts["x"]


@pytest.mark.parametrize("said", ["", "2025-06-04 09:30:00,000 - root - INFO - Starting job: Llama 3 8B training\n"])
def test_a_log_that_was_continued(said: str, tmp_path: Path) -> None:
    """With colours and what moves the cursor, steps that stand there twice, a pause of an hour, and a loss of NaN."""
    begin, color = "[rank0]:[titan] 2025-06-04 ", "\x1b[32m"
    line = begin + "{:02}:{:02}:00,557 - root - INFO - \x1b[31mstep: {:2}  " + color + "loss: {:>7}\x1b[39m\n"
    first = [line.format(8, step, step, 9 - step / 10) for step in range(1, 11)]
    again = [line.format(9, 30 + step, step, "nan" if step > 17 else 5.0) for step in range(11 if said else 9, 21)]
    (tmp_path / "x.log").write_text("".join([*first, "\x1b[2K\r\n", said, *again]))
    (run,) = compare([tmp_path / "x.log"]).runs
    assert list(run.metrics["step"]) == [*range(1, 21)]
    assert run.metrics["loss"][9] == (8.0 if said else 5.0)
    assert run.diverged_at() == 18
    assert run.last("hours") == pytest.approx((9 + 9 if said else 9 + 11) / 60)
