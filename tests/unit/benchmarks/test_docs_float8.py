"""The documents on float8 are right: their options make a converter, their tables and counts are the code's; and
the programs of torchao's float8 tutorials run here. (tests/unit/benchmarks/test_docs.py runs their examples.)"""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.support.docs import PAGES as DOCS
from tests.support.docs import Block, blocks_of, prose_of, tables_in
from tests.support.runs import ROOT
from titanlite.config import check_config, load_config
from titanlite.config.format_sections import Float8
from titanlite.converters.float8 import Float8Converter
from titanlite.distributed.target import Target
from titanlite.float8 import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    convert_to_float8_training,
)
from titanlite.float8.float8_linear_utils import too_small
from titanlite.float8.inference import Float8InferenceLinear
from titanlite.models.spec import get_model_spec
from titanlite.quant.float8 import format as float8_format
from titanlite.quant.float8 import matmul
from titanlite.quant.float8.numerics import quantize

pytestmark = pytest.mark.long


PAGES = [page for page in DOCS if page.name.startswith("float8") or page.name == "library.md"]
PROSE = "".join(map(prose_of, PAGES))


def table_with(*columns: str) -> list[dict[str, str]]:
    (rows,) = (rows for rows in tables_in(PROSE) if rows and set(columns) <= rows[0].keys())
    return rows


# ---- options


def built(argv: list[str], default_file: str, processes: int = 1) -> Float8Converter:
    """What the trainer makes of a command line, up to the converter."""
    config = load_config([*argv, "--model.tokenizer_path="], default_file)  # the published tokenizers are not here
    check_config(config, processes)
    return Float8Converter(config, SimpleNamespace(device_type="cpu", target=Target("cpu")))  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [b for b in blocks_of(ROOT / "docs" / "float8.md") if b.language in ("bash", "toml")])
def test_options_make_a_converter(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands and the TOML of docs/float8.md."""
    monkeypatch.chdir(ROOT)
    if block.language == "toml":
        file = tmp_path / "my.toml"
        file.write_text(block.code.replace('base = "', f'base = "{ROOT}/'))
        built([], str(file), 8)
        return
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        program = words.index("./run_train.sh")
        env = dict(word.split("=", 1) for word in words[:program])
        assert "--model.converters=float8" in words
        built(words[program + 1 :], env.get("CONFIG_FILE", "train_configs/debug_model.toml"), int(env.get("NGPU", 1)))


def test_every_option_is_described() -> None:
    described = re.findall(r"^\*\*(`.*?`)\*\*:", PROSE, flags=re.MULTILINE)
    names = {name.strip("` ") for entry in described for name in entry.split(",")}
    assert names == {field.name for field in dataclasses.fields(Float8)}


# ---- tables


def test_the_table_of_recipes() -> None:
    columns = {
        "x": "cast_config_input",
        "w": "cast_config_weight",
        "grad_out": "cast_config_grad_output",
        "w for grad_input": "cast_config_weight_for_grad_input",
        "x for grad_weight": "cast_config_input_for_grad_weight",
        "grad_out for grad_weight": "cast_config_grad_output_for_grad_weight",
    }

    def shown(cast: CastConfig) -> str:
        if not cast.is_cast:
            return "not cast"
        return f"{'row' if cast.is_axiswise else 'tensor'} {str(cast.dtype)[len('torch.float8_') :].rstrip('fnuz')}"

    rows = table_with("recipe", "power of 2")
    assert [row["recipe"] for row in rows] == ["`tensorwise`", "`rowwise`", "`rowwise_with_gw_hp`"]
    for row in rows:
        config = Float8LinearConfig.from_recipe_name(row["recipe"].strip("`"))
        assert {column: shown(config.casts[name]) for column, name in columns.items()} == {c: row[c] for c in columns}
        assert row["power of 2"] == ("yes" if config.round_scales_to_power_of_2 else "no")


def test_the_table_of_formats() -> None:
    def power(text: str) -> list[float]:
        return [2.0 ** int(exponent) for exponent in re.findall(r"2\^(-\d+)", text)]

    for row in table_with("format", "fp8_max"):
        dtypes = [getattr(torch, f"float8_{name}") for name in row["format"].split(", ")]
        # By their bytes, as torch.finfo has a wrong eps for e5m2fnuz.
        values = [torch.arange(128, dtype=torch.uint8).view(dtype).double() for dtype in dtypes]
        assert [v[v.isfinite()].max().item() for v in values] == [float(n) for n in row["fp8_max"].split(", ")]
        assert [torch.finfo(dtype).smallest_normal for dtype in dtypes] == power(row["smallest normal"])
        assert [v[1].item() for v in values] == power(row["step below it"])
        if row["error of normal values"] != "as above":
            assert [(v[v > 1].min() - 1).item() / 2 for v in values] == power(row["error of normal values"])


def test_the_thresholds_of_the_automatic_filter() -> None:
    sizes = sorted({*range(16, 16384, 496), 1024, 1040, 2048, 2064, 4096, 4112})
    for row in table_with("recipe", "left out"):
        rule = row["left out"].replace("≤", "<=").replace(",", "")
        for recipe in re.findall(r"\w+", row["recipe"]):
            for k in sizes:
                for n in sizes:
                    assert too_small(recipe, k, n) == eval(rule, {"K": k, "N": n}), (recipe, k, n)


def test_the_sizes_of_the_8b() -> None:
    spec = get_model_spec("llama3")
    with torch.device("meta"):
        model = spec.build(spec.configure(spec.flavor("8B"), 128256, 8192))
    linears = {name.split(".")[-1]: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    rows = table_with("layer", "K → N")
    assert {name for row in rows for name in row["layer"].split(", ")} == linears.keys()
    for row in rows:
        for name in row["layer"].split(", "):
            k, n = linears[name].in_features, linears[name].out_features
            assert row["K → N"] == f"{k} → {n}"
            assert row["K·N/(K + N)"] == f"{k * n / (k + n):.0f}"
            for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
                outcome = "left out" if too_small(recipe, k, n) else "float8"
                assert row["`auto_filter_small_kn`, every recipe"] == outcome
    features = {row["inputs of"]: row["elements"] for row in table_with("inputs of", "elements")}
    for names, elements in features.items():
        if names != "together":
            assert {f"{linears[name].in_features:,}" for name in names.split(", ")} == {elements}
    total = sum(int(elements.replace(",", "")) for names, elements in features.items() if names != "together")
    assert features["together"] == f"{total:,}"
    per_block = sum(m.weight.numel() for name, m in linears.items() if name != "output")
    assert f"{per_block:,} elements" in " ".join(PROSE.split())


def test_the_table_that_the_trainer_logs(caplog: pytest.LogCaptureFixture) -> None:
    spec = get_model_spec("llama3")
    with torch.device("meta"):
        model = spec.build(spec.configure(spec.flavor("debugmodel"), 2048, 256))
    options = ["--model.converters=float8", "--float8.filter_fqns=output"]
    with caplog.at_level("INFO"):
        built(options, str(ROOT / "train_configs/debug_model.toml")).convert(model)
    (shown,) = (block for block in blocks_of(ROOT / "docs" / "float8.md") if block.language == "text")
    assert shown.code.strip() in caplog.text


# ---- how often a weight is cast

IN, OUT, STEPS, MICROBATCHES = 64, 96, 3, 5


def counted_casts(
    monkeypatch: pytest.MonkeyPatch, recipe: str, wrap: Callable[[nn.Module], None] | None, **options: bool
) -> int:
    """How often the weight was cast in the last step, found by its shape."""
    casts: Counter[tuple[int, ...]] = Counter()

    def counting(x: Tensor, *args: Any) -> Tensor:
        casts[tuple(x.shape)] += 1
        return quantize(x, *args)

    monkeypatch.setattr(matmul, "quantize", counting)
    monkeypatch.setattr(float8_format, "quantize", counting)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), **options)
    model = convert_to_float8_training(nn.Sequential(nn.Linear(IN, OUT, bias=False)), config=config)
    if wrap is not None:
        wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        casts.clear()
        for _ in range(MICROBATCHES):
            x = torch.randn(32, IN, requires_grad=True)
            model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return casts[OUT, IN]


@pytest.mark.parametrize("column", ["`tensorwise`", "row recipes"])
def test_how_often_a_weight_is_cast(column: str, world_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (1,))

    def sharded(reshard: bool) -> Callable[[nn.Module], None]:
        def wrap(model: nn.Module) -> None:
            assert isinstance(model, nn.Sequential)
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            fully_shard(model[0], mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
            fully_shard(model, mesh=mesh, mp_policy=policy)

        return wrap

    cases: dict[str, tuple[Any, dict[str, bool]]] = {
        "eager, no FSDP2": (None, {}),
        "eager, FSDP2, not resharded after forward": (sharded(False), {}),
        "eager, FSDP2, resharded after forward": (sharded(True), {}),
        "eager, `force_recompute_fp8_weight_in_bwd`": (None, {"force_recompute_fp8_weight_in_bwd": True}),
        "float8 all-gather, eager or compiled": (sharded(True), {"enable_fsdp_float8_all_gather": True}),
    }
    counts = {"1": 1, "2": 2, "m": MICROBATCHES, "2m": 2 * MICROBATCHES, "1, of the shard": 1}
    counts["1, of the shard, and m for grad_input"] = 1 + MICROBATCHES
    expected = {row[""]: counts[row[column]] for row in table_with(column, "row recipes")}
    assert expected.keys() == {*cases, "compiled, no float8 all-gather"}
    for recipe in ["tensorwise"] if column == "`tensorwise`" else ["rowwise", "rowwise_with_gw_hp"]:
        cast_counts = {
            case: counted_casts(monkeypatch, recipe, *given[:1], **given[1]) for case, given in cases.items()
        }
        assert cast_counts == {case: expected[case] for case in cases}


# ---- torchao's tutorials
#
# "Pre-training with torchao directly" and the "E2E training + inference flow" of torchao's float8 page: the first is
# also the first part of the second. What was changed: the imports, the device, and the rows of x from 4096 to 64, which
# is a matter of time on a CPU.

TRAINING = """
import torch
import torch.nn.functional as F
from torch import nn

from titanlite.float8 import Float8Linear, convert_to_float8_training

m = nn.Sequential(nn.Linear(2048, 4096), nn.Linear(4096, 128), nn.Linear(128, 1)).bfloat16().to("cpu")
x = torch.randn(64, 2048, device="cpu", dtype=torch.bfloat16)
optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)


def module_filter_fn(mod: torch.nn.Module, fqn: str):
    if fqn == "1":
        return False
    if isinstance(mod, torch.nn.Linear):
        if mod.in_features % 16 != 0 or mod.out_features % 16 != 0:
            return False
    return True


convert_to_float8_training(m, module_filter_fn=module_filter_fn)
m = torch.compile(m)
for _ in range(10):
    optimizer.zero_grad()
    output = m(x)
    loss = F.mse_loss(output, torch.ones_like(output))
    loss.backward()
    optimizer.step()

torch.save(
    {"model": m, "model_state_dict": m.state_dict(), "optimizer_state_dict": optimizer.state_dict()},
    "checkpoint.pth",
)
"""

INFERENCE = """
import torch

from titanlite.float8 import Float8Linear
from titanlite.float8.inference import Float8DynamicActivationFloat8WeightConfig, PerTensor, quantize_

checkpoint = torch.load("checkpoint.pth", weights_only=False)
model = checkpoint["model"]
model.load_state_dict(checkpoint["model_state_dict"])
quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()))
x = torch.randn(1, 64, 2048, device="cpu", dtype=torch.bfloat16)
with torch.inference_mode():
    out = model(x)
"""


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Generates code and compiles it for real, but without precompiled headers and vector instructions: building the
    one and finding out about the other would take most of the time. torchao is not there."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp_cache_precompile_headers": False, "cpp.simdlen": 1}):
        yield
    torch._dynamo.reset()


def run_program(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs ``source`` in ``folder``; returns its variables."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<tutorial>", "exec", dont_inherit=True), names)
    return names


def test_the_tutorials(tmp_path: Path, compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trains the layers it converts, the second quantizes and runs what the first saved."""
    model = run_program(TRAINING, tmp_path, monkeypatch)["m"]
    assert [type(layer) is Float8Linear for layer in model._orig_mod] == [True, False, False]
    state = model.state_dict()
    assert all(type(value) is Tensor and value.isfinite().all() for value in state.values())

    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert {int(entry["step"]) for entry in checkpoint["optimizer_state_dict"]["state"].values()} == {10}
    for name in ("model_state_dict", "optimizer_state_dict"):  # plain: they load without trust in who wrote them
        buffer = io.BytesIO()
        torch.save(checkpoint[name], buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=True).keys() == checkpoint[name].keys()
    with pytest.raises(Exception, match="weights_only"):  # a pickled model is another matter
        torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    # torch.compile put a prefix to the names; behind it they are nn.Linear's.
    plain = nn.Sequential(nn.Linear(2048, 4096), nn.Linear(4096, 128), nn.Linear(128, 1)).bfloat16()
    plain.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in state.items()})

    variables = run_program(INFERENCE, tmp_path, monkeypatch)
    assert [type(layer) is Float8InferenceLinear for layer in variables["model"]._orig_mod] == [True, True, False]
    with torch.no_grad():
        expected = plain(variables["x"])
    assert variables["out"].shape == (1, 64, 1)
    assert (variables["out"] - expected).norm() < 0.1 * expected.norm()
