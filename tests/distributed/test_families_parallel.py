"""Every family, spread over processes in each way, against one process; in float32 and in float8."""

from __future__ import annotations

import pytest

from tests.distributed.combinations import VARIANTS
from tests.distributed.parallel import TINY_FAMILIES
from tests.distributed.test_parallel import BOUNDS, ONE, Cluster, Reports, by_processes, check_parity, column

WAYS = ("FSDP 2", "TP 2", "PP 2 1F1B", "FSDP 2 x TP 2")
TIED = {"model.args.tie_embeddings": "true"}  # refused in pipelines
CASES = {
    f"{family}, {precision}": {"model.name": family, "model.flavor": "tiny", **options}
    for family in TINY_FAMILIES
    for precision, options in (("float32", {}), ("tensorwise", VARIANTS["tensorwise"]))
} | {"qwen2 tied, float32": {"model.name": "qwen2", "model.flavor": "tiny", **TIED}}


PAIRS = [(way, case) for case in CASES for way in WAYS if not (way.startswith("PP") and "tied" in case)]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """All cases on one process, and in every way."""
    cluster = Cluster(tmp_path_factory.mktemp("families"))
    cluster.run(1, {f"{ONE}, {case}": options for case, options in CASES.items()})
    options = {f"{way}, {case}": CASES[case] for way, case in PAIRS}
    for processes, group in by_processes(options, {f"{way}, {case}": way for way, case in PAIRS}).items():
        cluster.run(processes, group)
    return cluster.reports


@pytest.mark.slow
@pytest.mark.parametrize(("way", "case"), PAIRS)
def test_a_family_trains_as_on_one_process(families: Reports, way: str, case: str) -> None:
    one, many = families[f"{ONE}, {case}"], families[f"{way}, {case}"]
    if "float32" in case:
        check_parity(one, many)
        return
    loss, first_norm, norm = BOUNDS["tensorwise"]
    assert column(many, "loss") == pytest.approx(column(one, "loss"), rel=loss)
    assert column(many, "grad_norm")[0] == pytest.approx(column(one, "grad_norm")[0], rel=first_norm)
    assert column(many, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=norm)
    plain = families[f"{ONE}, {case.partition(',')[0]}, float32"]
    assert column(many, "loss") != pytest.approx(column(plain, "loss"), rel=1e-6)  # it is really another precision
