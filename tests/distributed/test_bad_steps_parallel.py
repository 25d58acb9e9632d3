"""Bad steps in whole runs, however the model is spread: skipped on every rank, logged, no bit changed; or the end."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from tests.distributed import bad_steps
from tests.support.forks import on_ranks
from tests.support.runs import TINY, environment

pytestmark = pytest.mark.slow

OPTIONS = {
    **TINY,
    "model.flavor": "tiny",  # bad_steps.py registers it
    "training.steps": 10,
    "training.seq_len": 16,
    "training.global_batch_size": 4,
    "training.on_bad_step": "skip",
}
PARALLEL = "parallelism.{}_parallel_degree"
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"training.local_batch_size": 4}),
    "FSDP 2": (2, {"training.local_batch_size": 2}),
    "TP 2": (2, {PARALLEL.format("tensor"): 2}),
    "PP 2": (2, {PARALLEL.format("pipeline"): 2, "parallelism.pipeline_parallel_split_points": "layers.1"}),
    "FSDP 2 x TP 2": (4, {PARALLEL.format("tensor"): 2, "training.local_batch_size": 2}),
}
DELAYED = {  # float8 with state of its own
    "model__converters": "float8",
    **{f"float8__scaling_type_{operand}": "delayed" for operand in ("input", "weight", "grad_output")},
}
# About where the losses begin, as if 128 steps had come before; what is needed to see a spike.
WINDOW = [8.2 + 0.05 * math.sin(i) for i in range(128)]
BAD = {3: "nan", 5: "gradients", 6: "spike", 8: "inf"}
GOOD = [step for step in range(1, 11) if step not in BAD]


def case(way: str, bad: dict[int, str], **options: Any) -> dict[str, Any]:
    # What goes wrong with a loss goes wrong on all ranks that repeat it; with data parallelism, on one alone.
    given = {**OPTIONS, **WAYS[way][1], **{key.replace("__", "."): value for key, value in options.items()}}
    only = 1 if way == "FSDP 2" and "omitted" not in bad.values() else None
    return {"options": given, "bad": bad, "rank": only, "window": WINDOW}


def cases_of(way: str) -> dict[str, dict[str, Any]]:
    cases = {
        f"{way} skip": case(way, BAD),
        f"{way} omit": case(way, dict.fromkeys(BAD, "omitted")),
    }
    if way in ("one process", "FSDP 2"):
        in_a_row = {2: "nan", 4: "nan", 5: "spike", 6: "gradients"}
        cases[f"{way} in a row"] = case(way, in_a_row, training__max_skipped_in_a_row=3)
        cases[f"{way} stop"] = case(way, {4: "spike"}, training__on_bad_step="stop")
    if way == "one process":
        for_loop = {"optimizer__implementation": "for-loop"}
        cases["waiting skip"] = case(way, BAD, **for_loop)
        cases["waiting omit"] = case(way, dict.fromkeys(BAD, "omitted"), **for_loop)
        cases["float8 skip"] = case(way, BAD, **DELAYED)
        after_128 = case(way, {2: "spike", 131: "spike"}, training__steps=132, metrics__log_freq=130)
        cases["from the start"] = {**after_128, "window": []}
    return cases


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank reported, by case."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"on-{processes}")
        cases = {name: c for way, (n, _) in WAYS.items() if n == processes for name, c in cases_of(way).items()}
        ranks = on_ranks(processes, folder, environment(), bad_steps.report, cases, folder)
        by_case |= {name: [rank[name] for rank in ranks] for name in cases}
        by_case |= {f"on {processes}": [{"output": (folder / "output.txt").read_text()}]}
    return by_case


@pytest.mark.parametrize("way", [*WAYS, "waiting"])
def test_skipped_steps_change_no_bit_and_the_run_goes_on(reports: Any, way: str) -> None:
    skipping, omitting = reports[f"{way} skip"], reports[f"{way} omit"]
    for skipped, omitted in zip(skipping, omitting, strict=True):
        digests = skipped["digests"]
        for step in range(2, 11):
            assert (digests[step - 1] == digests[step - 2]) == (step in BAD), step
        assert digests == omitted["digests"]
        assert skipped["error"] is None
    rows, expected = skipping[0]["rows"], omitting[0]["rows"]
    for step in GOOD:
        for key in ("loss", "max_loss", "grad_norm", "lr", "tokens_seen"):
            assert rows[step - 1][key] == expected[step - 1][key], (step, key)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 2, 3, 3, 4, 4, 4]


def test_a_spike_is_one_after_128_good_steps(reports: Any) -> None:
    (report,) = reports["from the start"]
    (said,) = [line for line in report["said"] if "skipped" in line]
    assert said.startswith("step 131 skipped: loss ")
    same = [i + 2 for i, (a, b) in enumerate(itertools.pairwise(report["digests"])) if a == b]
    assert same == [131]
    assert [(row["step"], row["skipped_steps"]) for row in report["rows"]] == [(1, 0), (130, 0), (132, 1)]


def test_what_is_not_finite_does_not_stay_in_delayed_scales(reports: Any) -> None:
    """Of float8, which come from the steps before. A spike's gradients are a step of its history like any other."""
    (report,) = reports["float8 skip"]
    assert report["error"] is None
    assert [row["loss"] is None for row in report["rows"]] == [step in (3, 8) for step in range(1, 11)]
    assert all(7 < report["rows"][step - 1]["loss"] < 8.5 for step in GOOD)
    assert [a == b for a, b in itertools.pairwise(report["digests"])] == [step in BAD for step in range(2, 11)]


@pytest.mark.parametrize("way", WAYS)
def test_skipped_steps_are_logged_by_one_rank_and_counted(reports: Any, way: str) -> None:
    ranks = reports[f"{way} skip"]
    said = [line for line in ranks[0]["said"] if "skipped" in line]
    assert [line.split(":")[0] for line in said] == [f"step {step} skipped" for step in BAD]
    assert said[0] == "step 3 skipped: loss nan is not finite (skipped 1, 1 in a row)"
    assert said[1] == "step 5 skipped: grad_norm inf is not finite (skipped 2, 1 in a row)"
    assert "is a spike" in said[2]
    assert said[2].endswith("(skipped 3, 2 in a row)")
    assert said[3] == "step 8 skipped: loss inf is not finite (skipped 4, 1 in a row)"
    assert not any("skipped" in line for rank in ranks[1:] for line in rank["said"])
    rows = ranks[0]["rows"]
    assert [(rows[s - 1]["loss"], rows[s - 1]["max_loss"]) for s in (3, 8)] == [(None, None)] * 2
    assert [rows[s - 1]["grad_norm"] is None for s in BAD] == [True, True, False, True]
    assert rows[5]["loss"] > 100
    assert f"skipped steps{'':10}4" in reports[f"on {len(ranks)}"][0]["output"]


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_judge_alike_and_none_waits(reports: Any, way: str) -> None:
    ranks = reports[f"{way} skip"]
    assert all(rank["state"] == ranks[0]["state"] for rank in ranks)
    assert ranks[0]["state"]["losses"] == [*WINDOW, *(ranks[0]["rows"][step - 1]["loss"] for step in GOOD)][-128:]
    for rank in ranks:
        assert rank["waits"][1:] == [0] * 9  # in the first step, pipelining has something to find out
    if len(ranks) == 1:
        assert 0 not in reports["waiting skip"][0]["waits"]


@pytest.mark.parametrize("way", ["one process", "FSDP 2"])
def test_too_many_in_a_row_end_the_run_on_all_ranks(reports: Any, way: str) -> None:
    ranks = reports[f"{way} in a row"]
    for rank in ranks:
        assert rank["error"].startswith(
            "step 6: 3 skipped steps in a row, and training.max_skipped_in_a_row = 3; this one for grad_norm inf"
        )
        assert rank["error"] == ranks[0]["error"]
        assert rank["digests"][4] == rank["digests"][2]
    assert [row["step"] for row in ranks[0]["rows"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("way", ["one process", "FSDP 2"])
def test_a_spike_stops_the_run_on_all_ranks(reports: Any, way: str) -> None:
    ranks = reports[f"{way} stop"]
    for rank in ranks:
        assert "step 4: loss " in rank["error"]
        assert "standard deviations above the mean of the last 128 good steps (mean 8." in rank["error"]
        assert "--training.on_bad_step=skip" in rank["error"]
        assert rank["error"] == ranks[0]["error"]
        assert rank["state"]["skipped"] == 0
    assert [row["step"] for row in ranks[0]["rows"]] == [1, 2, 3]
