"""The converter ``float8`` and its options, in the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.runs import LITTLE, ROOT, run_trainer
from titanlite.config import Degrees, load_config
from titanlite.converters.float8 import Float8Converter
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.target import H100, Target
from titanlite.errors import ConfigError
from titanlite.float8 import Float8Linear, ScalingType
from titanlite.float8.float8_linear_utils import too_small
from titanlite.models.spec import get_model_spec
from titanlite.quant.convertible import name_matches

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    torch.distributed.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    yield build_mesh(Degrees(1, 1, 1, 1, 1), "cpu")
    torch.distributed.destroy_process_group()


def model_of(flavor: str = "debugmodel") -> nn.Module:
    spec = get_model_spec("llama3")
    with torch.device("meta"):
        return spec.build(spec.configure(spec.flavor(flavor), 2048, 256))


def converter(mesh: Mesh, *options: str) -> Float8Converter:
    given = ["--model.converters=float8", *options]
    return Float8Converter(load_config(given, str(ROOT / "train_configs" / "debug_model.toml")), mesh)


def converted(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, Float8Linear)}


# ---- which kernels


def test_triton_is_for_float8_units(mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match=r'float8\.kernels = "triton": cpu has no float8 units'):
        converter(mesh, "--float8.kernels=triton")
    with pytest.raises(ConfigError, match=r'float8\.kernels = "triton": float8\.emulate = true'):
        converter(mesh, "--float8.kernels=triton", "--float8.emulate")


def test_kernels_are_chosen_aloud(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    """On a device with float8 units, which the CPU is taken for."""
    pytest.importorskip("triton")
    mesh = replace(mesh, target=H100)
    caplog.set_level("INFO")
    for options, expected in [
        ([], 'float8.kernels = "auto": triton; without the compiler, plain operations are not fused'),
        (
            ["--training.compile", "--float8.scaling_type_input=delayed"],
            'float8.kernels = "auto": inductor; the scales are not dynamic',
        ),
        (
            ["--training.compile"],
            'float8.kernels = "auto": inductor; compile.block_fusion fuses casts with what is computed before them',
        ),
        (
            ["--training.compile", "--compile.block_fusion=false", "--float8.recipe_name=rowwise"],
            'float8.kernels = "auto": triton; without compile.block_fusion, the compiler writes scaled columns byte by '
            "byte",
        ),
        (["--float8.kernels=inductor"], ""),
    ]:
        caplog.clear()
        model = model_of()
        converter(mesh, *options).convert(model)
        said = [r.getMessage() for r in caplog.records if "float8.kernels" in r.getMessage()]
        assert said == ([expected] if expected else [])
        layer = next(m for m in model.modules() if isinstance(m, Float8Linear))
        assert layer.config.kernels == (expected.split()[3].rstrip(";") if expected else "inductor")


# ---- which layers


@pytest.mark.parametrize(
    ("entry", "name", "expected"),
    [
        ("output", "output", True),
        ("attention.wk", "layers.3.attention.wk", True),
        ("layers.1", "layers.1.attention.wk", True),
        ("layers.1", "layers.10.attention.wk", False),
        ("wk", "layers.3.attention.wk", True),
        ("w", "layers.3.attention.wk", False),
        ("attention", "layers.3.attention.wk", True),
        ("layers.3.attention.wk", "layers.3.attention.wk", True),
        ("3.wk", "layers.3.attention.wk", False),
        ("out", "output", False),
    ],
)
def test_entries_match_whole_components(entry: str, name: str, expected: bool) -> None:
    assert name_matches(entry, name) == expected


def test_filters(mesh: Mesh) -> None:
    model = model_of()
    every = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    text = converter(mesh, "--float8.filter_fqns=output,layers.1,attention.wk").convert(model)
    left = {n for n in every if n == "output" or n.startswith("layers.1.") or n.endswith("attention.wk")}
    assert converted(model) == every - left
    assert f"{len(every - left)} of {len(every)} linear layers" in text
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "k", "n", "small"),
    [
        ("tensorwise", 4096, 1024, True),  # wk, wv of Llama 3 8B
        ("tensorwise", 4096, 4096, False),
        ("tensorwise", 8192, 1024, False),
        ("rowwise", 4096, 1024, True),
        ("rowwise", 4096, 4096, False),
        ("rowwise", 2048, 4096, True),
        ("rowwise", 1024, 8192, True),
        ("rowwise_with_gw_hp", 4096, 1024, True),
        ("rowwise_with_gw_hp", 4096, 14336, False),
    ],
)
def test_layers_too_small_to_gain(recipe: str, k: int, n: int, small: bool) -> None:
    assert too_small(recipe, k, n) == small


@pytest.mark.parametrize("recipe", RECIPES)
def test_auto_filter_on_the_8b(mesh: Mesh, recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    """wk and wv stay in high precision, and the table says so."""
    model = model_of("8B")
    with caplog.at_level("INFO"):
        options = ["--float8.filter_fqns=output,auto_filter_small_kn", f"--float8.recipe_name={recipe}"]
        converter(mesh, *options).convert(model)
    left = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)} - converted(model)
    assert {name.split(".")[-1] for name in left} == {"wk", "wv", "output"}
    table = [line.split() for line in caplog.text.splitlines()]
    assert ["layers.*.attention.wk", "4096", "->", "1024", "32", "high", "precision", "(auto_filter_small_kn)"] in table
    assert ["layers.*.feed_forward.w1", "4096", "->", "14336", "32", "float8"] in table
    assert ["output", "4096", "->", "128256", "1", "high", "precision", "(filter_fqns:", "output)"] in table


def test_recipes_and_scaling_types_reach_the_layers(mesh: Mesh) -> None:
    for recipe in RECIPES:
        model = model_of()
        converter(mesh, f"--float8.recipe_name={recipe}", "--float8.force_recompute_fp8_weight_in_bwd").convert(model)
        for layer in model.modules():
            if isinstance(layer, Float8Linear):
                assert layer.config.cast_config_input.is_axiswise == (recipe != "tensorwise")
                assert layer.config.force_recompute_fp8_weight_in_bwd
                assert layer.config.emulate  # here, on a CPU
    model = model_of()
    options = ["--float8.scaling_type_input=delayed", "--float8.scaling_type_weight=static"]
    converter(mesh, *options, "--float8.static_scale_weight=100").convert(model)
    layer = model.get_submodule("layers.0.attention.wq")
    assert isinstance(layer, Float8Linear)
    assert layer.config.cast_config_input.scaling_type is ScalingType.DELAYED
    assert layer.config.cast_config_input_for_grad_weight.scaling_type is ScalingType.DELAYED
    assert layer.config.cast_config_weight_for_grad_input.static_scale == 100
    assert layer.config.cast_config_grad_output.scaling_type is ScalingType.DYNAMIC


# ---- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--float8.filter_fqns=outptu"], ['"outptu"', "matches no linear layer", 'did you mean "output"']),
        (["--float8.filter_fqns=layers,output"], ["nothing to convert", "output: filter_fqns: output"]),
        (
            ["--float8.filter_fqns=auto_filter_small_kn", "--float8.recipe_name=rowwise"],
            ["nothing to convert", "auto_filter_small_kn"],
        ),
    ],
)
def test_filters_that_cannot_be_meant(mesh: Mesh, options: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        converter(mesh, *options).convert(model_of())
    for word in words:
        assert word in str(e.value)


def test_converting_twice(mesh: Mesh) -> None:
    model = model_of()
    converter(mesh).convert(model)
    with pytest.raises(ConfigError, match="is converted already"):
        converter(mesh).convert(model)


def test_an_older_gpu_does_not_compile_float8(mesh: Mesh) -> None:
    mesh = replace(mesh, target=Target("cuda", "sm_80"))
    with pytest.raises(ConfigError, match=r"sm_80 can only be emulated.*leave torch.compile out"):
        converter(mesh, "--training.compile")
    converter(mesh)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"float8__precompute_float8_dynamic_scale_for_fsdp": "true"},
            ["float8.precompute_float8_dynamic_scale_for_fsdp = true", "float8.enable_fsdp_float8_all_gather"],
        ),
        (
            {"float8__scaling_type_input": "delayed", "float8__recipe_name": "rowwise"},
            ['float8.scaling_type_input = "delayed"', "rowwise", "use tensorwise"],
        ),
        ({"float8__scaling_type_weight": "static"}, ["float8.scaling_type_weight", "float8.static_scale_weight"]),
        ({"float8__static_scale_input": "2.0"}, ["float8.static_scale_input = 2.0", "has no effect", '= "static"']),
        (
            {"float8__scaling_type_weight": "delayed", "float8__enable_fsdp_float8_all_gather": "true"},
            ["float8.enable_fsdp_float8_all_gather", "dynamic"],
        ),
        ({"float8__recipe_name": "row"}, ['float8.recipe_name = "row"', '"rowwise"']),
        ({"float8__filter_fqns": "wq,nonsense"}, ['"nonsense"', "matches no linear layer"]),
        ({"model__converters": "", "float8__emulate": "true"}, ["float8.emulate", "add float8 to model.converters"]),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_input_ends_with_status_2_and_one_message(train: Any, options: dict[str, str], words: list[str]) -> None:
    run = train(**{"model__converters": "float8", **options})
    assert run.status == 2, run.output
    for word in words:
        assert word in run.output
    assert "Traceback" not in run.output


def test_rows_that_do_not_divide_are_refused_before_they_are_gathered(train: Any) -> None:
    options = {"float8__recipe_name": "rowwise", "float8__enable_fsdp_float8_all_gather": "true"}
    run = train(ngpu=3, model__converters="float8", **options)
    assert run.status == 2, run.output
    assert "float8.enable_fsdp_float8_all_gather" in run.output
    assert "256 rows of layers.0.attention.wq over 3 shards" in run.output
    assert "Traceback" not in run.output


# ---- runs

STEPS = {**LITTLE, "training__steps": 6, "training__seq_len": 64}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run_trainer(tmp_path_factory.mktemp("bf16"), **STEPS).losses()


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_trains(train: Any, bf16: list[float], recipe: str) -> None:
    run = train(model__converters="float8", float8__recipe_name=recipe, **STEPS)
    assert run.status == 0, run.output
    assert run.losses() == pytest.approx(bf16, rel=1e-2)
    assert run.losses() != bf16
    assert run.output.count("float8 is emulated") == 1
    assert f"{recipe}, emulated, 15 of 15 linear layers" in run.output
    assert "layers.*.attention.wq" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("ngpu", [1, 2])
def test_float8_all_gather_changes_no_loss(train: Any, ngpu: int) -> None:
    options = {"model__converters": "float8", "training__local_batch_size": 4 // ngpu, **STEPS}
    off = train(ngpu=ngpu, name="off", **options)
    on = train(
        ngpu=ngpu,
        name="on",
        float8__enable_fsdp_float8_all_gather="true",
        float8__precompute_float8_dynamic_scale_for_fsdp="true",
        **options,
    )
    assert on.status == 0, on.output
    assert on.losses() == off.losses()


def test_delayed_scaling_trains(train: Any, bf16: list[float]) -> None:
    delayed = {f"float8__scaling_type_{operand}": "delayed" for operand in ("input", "weight", "grad_output")}
    run = train(model__converters="float8", **delayed, **STEPS)
    assert run.status == 0, run.output
    assert run.losses() == pytest.approx(bf16, rel=1e-2)
    dynamic = train(name="dynamic", model__converters="float8", **STEPS)
    assert run.losses()[0] == dynamic.losses()[0]  # the first step has no history
    assert run.losses() != dynamic.losses()


def test_static_scaling_trains(train: Any, bf16: list[float]) -> None:
    scales = {"input": 16.0, "weight": 400.0, "grad_output": 57344.0}
    options = {f"float8__scaling_type_{operand}": "static" for operand in scales}
    options |= {f"float8__static_scale_{operand}": str(scale) for operand, scale in scales.items()}
    run = train(model__converters="float8", **options, **STEPS)
    assert run.status == 0, run.output
    assert run.losses() == pytest.approx(bf16, rel=2e-2)


@pytest.mark.long
def test_compiled_and_checkpointed(train: Any, bf16: list[float]) -> None:
    run = train(
        model__converters="float8",
        float8__recipe_name="rowwise",
        training__compile="true",
        activation_checkpoint__mode="selective",
        activation_checkpoint__selective_ac_option="op",
        timeout=600,
        **STEPS,
    )
    assert run.status == 0, run.output
    assert run.losses() == pytest.approx(bf16, rel=1e-2)
