"""Every family, spread over processes in each way, against one process; in float32 and in float8."""

from __future__ import annotations

import pytest

from tests.distributed.combinations import VARIANTS
from tests.distributed.parallel import TINY_FAMILIES
from tests.distributed.test_parallel import BOUNDS, ONE, Cluster, Reports, by_processes, check_parity, column

WAYS = ("FSDP 2", "TP 2", "PP 2 1F1B", "FSDP 2 x TP 2")
MIXTURES = [family for family, args in TINY_FAMILIES.items() if args.mixture is not None]
TIED = {"model.args.tie_embeddings": "true"}  # refused in pipelines
CASES = {
    f"{family}, {precision}": {"model.name": family, "model.flavor": "tiny", **options}
    for family in TINY_FAMILIES
    for precision, options in (("float32", {}), ("tensorwise", VARIANTS["tensorwise"]))
} | {"qwen2 tied, float32": {"model.name": "qwen2", "model.flavor": "tiny", **TIED}}


def composes(way: str, case: str) -> bool:
    """The others are refused; mixtures are spread in all ways by test_experts_parallel.py."""
    if CASES[case]["model.name"] in MIXTURES:
        return way == "FSDP 2"
    return not (way.startswith("PP") and "tied" in case)


PAIRS = [(way, case) for case in CASES for way in WAYS if composes(way, case)]


@pytest.fixture(scope="module")
def families(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The cases that the chosen tests ask for on one process, and in their ways."""
    tests = [i.callspec.params for i in request.session.items if "families" in getattr(i, "fixturenames", ())]  # type: ignore[attr-defined]
    pairs = [(test["way"], test["case"]) for test in tests]
    chosen = {case for _, case in pairs}
    chosen |= {f"{case.partition(',')[0]}, float32" for case in chosen if "tensorwise" in case}
    cluster = Cluster(tmp_path_factory.mktemp("families"))
    cluster.run(1, {f"{ONE}, {case}": options for case, options in CASES.items() if case in chosen})
    options = {f"{way}, {case}": CASES[case] for way, case in pairs}
    for processes, group in by_processes(options, {f"{way}, {case}": way for way, case in pairs}).items():
        cluster.run(processes, group)
    return cluster.reports


def tried(way: str, case: str) -> bool:
    """Return whether the tests try this pair outside of long runs. Dimensions together, and float8 in each way,
    are test_parallel's."""
    if CASES[case]["model.name"] in MIXTURES:
        return True
    return way != "FSDP 2 x TP 2" if "float32" in case else way == "TP 2"


@pytest.mark.parametrize(
    ("way", "case"),
    [pytest.param(*pair, marks=pytest.mark.slow if tried(*pair) else pytest.mark.long) for pair in PAIRS],
)
def test_a_family_trains_as_on_one_process(families: Reports, way: str, case: str) -> None:
    one, many = families[f"{ONE}, {case}"], families[f"{way}, {case}"]
    if "float32" in case:
        check_parity(one, many)
        if CASES[case]["model.name"] in MIXTURES:
            assert column(many, "expert_tokens") == column(one, "expert_tokens")
            for key in ("balance_loss", "router_entropy"):
                assert column(many, key) == pytest.approx(column(one, key), rel=1e-5)
        return
    loss, first_norm, norm = BOUNDS["tensorwise"]
    assert column(many, "loss") == pytest.approx(column(one, "loss"), rel=loss)
    assert column(many, "grad_norm")[0] == pytest.approx(column(one, "grad_norm")[0], rel=first_norm)
    assert column(many, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=norm)
    plain = families[f"{ONE}, {case.partition(',')[0]}, float32"]
    assert column(many, "loss") != pytest.approx(column(plain, "loss"), rel=1e-6)  # it is really another precision
