"""Validation under parallelism: the same numbers as on one process, and training that does not notice it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.combinations import SCHEDULES, VARIANTS, WAYS
from tests.distributed.test_parallel import ONE, SMALL, Cluster, Reports

pytestmark = pytest.mark.slow

PIPELINES = [f"PP 2 {name}" for name in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble") if name in SCHEDULES]
TESTED = ["FSDP 2", "TP 2", "CP 2 allgather", *PIPELINES]
WITH_TASK = ["FSDP 2"]
STEPS = {"training.steps": 3, "training.deterministic": "true"}
VALIDATION = {"validation.enable": "true", "validation.interval": 2, "validation.steps": 3}

# The weights stay what they are, so that models that compute their gradients in other ways have the same.
STILL = {"training.steps": 1, "optimizer.lr": 1e-30, **VALIDATION, "training.mixed_precision_param": "bfloat16"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("validation")
    text = folder / "text.txt"
    text.write_text("".join(f"Line {n} of what is validated on is not {n * n}.\n" for n in range(2000)))
    apart = {"validation.dataset": "text", "validation.dataset_path": str(text)}
    task = folder / "task.jsonl"
    examples = (
        {"context": f"Line {n}", "endings": ["of it", "is not"][:: n % 2 * 2 - 1], "label": 0} for n in range(50)
    )
    task.write_text("".join(json.dumps(example) + "\n" for example in examples))
    cluster = Cluster(folder)
    by_processes: dict[int, dict[str, dict[str, Any]]] = {1: {}, 2: {}}
    for way in (ONE, *TESTED):
        options, count = ({}, 1) if way == ONE else (WAYS[way].all_options(), WAYS[way].processes)
        common = {**SMALL, **STEPS, **options}
        by_processes[count][f"{way}, held out"] = {**common, **VALIDATION}
        by_processes[count][f"{way}, apart"] = {**common, **VALIDATION, **apart}
        by_processes[count][f"{way}, off"] = common
        if way in (ONE, *WITH_TASK):
            by_processes[count][f"{way}, task"] = {**common, **VALIDATION, "validation.tasks": str(task)}
    for count, cases in by_processes.items():
        cluster.run(count, cases)
    return cluster.reports


def values(reports: Reports, case: str, key: str = "loss") -> list[float]:
    return [row[key] for row in reports[case][0]["validation"]]


@pytest.mark.parametrize("data", ["held out", "apart"])
@pytest.mark.parametrize("way", TESTED)
def test_the_same_numbers_as_on_one_process(reports: Reports, way: str, data: str) -> None:
    one, many = f"{ONE}, {data}", f"{way}, {data}"
    assert values(reports, many, "step") == [2, 3]
    assert values(reports, many) == pytest.approx(values(reports, one), rel=1e-5)
    assert values(reports, many, "bits_per_byte") == pytest.approx(values(reports, one, "bits_per_byte"), rel=1e-5)
    assert values(reports, many, "tokens") == [3 * 8 * 32] * 2


@pytest.mark.parametrize("way", WITH_TASK)
def test_a_task_is_the_same_as_on_one_process(reports: Reports, way: str) -> None:
    """It is a single batch, of which each process gathers the weights."""
    assert values(reports, f"{way}, task", "examples") == [50, 50]
    assert values(reports, f"{way}, task", "accuracy") == values(reports, f"{ONE}, task", "accuracy")
    assert values(reports, f"{way}, task") == values(reports, f"{way}, held out")


def test_the_two_sets_are_not_the_same(reports: Reports) -> None:
    assert values(reports, f"{ONE}, apart") != values(reports, f"{ONE}, held out")


@pytest.mark.parametrize("way", [ONE, *TESTED])
def test_training_does_not_notice(reports: Reports, way: str) -> None:
    on, off = (reports[f"{way}, {case}"][0]["rows"] for case in ("apart", "off"))
    assert [(row["loss"], row["grad_norm"]) for row in on] == [(row["loss"], row["grad_norm"]) for row in off]


@pytest.mark.parametrize(
    ("way", "recipe"),
    [
        ("TP 2", "rowwise"),
        ("FSDP 2", "float8 delayed"),
        pytest.param("FSDP 2", "rowwise", marks=pytest.mark.long),
        pytest.param("FSDP 2", "compile, tensorwise, AC selective 2", marks=pytest.mark.long),
        pytest.param("TP 2", "float8 delayed", marks=pytest.mark.long),
        pytest.param("TP 2", "compile, tensorwise, AC selective 2", marks=pytest.mark.long),
    ],
)
def test_bfloat16_is_the_model_without_float8_to_the_bit(tmp_path: Path, way: str, recipe: str) -> None:
    converted = {**SMALL, **WAYS[way].all_options(), **STILL, **VARIANTS[recipe]}
    plain = {key: value for key, value in converted.items() if "float8" not in key and key != "model.converters"}
    in_bfloat16 = {**converted, "validation.precision": "bfloat16"}
    cluster = Cluster(tmp_path)
    cluster.run(2, {"converted": converted, "in bfloat16": in_bfloat16, "plain": plain})
    reports = cluster.reports
    assert values(reports, "in bfloat16") == values(reports, "plain")
    assert values(reports, "converted") != values(reports, "plain")
    assert reports["in bfloat16"][0]["rows"][0]["loss"] == reports["converted"][0]["rows"][0]["loss"]


@pytest.mark.parametrize(
    "ways", [[], pytest.param(["HSDP 2 x 2", "PP 2 x TP 2", "FSDP 2 x CP 2"], marks=pytest.mark.long)], ids=len
)
def test_the_same_numbers_in_two_dimensions(reports: Reports, tmp_path: Path, ways: list[str]) -> None:
    cluster, common = Cluster(tmp_path), {**SMALL, **STEPS, **VALIDATION}
    cases = {way: {**common, **WAYS[way].all_options()} for way in ways}
    cases["PP 2 x TP 2, chunks"] = {**common, **WAYS["PP 2 x TP 2"].all_options(), **VARIANTS["loss chunks"]}
    cluster.run(4, cases)
    for way in cases:
        for key in ("loss", "bits_per_byte", "tokens"):
            expected = pytest.approx(values(reports, f"{ONE}, held out", key), rel=1e-5)
            assert values(cluster.reports, way, key) == expected, (way, key)
