"""FSDP2 with float8 all-gather, on gloo processes: the same numbers as without, for one byte per weight element."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.distributed import float8_fsdp
from tests.distributed.float8_fsdp import DIM, HIDDEN, MICROBATCHES, STEPS
from tests.support.forks import on_ranks
from tests.support.runs import environment

# What all tests look at is trained once, in the set-up of the first; on a busy machine that takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
LINEARS = 6
OFF, ON, PRECOMPUTED = (False, False), (True, False), (True, True)
# Everything else that is gathered, in bytes per weight element: the norms and biases in bf16.
OTHERS = 2 * (2 * DIM) * 2 / (2 * 3 * DIM * HIDDEN)
SCALES = 4 * 2 * (2 * HIDDEN + DIM) / (2 * 3 * DIM * HIDDEN)  # a float32 for each row


def variants(compiled_recipes: list[str]) -> list[dict[str, Any]]:
    return [
        {"recipe": recipe, "gather": gather, "precompute": precompute, "compiled": compiled}
        for compiled, recipes in ((False, RECIPES), (True, compiled_recipes))
        for recipe in recipes
        for gather, precompute in ((OFF, PRECOMPUTED) if compiled else (OFF, ON, PRECOMPUTED))
    ]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Of rank 0 and the last rank, by (processes, recipe, (gather, precompute), compiled)."""
    by_variant: dict[Any, Any] = {}
    items = [item for item in request.session.items if item.path == request.path]
    tests = [item.callspec.params for item in items if hasattr(item, "callspec")]
    worlds = {1, 2} | {test.get("world", 1) for test in tests}
    compiled = {"tensorwise"} | {test.get("recipe", "tensorwise") for test in tests if test.get("compiled")}
    for world in sorted(worlds):
        asked = variants(sorted(compiled) if world == 2 else [])
        folder = tmp_path_factory.mktemp(f"float8-{world}")
        reports = on_ranks(world, folder, environment(), float8_fsdp.report, asked, timeout=900)
        for rank in {0, world - 1}:
            for result in reports[rank]:
                v = result["variant"]
                key = (world, v["recipe"], (v["gather"], v["precompute"]), v["compiled"])
                by_variant.setdefault(key, []).append(result)
    return by_variant


CASES = {"1": (1, False), "2": (2, False), "2 compiled": (2, True), "4": (4, False)}


def each_case(recipes: list[str], names: Iterable[str] = CASES) -> pytest.MarkDecorator:
    """The graphs of rowwise_with_gw_hp differ from rowwise's in the last matmul alone; 4 processes are as 2."""
    return pytest.mark.parametrize(
        ("world", "compiled", "recipe"),
        [
            pytest.param(
                *(*CASES[name], recipe),
                id=f"{name}-{recipe}",
                marks=[pytest.mark.long] if name == "4" or (CASES[name][1] and "gw_hp" in recipe) else [],
            )
            for name in names
            for recipe in recipes
        ],
    )


@each_case(RECIPES)
def test_on_and_off_are_the_same(results: Any, world: int, compiled: bool, recipe: str) -> None:
    off, on = (results[world, recipe, mode, compiled][0] for mode in (OFF, PRECOMPUTED))
    if not compiled:
        lazy = results[world, recipe, ON, compiled][0]
        assert on["losses"] == lazy["losses"]
        assert on["weights"] == lazy["weights"]
    assert on["losses"][0] == off["losses"][0]  # the same forward
    if recipe == "tensorwise":
        assert on["losses"] == off["losses"]
        assert on["norms"] == off["norms"]
        assert on["weights"] == off["weights"]
    else:
        # The operand of grad_input is derived from the gathered bytes: its rounding differs where they underflow.
        assert on["norms"][0] == pytest.approx(off["norms"][0], rel=2e-3)
        assert on["losses"] == pytest.approx(off["losses"], rel=1e-3)
    assert off["losses"][-1] < off["losses"][0]  # it learns


@each_case(RECIPES)
@pytest.mark.parametrize("mode", [OFF, PRECOMPUTED], ids=["off", "on"])
def test_against_one_process(results: Any, world: int, compiled: bool, recipe: str, mode: Any) -> None:
    one = results[1, recipe, OFF, False][0]["losses"]
    assert results[world, recipe, mode, compiled][0]["losses"] == pytest.approx(one, rel=5e-3)


@each_case(RECIPES, ["2", "2 compiled", "4"])
def test_one_byte_per_element(results: Any, world: int, compiled: bool, recipe: str) -> None:
    off, on = (results[world, recipe, mode, compiled][0] for mode in (OFF, PRECOMPUTED))
    assert off["bytes_per_element"] == pytest.approx(2 + OTHERS, rel=1e-6)
    expected = 1 + OTHERS + (0 if recipe == "tensorwise" else SCALES)
    assert on["bytes_per_element"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_reductions_for_the_scales(results: Any, world: int, recipe: str) -> None:
    """Once per weight and optimizer step for tensor scales, one for all of them when precomputed, none for rows;
    however many microbatches there are (two) and times that a weight is gathered."""
    assert MICROBATCHES > 1
    on, precomputed = (results[world, recipe, mode, False][0] for mode in (ON, PRECOMPUTED))
    tensorwise = recipe == "tensorwise"
    assert on["calls"].get("all_reduce", 0) == (LINEARS if tensorwise else 0)
    assert on["hook_calls"] == {}
    assert precomputed["calls"].get("all_reduce", 0) == 0
    assert precomputed["hook_calls"] == ({"all_reduce": 1} if tensorwise else {})


def test_compiled_once(results: Any) -> None:
    for (_, _, _, compiled), (result, *_) in results.items():
        # Two blocks share their code, and after the first step nothing is compiled any more.
        assert result["frames"][0] == result["frames"][-1]
        assert (result["frames"][0] > 0) == compiled
        assert len(result["losses"]) == STEPS


def test_state_dicts_are_plain(results: Any) -> None:
    assert all(result["plain_state"] for ranks in results.values() for result in ranks)
    assert all(result["plain_moments"] for ranks in results.values() for result in ranks)


def test_no_gathered_weight_is_stale(results: Any) -> None:
    for result, *_ in results.values():
        as_trained, halved, quartered, restored = result["after_writes"]
        assert len({as_trained, halved, quartered}) == 3
        assert restored == as_trained


@each_case(["tensorwise"])
def test_writes_are_seen_alike_with_and_without(results: Any, world: int, compiled: bool, recipe: str) -> None:
    off, on = (results[world, recipe, mode, compiled][0] for mode in (OFF, PRECOMPUTED))
    assert on["after_writes"] == off["after_writes"]
