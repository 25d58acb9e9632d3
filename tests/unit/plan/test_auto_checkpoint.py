"""activation_checkpoint.mode = "auto": the least recomputation that fits, chosen once, the same everywhere, kept."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch

from tests.support.runs import LITTLE, run_trainer
from titanlite.config import JobConfig, load_config
from titanlite.config.options import options_of
from titanlite.distributed.activation_checkpoint import apply_activation_checkpoint
from titanlite.errors import ConfigError
from titanlite.launch.command_line import read_config
from titanlite.metrics.device import GIB
from titanlite.models.spec import get_model_spec
from titanlite.plan import auto_checkpoint, command
from titanlite.plan.auto_checkpoint import MODES, Mode, choose, usable
from titanlite.plan.depth import peak_memory
from titanlite.plan.devices import DEVICES
from titanlite.plan.estimate import ASSUMED_VOCAB_SIZE, estimate
from titanlite.plan.layouts import fixed_plan
from titanlite.plan.memory import MemoryTracker
from titanlite.plan.predicted import reserved_peak
from titanlite.plan.refusals import planned_model

NONE, OP, TWO, FULL = MODES
SIZES = ["--training.seq_len=256", "--training.local_batch_size=8"]


def read(*arguments: str, layers: int = 2) -> JobConfig:
    shape = f"--model.args.n_layers={layers}"
    return load_config([*SIZES, shape, "--activation_checkpoint.mode=auto", *arguments])


def memory(room: float) -> int:
    """The memory of a device that has ``room`` bytes for tensors."""
    return round(max(room / (1 - auto_checkpoint.RESERVED_SHARE), room + auto_checkpoint.RESERVED_LEAST))


@pytest.fixture(scope="module")
def peaks() -> dict[Mode, int]:
    return {mode: estimate(mode.set_in(read()), 1).peak for mode in MODES}


def test_the_reserve() -> None:
    assert usable(80 * GIB) == 68 * GIB
    assert usable(2 * GIB) == GIB
    assert usable(GIB // 2) == 0


@pytest.mark.slow
def test_of_the_modes_that_fit_the_one_that_recomputes_least_is_chosen(peaks: dict[Mode, int]) -> None:
    assert peaks[FULL] < peaks[OP] < peaks[NONE]
    for mode in (NONE, OP, FULL):
        choice = choose(read(), 1, None, memory(peaks[mode]))
        assert choice.mode == mode
        assert f"an estimated {peaks[mode] / GIB:.2f} GiB of" in choice.why
    assert "none needs" in choice.why


def allocated(mode: Mode) -> int:
    """The peak in bytes of a step on real tensors of the CPU."""
    spec = get_model_spec("llama3")
    flavor = replace(spec.flavor("debugmodel"), n_layers=2)
    model: Any = spec.build(spec.configure(flavor, ASSUMED_VOCAB_SIZE, 256))
    apply_activation_checkpoint(model.layers, mode.set_in(read()).activation_checkpoint)
    with MemoryTracker() as tracker:
        model(torch.zeros(8, 256, dtype=torch.int64)).sum().backward()
    return tracker.peak


def test_the_modes_allocate_in_the_order_of_their_estimates(peaks: dict[Mode, int]) -> None:
    real = {mode: allocated(mode) for mode in MODES}
    assert sorted(MODES, key=real.__getitem__) == sorted(MODES, key=peaks.__getitem__)


def test_what_goes_on_keeps_its_choice_if_that_fits(peaks: dict[Mode, int]) -> None:
    assert choose(read(), 1, None, memory(2 * peaks[NONE]), earlier=FULL).mode == FULL
    assert choose(read(), 1, None, memory(peaks[FULL]), earlier=NONE).mode == FULL


def test_where_none_fits_it_is_refused(peaks: dict[Mode, int]) -> None:
    with pytest.raises(ConfigError) as error:
        choose(read(), 1, None, memory(0.9 * peaks[FULL]))
    assert (error.value.key, error.value.value) == ("activation_checkpoint.mode", "auto")
    assert re.search(r"full needs [\d.]+ GiB", error.value.why)


@pytest.mark.parametrize("options", [[], ["--training.compile=false"], ["--training.seq_len=4096"]], ids=str)
@pytest.mark.parametrize(("flavor", "devices"), [("8B", 8), ("70B", 256), ("8B", 1)])
def test_on_a_known_device_auto_is_what_a_plan_of_the_layout_says(
    flavor: str, devices: int, options: list[str]
) -> None:
    """The mode, and that none fits."""
    sizes = ["--training.seq_len=8192", "--training.local_batch_size=2", "--training.compile"]
    config = load_config([f"--model.flavor={flavor}", *sizes, "--activation_checkpoint.mode=auto", *options])
    h100 = DEVICES["h100"]
    (layout,) = fixed_plan(config, planned_model(config), h100, devices).layouts
    total = round(h100.memory_gib * GIB)
    if not layout.fits:
        with pytest.raises(ConfigError, match="full needs"):
            choose(config, devices, None, total, known=True)
        return
    choice = choose(config, devices, None, total, known=True)
    planned = layout.apply(config).activation_checkpoint
    assert choice.mode.mode == planned.mode
    assert choice.mode.option in ("", planned.selective_ac_option)
    assert f"an estimated {layout.memory.total:.2f} GiB" in choice.why


def test_what_a_plan_does_not_cover_is_estimated_on_a_known_device(peaks: dict[Mode, int]) -> None:
    config = read("--model.converters=int8", "--training.local_batch_size=2")
    assert reserved_peak(NONE.set_in(config), 1, ASSUMED_VOCAB_SIZE) is None
    assert choose(config, 1, None, 80 * GIB, known=True).mode == NONE


@pytest.mark.slow
def test_the_worst_stage_decides() -> None:
    config = NONE.set_in(read("--parallelism.pipeline_parallel_degree=2"))
    assert peak_memory(config, 2, None) == max(rank.peak for rank in estimate(config, 2).ranks)


@pytest.mark.parametrize(
    "mode", [m if m in (NONE, FULL) else pytest.param(m, marks=pytest.mark.long) for m in MODES], ids=str
)
@pytest.mark.slow
def test_two_depths_give_the_estimate_of_a_deep_model(mode: Mode) -> None:
    """At this size, the peak of "full" is in the loss at few layers, and in the optimizer at many."""
    for depth in (9, 12) if mode == FULL else (9,):
        config = mode.set_in(read("--training.local_batch_size=4", layers=depth))
        assert peak_memory(config, 2, None) == pytest.approx(estimate(config, 2).peak, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param(NONE, marks=pytest.mark.long), FULL], ids=str)
def test_dense_blocks_before_those_with_experts_are_in_both(mode: Mode) -> None:
    config = mode.set_in(read("--model.name=deepseek_v3", "--training.local_batch_size=4", layers=10))
    assert peak_memory(config, 2, None) == pytest.approx(estimate(config, 2).peak, rel=0.01)


@pytest.mark.slow
def test_experts_of_one_block_in_a_format_are_not_taken_for_those_of_all() -> None:
    experts = ("--model.converters=float8", "--float8.recipe_name=rowwise", "--float8.moe_fqns=layers.8")
    config = FULL.set_in(read("--model.name=qwen3_moe", *experts, layers=10))
    assert peak_memory(config, 1, None) == pytest.approx(estimate(config, 1).peak, rel=0.01)


@pytest.mark.long  # as of the deep models above
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("file", ["llama3_8b", "llama3_8b_fast"])
def test_two_depths_give_the_estimate_of_llama3_8b(file: str, mode: Mode) -> None:
    config = mode.set_in(load_config([], file))
    assert peak_memory(config, 8, None) == pytest.approx(estimate(config, 8).peak, rel=0.01)


def test_errors_of_the_configuration_are_those_of_a_run() -> None:
    with pytest.raises(ConfigError) as error:
        choose(read("--parallelism.tensor_parallel_degree=32"), 32, None, 80 * GIB)
    assert error.value.key == "parallelism.tensor_parallel_degree"


def test_an_estimate_needs_a_mode() -> None:
    with pytest.raises(ConfigError) as error:
        estimate(read(), 1)
    assert (error.value.key, error.value.value) == ("activation_checkpoint.mode", "auto")


def chosen(folder: Path) -> dict[str, Any]:
    return tomli.loads((folder / "config.toml").read_text())["activation_checkpoint"]


@pytest.mark.slow
def test_a_run_chooses_once_says_so_and_keeps_it(tmp_path: Path) -> None:
    common = {**LITTLE, "activation_checkpoint__mode": "auto", "checkpoint__enable_checkpoint": "true"}
    run = run_trainer(tmp_path, 2, training__steps=1, **common)
    assert run.status == 0, run.output
    kept = chosen(run.folder)
    assert kept["mode"] == "none"  # the debug model fits into any machine
    assert re.match(r"none: an estimated [\d.]+ GiB of [\d.]+ GiB \([\d.]+ less [\d.]+ in reserve\)", kept["chosen"])
    assert f"auto has chosen {kept['chosen']}" in re.sub(" +", " ", run.output)
    again = run_trainer(tmp_path, 2, training__steps=2, **common)
    assert again.status == 0, again.output
    assert chosen(again.folder) == kept
    file = {"job__config_file": run.folder / "config.toml"}
    from_file = run_trainer(tmp_path, 2, training__steps=3, **{**file, "activation_checkpoint__mode": "none"})
    assert chosen(from_file.folder) == kept
    other = run_trainer(tmp_path, 2, training__steps=4, **{**file, "activation_checkpoint__mode": "full"})
    named = chosen(other.folder)
    assert (named["mode"], named["chosen"]) == ("full", "")
    assert "activation_checkpoint.mode: none -> full" in other.output.replace('"', "")


def test_without_devices_it_is_chosen_for_the_memory_that_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--memory_estimation.device_gib=60", "--activation_checkpoint.mode=auto", *SIZES]
    monkeypatch.setattr(command, "CONFIG", read_config(argv))
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert command.main() == 0
    assert re.search(r"auto has chosen +none: .* of 51.00 GiB \(60.00 less 9.00 in reserve\)", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_70b", "llama3_405b"])
def test_fast_files_change_what_they_say_and_nothing_else(name: str) -> None:
    base, fast = (load_config([], file) for file in (name, f"{name}_fast"))
    changed = [
        (option.name, base.value(option.name), fast.value(option.name))
        for options in options_of(JobConfig).values()
        for option in options.values()
        if base.value(option.name) != fast.value(option.name) and option.name != "job.config_file"
    ]
    assert {(key, str(old), str(new)) for key, old, new in changed} == {
        ("activation_checkpoint.mode", base.activation_checkpoint.mode, "auto"),
        ("model.converters", "[]", "['float8']"),
        ("float8.recipe_name", "None", "tensorwise"),
        ("float8.enable_fsdp_float8_all_gather", "False", "True"),
        ("float8.precompute_float8_dynamic_scale_for_fsdp", "False", "True"),
    }
    assert fast.float8.filter_fqns == ["output"]
