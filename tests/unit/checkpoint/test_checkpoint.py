"""Checkpoints as users meet them: whole runs of the real command, with bad input and faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_launcher import start_in
from tests.support import runs
from tests.support.runs import LITTLE, Run, checkpoints, faulty, saved

run_trainer = partial(runs.run_trainer, **LITTLE)
WAYS = {1: {}, 2: {"training__local_batch_size": 2}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 2 processes with the checkpoints 2 and 4."""
    run = run_trainer(tmp_path_factory.mktemp("finished"), 2, **checkpoints(2), **WAYS[2], training__steps=4)
    assert run.status == 0, run.output
    return run


@pytest.fixture
def again(finished: Run, tmp_path: Path) -> Any:
    """Runs the same command to step 6, in a copy of the folder."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return partial(run_trainer, tmp_path, 2, **{**checkpoints(2), **WAYS[2], "training__steps": 6})


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    yield from start_in(tmp_path)


def steps(run: Run) -> list[int]:
    return [row["step"] for row in run.rows()]


def refused(run: Run, *parts: str, status: int = 2) -> None:
    assert run.status == status, run.output
    assert run.output.count("titanlite: error:") == 1, run.output
    assert "Traceback" not in run.output
    for part in parts:
        assert part in run.output, f"no {part!r} in:\n{run.output}"


# ---- damage


FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "checkpoint.json", "SHA256SUMS"]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_fallen_back_from(again: Any, tmp_path: Path, name: str) -> None:
    """One byte flipped in each file, a file cut short, a file missing: named, and the run goes on from the one
    before."""
    root = tmp_path / "run" / "checkpoint"
    file = root / "step-4" / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    run = again()
    refused(run, f"{root / 'step-4'} is damaged: {name} is changed", "--checkpoint.fallback")
    assert steps(run) == [1, 2, 3, 4]
    file.unlink()
    run = again(checkpoint__fallback="true")
    assert run.status == 0, run.output
    assert f"{name} is missing" in run.output
    assert f"resuming from step 2: {root / 'step-2'}" in run.output
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in root.iterdir()) == ["damaged-step-4", "step-2", "step-4", "step-6"]


def test_nothing_to_fall_back_to_is_an_error(again: Any, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoint"
    for step in (2, 4):
        file = root / f"step-{step}" / "__1_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
    refused(again(checkpoint__fallback="true"), "step-2 is damaged: __1_0.distcp is changed", "none before it to fall")


def test_without_verification_nothing_is_read_twice(again: Any) -> None:
    run = again(checkpoint__verify="false")
    assert run.status == 0
    assert "verified" not in run.output
    assert "verified in" in again(training__steps=8).output


# ---- bad input

STATELESS = {"optimizer__name": "SGD", "optimizer__implementation": "for-loop"}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"checkpoint__load_step": 3}, ["checkpoint.load_step = 3", "has no such checkpoint; there are 2, 4"]),
        (
            {"model__flavor": "wide", "model__args__dim": 128},
            ["of another model", "dim was 64, is 128", "flavor was debugmodel, is wide"],
        ),
        (
            {
                "model__args__dim": 128,
                "checkpoint__initial_load_path": "run/checkpoint/step-4",
                "job__dump_folder": "x",
            },
            [
                "of another model",
                "dim was 64, is 128",
                "attention.wk.weight [32, 64], in the model [64, 128]",
            ],
        ),
        ({"optimizer__name": "SGDM"}, ["was saved by another optimizer", "exclude_from_loading=optimizer"]),
        ({**STATELESS}, ["was saved by another optimizer", "exclude_from_loading=optimizer"]),
        ({"training__seed": 1}, ["place in the data does not fit this run: seed was 0, is 1"]),
        ({"training__seq_len": 16}, ["seq_len was 32, is 16"]),
        (
            {"checkpoint__initial_load_path": "nowhere", "job__dump_folder": "x"},
            ['checkpoint.initial_load_path = "nowhere"', "there is no such folder"],
        ),
        (
            {"checkpoint__initial_load_path": ".", "job__dump_folder": "x"},
            ['checkpoint.initial_load_path = "."', "it has no checkpoint.json"],
        ),
    ],
    ids=[
        "load_step",
        "model",
        "initial model",
        "optimizer",
        "stateless",
        "seed",
        "seq_len",
        "nowhere",
        "no checkpoint",
    ],
)
def test_what_does_not_fit_is_one_message(
    again: Any, tmp_path: Path, options: dict[str, Any], parts: list[str]
) -> None:
    (tmp_path / "own.py").write_text(
        """
import torch
from dataclasses import replace
from titanlite.models.llama3.spec import FLAVORS
from titanlite.optim import register_optimizer

FLAVORS["wide"] = replace(FLAVORS["debugmodel"], dim=128)

@register_optimizer("SGDM")
def sgdm(params, options):
    return torch.optim.SGD(params, lr=options.lr, momentum=0.9)
"""
    )
    refused(again(experimental__custom_import="own", **options), *parts)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"load_step": 2}, ["checkpoint.load_step = 2", "no effect without checkpoints"]),
        ({"async_mode": "async"}, ['checkpoint.async_mode = "async"', "set checkpoint.enable_checkpoint too"]),
        ({"initial_load_model_weights_only": "false"}, ["no effect without checkpoint.initial_load_path"]),
        ({"enable_checkpoint": "true", "export_dtype": "bfloat16"}, ["last_save_model_weights_only"]),
        ({"exclude_from_loading": "optimizer"}, ["no effect where nothing but weights is loaded"]),
        (
            {"enable_checkpoint": "true", "initial_load_path": "x", "exclude_from_loading": "optimizer"},
            ["no effect where nothing but weights is loaded"],
        ),
        ({"enable_checkpoint": "true", "fallback": "true", "verify": "false"}, ["set checkpoint.verify"]),
        (
            {"enable_checkpoint": "true", "exclude_from_loading": "lr_scheduler"},
            ["function of the step", "train_state"],
        ),
        ({"enable_checkpoint": "true", "exclude_from_loading": "model"}, ['each one of "optimizer"']),
        ({"enable_checkpoint": "true", "load_step": 2}, ["checkpoint.load_step = 2", "there is none"]),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, options: dict[str, Any], parts: list[str]) -> None:
    refused(run_trainer(tmp_path, **{f"checkpoint__{key}": value for key, value in options.items()}), *parts)


# ---- what is loaded, and what is kept


def test_load_step_sets_later_ones_aside(again: Any, tmp_path: Path, finished: Run) -> None:
    run = again(checkpoint__load_step=2)
    assert run.status == 0, run.output
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in run.rows()][:2] == finished.losses()[:2]
    (aside,) = run.folder.glob("earlier/*/checkpoint")
    assert [path.name for path in aside.iterdir()] == ["step-4"]


def test_parts_can_be_left_out(again: Any, tmp_path: Path) -> None:
    """Then it is another run: what there was is set aside as a whole, and as many steps are made as are asked for."""
    everything = {"checkpoint__exclude_from_loading": "optimizer,dataloader,train_state,lr_scheduler"}
    run = again(**everything, training__steps=4)  # which the run before had made
    assert run.status == 0, run.output
    assert steps(run) == [1, 2, 3, 4]
    assert run.rows()[0]["lr"] < run.rows()[1]["lr"]
    assert run.rows()[0]["tokens_seen"] == 128
    assert sorted(path.name for path in (run.folder / "checkpoint").iterdir()) == ["step-2", "step-4"]
    (aside,) = run.folder.glob("earlier/*")
    assert sorted(path.name for path in aside.iterdir()) == [
        "checkpoint",
        "config.toml",
        "data_identity.json",
        "metrics.jsonl",
        "tokenizer",
    ]
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 4


def test_what_is_read_of_a_continued_run_is_one_run(tmp_path: Path) -> None:
    """Each step once, in metrics.jsonl, validation.jsonl and TensorBoard, though steps 5 and 6 were made twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    validation = {"validation__enable": "true", "validation__interval": 2, "validation__steps": 1}
    options = {**checkpoints(4), **validation, "metrics__enable_tensorboard": "true"}
    kill = faulty(KILL_AFTER=6, KILL_NEEDS=tmp_path / "run" / "checkpoint" / "step-4")
    assert run_trainer(tmp_path, **options, **kill, model__converters="fault", training__steps=8).status != 0
    run = run_trainer(tmp_path, **options, training__steps=8)
    assert run.status == 0, run.output
    assert steps(run) == [*range(1, 9)]
    rows = (run.folder / "validation.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4, 6, 8]
    events = EventAccumulator(str(next((run.folder / "tb").iterdir()))).Reload()
    assert [event.step for event in events.Scalars("loss_metrics/global_avg_loss")] == [*range(1, 9)]
    assert [event.step for event in events.Scalars("validation_metrics/loss")] == [2, 4, 6, 8]


@pytest.mark.slow
def test_another_run_can_begin_with_the_weights_or_with_everything(again: Any, tmp_path: Path, finished: Run) -> None:
    source = tmp_path / "run" / "checkpoint"  # the folder of several: the latest
    weights = again(name="weights", checkpoint__initial_load_path=source, training__steps=2)
    assert weights.status == 0, weights.output
    assert "its weights loaded" in weights.output
    assert steps(weights) == [1, 2]
    assert weights.losses()[0] < finished.losses()[0]
    full = {"checkpoint__initial_load_path": source, "checkpoint__initial_load_model_weights_only": "false"}
    everything = again(name="everything", **full)
    assert everything.status == 0, everything.output
    assert steps(everything) == [5, 6]
    straight = again()
    assert everything.losses() == straight.losses()[4:]
    assert saved(everything.folder, 6) == saved(straight.folder, 6)
    refused(again(name="other", **full, training__steps=4), "training.steps = 4", "is at step 6 already")


def test_a_last_save_of_weights_alone(tmp_path: Path) -> None:
    weights = {"last_save_model_weights_only": "true", "export_dtype": "bfloat16", "keep_latest_k": 1}
    options = {**checkpoints(2, **weights), "training__steps": 4}
    run = run_trainer(tmp_path, **options)
    assert run.status == 0, run.output
    root = run.folder / "checkpoint"
    assert [path.name for path in root.iterdir()] == ["step-4"]
    assert 0.67e6 < (root / "step-4" / "__0_0.distcp").stat().st_size < 0.73e6  # 0.336 M parameters, 2 bytes each
    assert json.loads((root / "step-4" / "checkpoint.json").read_text())["weights_only"]
    refused(run_trainer(tmp_path, **{**options, "training__steps": 6}), "has weights only", "initial_load_path=")
    other = run_trainer(tmp_path, name="other", **checkpoints(2, initial_load_path=root / "step-4"))
    assert other.status == 0, other.output


def test_which_are_saved_and_kept(tmp_path: Path) -> None:
    options = checkpoints(2, keep_latest_k=2, enable_first_step_checkpoint="true")
    run = run_trainer(tmp_path, **options, training__steps=5)
    assert run.status == 0, run.output
    for step in (1, 2, 4, 5):
        assert f"step {step}: checkpoint" in run.output
    assert sorted(path.name for path in (run.folder / "checkpoint").iterdir()) == ["step-4", "step-5"]


def test_a_seed_checkpoint_is_the_beginning(tmp_path: Path) -> None:
    seed = run_trainer(tmp_path, name="seed", **checkpoints(2, create_seed_checkpoint="true"))
    assert seed.status == 0, seed.output
    assert not (seed.folder / "metrics.jsonl").exists()  # no step was made
    source = {"initial_load_path": seed.folder / "checkpoint"}
    refused(
        run_trainer(tmp_path, name="seed", **checkpoints(2, create_seed_checkpoint="true")), "has checkpoints already"
    )
    one = run_trainer(tmp_path, name="one", **checkpoints(2, **source), training__seed=0)
    assert one.losses() == run_trainer(tmp_path, name="other", **checkpoints(2)).losses()
    assert run_trainer(tmp_path, name="seed", **checkpoints(2)).losses() == one.losses()


def test_a_run_that_drew_its_seed_keeps_it(tmp_path: Path) -> None:
    options = {**checkpoints(2), "training__seed": "none"}
    assert run_trainer(tmp_path, **options, training__steps=2).status == 0
    run = run_trainer(tmp_path, **options, training__steps=4)
    assert run.status == 0, run.output
    assert steps(run) == [1, 2, 3, 4]


def test_optimizer_state_is_that_of_the_parameters_that_have_some(tmp_path: Path) -> None:
    """A parameter without gradients has no state before, and none after; an optimizer without state needs none."""
    (tmp_path / "own.py").write_text(
        """
import torch
from titanlite.converters import register_converter

@register_converter("unused")
class Unused:
    def __init__(self, config, mesh): pass
    def convert(self, model):
        norm = model.norm
        norm.extra = torch.nn.Parameter(torch.empty(4, device="meta"))
        initial = model.init_weights
        model.init_weights = torch.no_grad()(lambda weights: (initial(weights), weights.ones(norm.extra)))
        return "a parameter that nothing uses"
    def post_optimizer_hook(self, model): pass
"""
    )
    for name, case_options in (("unused", {"model__converters": "unused"}), ("stateless", STATELESS)):
        options = {**checkpoints(2), **case_options, "experimental__custom_import": "own"}
        first = run_trainer(tmp_path, name=name, **options, training__steps=2)
        assert first.status == 0, first.output
        run = run_trainer(tmp_path, name=name, **options, training__steps=4)
        assert run.status == 0, run.output
        assert steps(run) == [1, 2, 3, 4]
    refused(run_trainer(tmp_path, name="stateless", **checkpoints(2), training__steps=6), "by another optimizer")


def test_a_generator_that_was_not_there_begins_from_the_seed(tmp_path: Path) -> None:
    """As when a run of the CPU goes on on a GPU, here with a generator made up."""
    (tmp_path / "own.py").write_text(
        """
import torch
from titanlite.checkpoint import reader

known = reader.random_state
reader.random_state = lambda rank, device: {**known(rank, device), f"random.{rank}.cuda": torch.zeros(16)}
"""
    )
    assert run_trainer(tmp_path, **checkpoints(2), training__steps=2).status == 0
    run = run_trainer(tmp_path, **checkpoints(2), training__steps=4, experimental__custom_import="own")
    assert run.status == 0, run.output
    assert "random.0.cuda begins from the seed" in run.output


# ---- signals and disks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "number", "ngpu"),
    [
        ("async", signal.SIGINT, 2),
        pytest.param("disabled", signal.SIGTERM, 1, marks=pytest.mark.long),
        pytest.param("disabled", signal.SIGINT, 2, marks=pytest.mark.long),
        pytest.param("async", signal.SIGTERM, 1, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_and_ends_with_0(started: Any, tmp_path: Path, ngpu: int, number: int, mode: str) -> None:
    run = started(ngpu, **checkpoints(100000, async_mode=mode))
    run.wait_for("step:  3")
    begin = time.monotonic()
    run.process.send_signal(number)
    assert run.process.wait(timeout=60) == 0, run.output()
    took = time.monotonic() - begin
    (folder,) = (run.folder / "checkpoint").iterdir()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert folder.name == f"step-{rows[-1]['step']}"
    # A step, its save (74 MB) and the end of the process, on a busy machine.
    assert took < 15, f"{took:.1f} s"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_signal_during_a_save_ends_with_that_one(started: Any, tmp_path: Path, mode: str) -> None:
    slow = faulty(SLOW_WRITES=0.005)
    run = started(1, env=slow.pop("env"), **LITTLE, **checkpoints(3, async_mode=mode), **slow)
    folder = run.folder / "checkpoint"
    while not list(folder.glob(".partial-*")):
        assert run.process.poll() is None, run.output()
        time.sleep(0.02)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) == 0, run.output()
    saved_ = [path.name for path in folder.iterdir()]
    # In the background a step has begun meanwhile, or more.
    assert saved_ == ["step-3"] if mode == "disabled" else "step-3" in saved_
    assert run.output().count("saved in") == len(saved_) <= 2


@pytest.mark.slow
def test_a_signal_during_a_validation_ends_it(started: Any, tmp_path: Path) -> None:
    run = started(1, **checkpoints(100000), validation__enable="true", validation__interval=2, validation__steps=2000)
    run.wait_for("step:  2")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=20) == 0, run.output()
    assert "the validation after step 2 is left out" in run.output()
    assert [path.name for path in (run.folder / "checkpoint").iterdir()] == ["step-2"]


@pytest.mark.slow
def test_the_run_goes_on_when_a_save_fails(started: Any, tmp_path: Path) -> None:
    run = started(1, **checkpoints(3), metrics__log_freq=1)
    run.wait_for("/checkpoint/step-3 saved in")
    root = run.folder / "checkpoint"
    root.rename(root.with_name("elsewhere"))
    root.touch()  # no folder can be made here
    run.wait_for("THE CHECKPOINT COULD NOT BE SAVED")
    run.wait_for("Training goes on")
    root.unlink()
    root.with_name("elsewhere").rename(root)
    before = len(run.output())
    end = time.monotonic() + 60
    while "saved in" not in run.output()[before:]:
        assert time.monotonic() < end
        time.sleep(0.1)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) == 0
    assert "Traceback" not in run.output()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_failed_save_stops_the_run_by_option(tmp_path: Path, mode: str) -> None:
    (tmp_path / "run").mkdir()
    options = checkpoints(2, on_save_failure="stop", async_mode=mode, folder="file/inside")
    (tmp_path / "run" / "file").touch()
    run = run_trainer(tmp_path, **options, training__steps=20)
    refused(run, "THE CHECKPOINT COULD NOT BE SAVED", "there is no checkpoint", status=1)
    assert 2 <= steps(run)[-1] <= 5


FULL = """
set -e
mount -t tmpfs -o size=200m none {folder}
dd if=/dev/zero of={folder}/filler bs=1M count=60 status=none
{command} > {log} 2>&1 &
run=$!
until grep -q "COULD NOT BE SAVED" {log}; do sleep 0.1; kill -0 $run; done
ls {folder}/checkpoint > {log}.there
rm {folder}/filler
until grep -q "step-{later} saved in" {log}; do sleep 0.1; kill -0 $run; done
kill -TERM $run
wait $run
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """In a file system of 200 MB, 60 of them taken: one checkpoint of 74 MB fits, the second does not."""
    from tests.support.runs import command, environment

    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    options = {key.replace("__", "."): value for key, value in checkpoints(2, keep_latest_k=1).items()}
    given = " ".join(map(str, command(folder, {**options, "training.steps": 100000})))
    script = FULL.format(folder=folder, command=given, log=log, later="1[0-9]")
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{done.stderr}\n{log.read_text()}"
    assert "No space left on device" in log.read_text()
    assert Path(f"{log}.there").read_text() == "step-2\n"


@pytest.mark.slow
def test_slow_saves_in_the_background_do_not_pile_up(tmp_path: Path) -> None:
    options = {**checkpoints(1, async_mode="async"), **faulty(SLOW_WRITES=0.006), "training__steps": 4}
    run = run_trainer(tmp_path, **options)
    assert run.status == 0, run.output
    assert "for the checkpoint before; raise checkpoint.interval" in run.output
    assert len(list((run.folder / "checkpoint").iterdir())) == 4


@pytest.mark.long  # test_run_folder and test_launcher have it for runs without checkpoints
def test_two_cannot_write_to_one_run(started: Any, tmp_path: Path) -> None:
    run = started(1, run_folder=tmp_path / "run", **checkpoints(1))
    run.wait_for("step-2 saved in")
    second = run_trainer(tmp_path, **checkpoints(1))
    refused(second, "another run")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.process.wait(timeout=60) == 0
