"""Runs that are killed, damaged and continued, in other ways too, end as the undisturbed run does, to the bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_launcher import start_in
from tests.support.runs import LITTLE, TINY, Run, checkpoints, faulty, run_trainer, saved

pytestmark = pytest.mark.slow

# What of a row is a result, not a measurement.
RESULTS = ("step", "loss", "max_loss", "grad_norm", "lr", "tokens_seen")

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"training__mixed_precision_param": "float32"},
    "bfloat16": {},
    "float8-moments": {"optimizer__moments": "float8_e4m3fn", "optimizer__implementation": "for-loop"},
    "int8-weights": {
        "model__converters": "int8",
        "int8__recipe_name": "weights",
        "optimizer__moments": "bfloat16",
        "optimizer__implementation": "for-loop",
    },
    "tensorwise": {"model__converters": "float8"},
    "rowwise": {"model__converters": "float8", "float8__recipe_name": "rowwise"},
    "delayed": {
        "model__converters": "float8",
        **{f"float8__scaling_type_{operand}": "delayed" for operand in ("input", "weight", "grad_output")},
    },
}
# Every pair of a precision, eager or compiled, saves that wait or not, and 1 or 2 processes occurs.
CASES = [
    ("float32", "eager", "disabled", 1),
    ("float32", "compile", "async", 2),
    ("float8-moments", "eager", "disabled", 2),
    ("int8-weights", "compile", "async", 2),
    ("bfloat16", "compile", "async_with_pinned_mem", 1),
    ("tensorwise", "eager", "async", 1),
    ("tensorwise", "compile", "disabled", 2),
    ("rowwise", "eager", "async", 2),
    ("rowwise", "compile", "disabled", 1),
    ("delayed", "eager", "disabled", 1),
    ("delayed", "compile", "async", 2),
]
# Those that touch each mechanism of a save; the others mix them anew.
TRIED = (
    "float32-eager-disabled-1",
    "rowwise-eager-async-2",
    "float8-moments-eager-disabled-2",
    "float32-compile-async-2",
    "delayed-eager-disabled-1",
)


def results(run: Run) -> list[list[Any]]:
    return [[row[key] for key in RESULTS] for row in run.rows()]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in TRIED else pytest.mark.long)
        for name, case in (("-".join(map(str, case)), case) for case in CASES)
    ],
)
def test_a_killed_run_ends_as_a_straight_one(tmp_path: Path, case: tuple[str, str, str, int]) -> None:
    precision, execution, mode, ngpu = case
    # Updates of moments are compiled even so; those of eager PyTorch are the same.
    env = {"TORCH_COMPILE_DISABLE": "1"} if execution == "eager" else {}
    options = {
        **LITTLE,
        **PRECISIONS[precision],
        **checkpoints(3, async_mode=mode),
        "training__compile": str(execution == "compile").lower(),
        "compile__backend": "aot_eager",  # the graphs; their code for the machine has no part in this
        "training__steps": 6,
        "timeout": 600,
        "env": env,
    }
    converters = ",".join(filter(None, [options.get("model__converters"), "fault"]))
    disturbed = tmp_path / "disturbed" / "checkpoint" / "step-3"
    fault = faulty(KILL_AFTER=5, KILL_NEEDS=disturbed, **env)
    straight = run_trainer(tmp_path, ngpu, "straight", **options)
    assert straight.status == 0, straight.output
    killed = run_trainer(tmp_path, ngpu, "disturbed", **{**options, **fault, "model__converters": converters})
    assert killed.status != 0
    assert [row["step"] for row in killed.rows()] == [1, 2, 3, 4]
    resumed = run_trainer(tmp_path, ngpu, "disturbed", **options)
    assert resumed.status == 0, resumed.output
    assert f"resuming from step 3: {disturbed}" in resumed.output
    assert results(resumed) == results(straight)
    for step in (3, 6):
        assert saved(resumed.folder, step) == saved(straight.folder, step)
    again = run_trainer(tmp_path, ngpu, "disturbed", **options)
    assert again.status == 0
    assert "nothing to do" in again.output
    assert results(again) == results(straight)


# ---- killed anywhere

LAST = 12
SMALL = {
    key.replace(".", "__"): value
    for key, value in TINY.items()
    if key not in ("training.steps", "training.local_batch_size")
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """Returns the run of a number of processes that nothing disturbs."""

    @cache
    def run(ngpu: int) -> Run:
        finished_run = run_trainer(tmp_path_factory.mktemp("undisturbed"), ngpu, **chain(ngpu))
        assert finished_run.status == 0, finished_run.output
        return finished_run

    return run


def chain(ngpu: int) -> dict[str, Any]:
    """The same global batch on 1 and 2 processes; all checkpoints are kept."""
    options = {"training__steps": LAST, "training__local_batch_size": 4 // ngpu}
    return {**checkpoints(1, keep_latest_k=0), **options}


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    yield from start_in(tmp_path)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("ngpu", "kills"), [(1, 2), pytest.param(1, 15, marks=pytest.mark.long), pytest.param(2, 8, marks=pytest.mark.long)]
)
def test_killed_at_random_moments(
    started: Any, undisturbed: Callable[[int], Run], tmp_path: Path, ngpu: int, kills: int
) -> None:
    """Each life saves after each step, slowly, so that most are killed while they save; the last one is left alone."""
    moments = random.Random(kills)
    folder, during_save = tmp_path / "run", 0
    root = folder / "checkpoint"
    options = chain(ngpu)
    slow = faulty(SLOW_WRITES=0.02)
    environment = {**slow.pop("env"), "CONFIG_FILE": ""}
    for life in range(kills):
        before = steps_in(root)
        mode = moments.choice(["disabled", "async", "async_with_pinned_mem"])
        given = {**SMALL, **options, **slow, "checkpoint__async_mode": mode}
        run = started(ngpu, run_folder=folder, env=environment, **given)
        run.wait_for("step: ", timeout=120)
        # A step and its save take about a second here.
        time.sleep(moments.uniform(0, 1.5))
        output = run.output()
        victims = [run.process.pid, *run.workers()]
        os.kill(moments.choice(victims), signal.SIGKILL)
        run.process.wait(timeout=90)
        end = time.monotonic() + 20
        while run.workers():
            assert time.monotonic() < end, f"life {life}: workers outlive the run"
            time.sleep(0.1)
        during_save += any(root.glob(".partial-*"))
        assert "is damaged" not in output
        if before and before[-1] == LAST:
            assert "nothing to do" in output
        elif before:
            assert f"resuming from step {before[-1]}: " in output
        else:
            assert "resuming" not in output
    last = run_trainer(tmp_path, ngpu, **options)
    assert last.status == 0, last.output
    assert results(last) == results(undisturbed(ngpu))
    assert saved(last.folder, LAST) == saved(undisturbed(ngpu).folder, LAST)
    assert not list(root.glob(".*"))
    assert during_save >= kills // 2, f"{during_save} of {kills} were killed during a save"


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ngpu", "kills"), [(1, (3,)), *(pytest.param(ngpu, (3, 7), marks=pytest.mark.long) for ngpu in (1, 2))]
)
def test_torchrun_starts_it_again_and_it_resumes(
    started: Any, undisturbed: Callable[[int], Run], ngpu: int, kills: tuple[int, ...]
) -> None:
    torchrun = ["--standalone", f"--nproc-per-node={ngpu}", "--max-restarts=3"]
    run = started(ngpu, torchrun=torchrun, **SMALL, **chain(ngpu))
    for step in kills:
        run.wait_for(f"/checkpoint/step-{step} saved in", timeout=120)
        os.kill(random.Random(step).choice(list(run.ranks().values())), signal.SIGKILL)
    assert run.process.wait(timeout=240) == 0, run.output()
    assert run.output().count("resuming from step") == len(kills)
    assert results(Run(0, "", run.folder)) == results(undisturbed(ngpu))
    assert saved(run.folder, LAST) == saved(undisturbed(ngpu).folder, LAST)


# ---- under another parallelism

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP 2": (2, {"training__local_batch_size": 2}),
    "1 process": (1, {}),
    "TP 2": (2, {"parallelism__tensor_parallel_degree": 2}),
    "PP 2": (
        2,
        {
            "parallelism__pipeline_parallel_degree": 2,
            "parallelism__pipeline_parallel_split_points": "layers.1",
            "training__local_batch_size": 2,
            "training__global_batch_size": 4,
        },
    ),
    "FSDP 4": (4, {"training__local_batch_size": 1}),
    "HSDP 2 x 2": (4, {"parallelism__data_parallel_replicate_degree": 2, "training__local_batch_size": 1}),
    "CP 2": (2, {"parallelism__context_parallel_degree": 2}),
    "FSDP 2 x TP 2": (4, {"parallelism__tensor_parallel_degree": 2, "training__local_batch_size": 2}),
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["FSDP 2", "1 process"], marks=pytest.mark.long),  # the beginning of the next
        pytest.param(["FSDP 2", "1 process", "TP 2", "PP 2", "FSDP 4"], marks=pytest.mark.slow),
        pytest.param(["TP 2", "FSDP 4", "PP 2", "TP 2"], marks=pytest.mark.long),
        pytest.param(["HSDP 2 x 2", "CP 2", "FSDP 2 x TP 2", "HSDP 2 x 2"], marks=pytest.mark.slow),
    ],
    ids=lambda names: " to ".join(names),
)
def test_a_run_goes_on_under_another_parallelism(tmp_path: Path, names: list[str]) -> None:
    """Two steps under each, from the checkpoint of the one before, in the same run folder."""
    last = 2 * len(names)
    common = {
        **LITTLE,
        **checkpoints(2),
        "training__mixed_precision_param": "float32",
        "lr_scheduler__decay_ratio": 0.0,
    }
    straight = run_trainer(tmp_path, 1, "straight", **common, training__steps=last)
    assert straight.status == 0, straight.output
    for i, name in enumerate(names):
        ngpu, way = WAYS[name]
        if i:
            assert_resaved_alike(tmp_path, 2 * i, ngpu, {**common, **way})
        run = run_trainer(tmp_path, ngpu, "changing", **{**common, **way, "training__steps": 2 * (i + 1)})
        assert run.status == 0, run.output
    rows, expected = run.rows(), straight.rows()
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert [row["tokens_seen"] for row in rows] == [row["tokens_seen"] for row in expected]
    # The position in every shard of the data: the documents seen are those of the straight run.
    data = [saved(r.folder, last)["checkpoint.json"]["data"] for r in (run, straight)]
    assert data[0] == data[1]


def assert_resaved_alike(tmp_path: Path, step: int, ngpu: int, options: dict[str, Any]) -> None:
    """Loading a checkpoint in one way and saving it again leaves every tensor as it was."""
    import torch

    from titanlite.checkpoint.storage import load, saved_shapes

    source = tmp_path / "changing" / "checkpoint" / f"step-{step}"
    run = run_trainer(
        tmp_path,
        ngpu,
        f"again-{step}",
        **options,
        checkpoint__initial_load_path=source,
        checkpoint__initial_load_model_weights_only="false",
        checkpoint__create_seed_checkpoint="true",
        training__steps=step + 1,
    )
    assert run.status == 0, run.output
    states = []
    for folder in (source, run.folder / "checkpoint" / f"step-{step}"):
        shapes = {name: shape for name, shape in saved_shapes(folder).items() if not name.startswith("random.")}
        states.append({name: torch.full(shape, float("nan")) for name, shape in shapes.items()})
        load(folder, states[-1])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    shutil.rmtree(run.folder)
