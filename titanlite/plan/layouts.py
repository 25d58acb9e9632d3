"""All layouts of a model over a number of devices, and those that fit, the fastest first."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from titanlite.config import JobConfig
from titanlite.config.number_formats import NUMBER_FORMATS, formats_of
from titanlite.errors import ConfigError
from titanlite.metrics.flops import flops_per_token
from titanlite.plan.auto_checkpoint import MODES, Mode
from titanlite.plan.devices import Device
from titanlite.plan.layout_memory import ROOM, LayoutMemory, reserved_gib
from titanlite.plan.refusals import PlannedModel, check_by_building
from titanlite.plan.time import Parts, mfu, step_time
from titanlite.plan.work import Work, work_of

_BATCHES = (1, 2, 4, 8, 16, 32)
_ROUNDS = (1, 2, 4, 8)  # microbatches for each stage of a pipeline
_SCHEDULES = ("1F1B", "Interleaved1F1B")
_DEEPEST, _LONGEST = 16, 16  # degrees of pipeline and context parallelism
Options = dict[str, Any]


@dataclass
class Layout:
    """A layout with its prediction.

    Attributes:
        options: what is changed in the configuration, as ``section.key`` -> value.
    """

    options: Options
    work: Work
    memory: LayoutMemory
    device: Device
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = step_time(self.work, self.device)

    @property
    def worst_gib(self) -> float | None:
        """The memory if all tokens choose experts of one device; None without expert parallelism."""
        return reserved_gib(self.work, worst=True).total if self.work.degrees.expert_parallel > 1 else None

    @property
    def fits(self) -> bool:
        return self.memory.total <= ROOM * self.device.memory_gib

    @property
    def tps_per_device(self) -> float:
        return self.work.tokens_per_device / self.parts.seconds

    def mfu_pct(self, model: PlannedModel) -> float:
        flops = flops_per_token(model.meta.size(), self.work.seq_len)
        return mfu(self.work, self.device, self.parts.seconds, flops)

    def apply(self, config: JobConfig) -> JobConfig:
        """Return ``config`` with the options of the layout."""
        return changed(copy.deepcopy(config), self.options)


@dataclass
class Plan:
    """The layouts of a model.

    Attributes:
        layouts: the best first: those that fit; where none does, those that need the least memory.
        tried: how many there are.
        refused: how many of them the trainer refuses.
        too_large: how many do not fit.
    """

    model: PlannedModel
    device: Device
    devices: int
    layouts: list[Layout]
    tried: int = 0
    refused: int = 0
    too_large: int = 0


def changed(config: JobConfig, options: Options) -> JobConfig:
    """Set ``options`` in ``config``, and return it."""
    for name, value in options.items():
        section, _, key = name.rpartition(".")
        setattr(config.section(section), key, value)
    return config


def make_plan(config: JobConfig, model: PlannedModel, device: Device, devices: int, top: int) -> Plan:
    """Try all layouts, and return the ``top`` best of them. Options that layouts do not vary stay as configured."""
    plan, scratch = Plan(model, device, devices, []), copy.deepcopy(config)
    candidates: list[Layout] = []
    n_experts = model.args.mixture.n_experts if model.args.mixture else 1
    for options in meshes(config, device, devices, n_experts):
        smallest = {**options, **_smallest(options)}
        try:
            model.check(changed(scratch, smallest), devices)
            even = work_of(scratch, model.args, devices).has_even_rows
        except ConfigError:
            plan.tried += 1
            plan.refused += 1
            continue
        for batch, alternatives in itertools.product(batches(config, options), recipes(config, device)):
            recipe = alternatives[0] if even else alternatives[-1]
            candidates += _variants(plan, scratch, {**options, **batch, **recipe})
    fitting = sorted((layout for layout in candidates if layout.fits), key=lambda layout: -layout.tps_per_device)
    plan.too_large = len(candidates) - len(fitting)
    ranked = fitting or sorted(candidates, key=lambda layout: layout.memory.total)
    for layout in ranked:
        if len(plan.layouts) == top:
            break
        try:
            model.check(changed(copy.deepcopy(config), layout.options), devices)
            if layout.work.gathers_uneven_rows:
                check_by_building(layout.apply(config), devices)
        except ConfigError:
            plan.refused += 1
            continue
        layout.options = {name: value for name, value in layout.options.items() if value != config.value(name)}
        plan.layouts.append(layout)
    return plan


def fixed_plan(config: JobConfig, model: PlannedModel, device: Device, devices: int) -> Plan:
    """Return the plan of the configured layout alone; "auto" is the first mode of checkpointing that fits.

    Raises:
        ConfigError: the trainer would refuse it.
    """
    options: list[Options] = [{}]
    if config.activation_checkpoint.mode == "auto":
        options = [_checkpointing(mode) for mode in MODES]
    layouts = []
    for choice in options:
        resolved = changed(copy.deepcopy(config), choice)
        model.check(resolved, devices)
        work = work_of(resolved, model.args, devices)
        layouts.append(Layout(choice, work, reserved_gib(work), device))
        if layouts[-1].fits:
            break
    return Plan(model, device, devices, layouts[-1:], tried=len(layouts), too_large=sum(not x.fits for x in layouts))


def meshes(config: JobConfig, device: Device, devices: int, n_experts: int = 1) -> Iterator[Options]:
    """Yield the degrees. Tensor parallelism stays in a machine, where links are fast."""
    p, inside = "parallelism.", min(device.per_node, devices)
    nodes = max(1, devices // device.per_node)
    for tp, cp, pp in itertools.product(_divisors(inside), _divisors(devices), _divisors(devices)):
        if devices % (tp * cp * pp) or cp > _LONGEST or pp > _DEEPEST:
            continue
        data = devices // (tp * cp * pp)
        replicated = sorted({1, *(n for n in (nodes, data) if data % n == 0)})
        for replicas, ep in itertools.product(replicated, _divisors(n_experts)):
            if devices // pp // replicas % ep:
                continue
            yield {
                f"{p}data_parallel_replicate_degree": replicas,
                f"{p}data_parallel_shard_degree": -1,
                f"{p}tensor_parallel_degree": tp,
                f"{p}context_parallel_degree": cp,
                f"{p}pipeline_parallel_degree": pp,
                f"{p}expert_parallel_degree": ep,
                f"{p}disable_loss_parallel": config.parallelism.disable_loss_parallel and tp > 1,
                f"{p}enable_async_tensor_parallel": False,
                f"{p}pipeline_parallel_schedule": "1F1B",
                f"{p}pipeline_parallel_microbatch_size": 1,
            }


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _smallest(options: Options) -> Options:
    pp = options["parallelism.pipeline_parallel_degree"]
    return {"training.local_batch_size": pp, "training.global_batch_size": -1}


def batches(config: JobConfig, mesh: Options) -> Iterator[Options]:
    """Yield the sequences that a device computes at a time, and with a pipeline its schedule. A global batch that the
    configuration names is kept."""
    pp = mesh["parallelism.pipeline_parallel_degree"]
    kept = {"training.global_batch_size": config.training.global_batch_size}
    if pp == 1:
        yield from ({"training.local_batch_size": batch, **kept} for batch in _BATCHES)
        return
    for rounds, schedule in itertools.product(_ROUNDS, _SCHEDULES):
        yield {"training.local_batch_size": rounds * pp, "parallelism.pipeline_parallel_schedule": schedule, **kept}


def recipes(config: JobConfig, device: Device) -> Iterator[list[Options]]:
    """Yield the converters: those that are configured; without a number format among them also each of those whose time
    is modelled, where the device has units for it. Converters on the command line, and none, are kept. Of two
    alternatives, the second one is for shards with different numbers of rows."""
    yield [{"model.converters": config.model.converters}]
    kept = config.origin("model.converters").startswith("the argument")
    if not (kept or formats_of(config)) and device.fp8_tflops:
        for number_format in NUMBER_FORMATS:
            if number_format.cost is None or not number_format.cost(config).is_native(device.architecture):
                continue
            converters = {"model.converters": [*config.model.converters, number_format.name]}
            left_out = {f"{number_format.name}.filter_fqns": ["output"]}
            for alternatives in number_format.variants:
                yield [{**converters, **left_out, **options} for options in alternatives]


def _checkpointing(mode: Mode) -> Options:
    option = {"activation_checkpoint.selective_ac_option": mode.option} if mode.option else {}
    return {"activation_checkpoint.mode": mode.mode, **option}


def _variants(plan: Plan, scratch: JobConfig, options: Options) -> Iterator[Layout]:
    """Yield the layouts with each way of checkpointing, and with asynchronous tensor parallelism where there is any; of
    the ways that fit, the one that recomputes least is the fastest, and the others are left out."""
    tp = options["parallelism.tensor_parallel_degree"]
    for overlapped in (False, True) if tp > 1 and scratch.training.compile else (False,):
        for mode in MODES:
            every = {**options, **_checkpointing(mode), "parallelism.enable_async_tensor_parallel": overlapped}
            plan.tried += 1
            try:
                work = work_of(changed(scratch, every), plan.model.args, plan.devices)
                layout = Layout(every, work, reserved_gib(work), plan.device)
            except ConfigError:  # a global batch that does not divide, or more stages than blocks
                plan.refused += 1
                continue
            if work.gathers_uneven_rows and work.cost is not None and set(work.cost.filter_fqns) <= {"output"}:
                plan.refused += 1  # as when it is built, which takes seconds
                continue
            yield layout
            if layout.fits:
                break
