"""Experts in number formats, by the options moe_fqns: which are chosen, what is refused, and a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from titanlite.config import Degrees, check_config, load_config
from titanlite.converters import build_converters
from titanlite.converters.experts import experts_in
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.errors import ConfigError
from titanlite.models.spec import get_model_spec
from titanlite.quant.grouped_mm import QuantGroupedMatmul
from titanlite.quant.linear import high_precision

FLOAT8 = {"model.converters": "float8", "float8.recipe_name": "rowwise"}
MX = {"model.converters": "mx"}
INT8 = {"model.converters": "int8"}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    torch.distributed.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    yield build_mesh(Degrees(1, 1, 1, 1, 1), "cpu")
    torch.distributed.destroy_process_group()


def converted(mesh: Mesh, options: dict[str, Any], family: str = "qwen3_moe", **sizes: int) -> tuple[nn.Module, str]:
    """The debug model of a family, and what the last converter says of it."""
    spec = get_model_spec(family)
    with torch.device("meta"):
        model = spec.build(spec.configure(spec.resized(spec.flavor("debugmodel"), sizes), 2048, 64))
    config = load_config([f"--{key}={value}" for key, value in {"model.name": family, **options}.items()])
    check_config(config, 1)
    said = [converter.convert(model) for converter in build_converters(config, mesh).values()]
    return model, said[-1]


def in_format(model: nn.Module) -> set[str]:
    return {name for name, experts in experts_in(model).items() if isinstance(experts.multiply, QuantGroupedMatmul)}


@pytest.mark.parametrize(("options", "name"), [(FLOAT8, "float8"), (MX, "mxfp8"), (INT8, "int8")], ids=str)
def test_named_experts_are_converted(
    mesh: Mesh, options: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    key = f"{options['model.converters']}.moe_fqns"
    model, said = converted(mesh, {**options, key: "experts"})
    experts = experts_in(model)
    assert in_format(model) == experts.keys()
    assert f", the experts of {len(experts)} layers" in said
    first = next(iter(experts.values()))
    count, inside, dim = first.w1.shape
    (line,) = [line for line in caplog.text.splitlines() if "layers.*.feed_forward.experts" in line]
    assert line.split() == [
        "layers.*.feed_forward.experts", *f"{dim} -> {inside} -> {dim}, {count} times".split(), str(len(experts)), name
    ]  # fmt: skip
    with high_precision(model):
        assert all(experts.multiply.in_high_precision for experts in experts_in(model).values())
    assert not first.multiply.in_high_precision  # type: ignore[attr-defined]


def test_others_stay_and_the_table_says_so(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model, said = converted(mesh, {**FLOAT8, "float8.moe_fqns": "layers.1"})
    assert in_format(model) == {"layers.1.feed_forward.experts"}
    assert ", the experts of 1 layer" in said
    assert "high precision (not in moe_fqns)" in caplog.text
    model, said = converted(mesh, FLOAT8)
    assert in_format(model) == set()
    assert "experts" not in said


@pytest.mark.parametrize(
    ("options", "model", "key", "why"),
    [
        (
            {**FLOAT8, "float8.moe_fqns": "expert"},
            {},
            "float8.moe_fqns",
            'did you mean "experts"',
        ),
        ({**MX, "mx.moe_fqns": "experts,layers.77"}, {}, "mx.moe_fqns", "matches no experts"),
        ({**MX, "mx.moe_fqns": "experts"}, {"family": "llama3"}, "mx.moe_fqns", "this model has no experts"),
        ({**FLOAT8, "float8.moe_fqns": "experts"}, {"expert_dim": 24}, "float8.moe_fqns", "not multiples of 16"),
        ({"model.converters": "float8", "float8.moe_fqns": "experts"}, {}, "float8.moe_fqns", "use rowwise"),
        (
            {**MX, "mx.recipe_name": "mxfp8_with_gw_hp", "mx.moe_fqns": "experts"},
            *({}, "mx.moe_fqns", "use mxfp8, or leave it out"),
        ),
        (
            {**INT8, "int8.recipe_name": "forward_only", "int8.moe_fqns": "experts"},
            *({}, "int8.moe_fqns", "use rowwise, or leave it out"),
        ),
        (
            {
                **FLOAT8,
                **{"model.converters": "float8,mx", "float8.moe_fqns": "experts", "mx.moe_fqns": "experts"},
                **{"float8.filter_fqns": "wq,wk,wv", "mx.filter_fqns": "wo,output"},
            },
            *({}, "mx.moe_fqns", "is converted already, by float8"),
        ),
        ({"mx.moe_fqns": "experts"}, {}, "mx.moe_fqns", "no effect without the converter"),
    ],
)
def test_what_cannot_be_is_refused(
    mesh: Mesh, options: dict[str, Any], model: dict[str, Any], key: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as refusal:
        converted(mesh, options, **model)
    assert refusal.value.key == key


def test_the_older_name_still_works() -> None:
    config = load_config(["--model.converters=mx", "--mx.moe_fqns_prototype=experts"])
    assert config.mx.moe_fqns == ["experts"]


@pytest.mark.slow
def test_a_run_trains_with_experts_in_float8(train: Any) -> None:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "n_experts": 6, "expert_dim": 16}
    options: dict[str, Any] = {f"model__args__{name}": size for name, size in sizes.items()}
    options |= {"model__name": "qwen3_moe", "model__converters": "float8", "float8__recipe_name": "rowwise"}
    plain = train(name="plain", **options)
    run = train(name="float8", **options, float8__moe_fqns="experts")
    assert run.status == 0, run.output
    assert "rowwise, emulated" in run.output
    assert ", the experts of 2 layers" in run.output
    assert run.losses() == pytest.approx(plain.losses(), rel=2e-3)
    assert run.losses() != plain.losses()
