"""The measuring process of ``titanlite doctor``: ``python -m titanlite.doctor.probe [options of the trainer]``.

It prints one JSON object per line as soon as it knows it, the most important first, so that whoever reads them can end
it at any time. A process of its own also keeps a crash of a driver from ending the report.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import warnings
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from titanlite.config import JobConfig, load_config, resolve_degrees
from titanlite.config.number_formats import NUMBER_FORMATS
from titanlite.config.schema import Parallelism
from titanlite.distributed.attention_kernel import preferred_kernels
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.doctor.ceilings import copy_bandwidth, matmul_ceilings
from titanlite.doctor.clock import time_in_turn
from titanlite.doctor.layers import DTYPES, LinearKind, format_of, layer_step, linear_kinds, model_step
from titanlite.doctor.machine import find_device
from titanlite.doctor.shallow import depth_of, shallow
from titanlite.environment import CONFIG_FILE
from titanlite.errors import ConfigError

BASE = "high precision"
GAINS = 1.03  # a ratio below this is no gain: machines are not as steady
_LAYER_SECONDS = {"cpu": 0.1, "cuda": 0.02}  # of the largest layer, forward and backward
_ROUNDS_SECONDS = {"cpu": 1.5, "cuda": 0.5}  # of all rounds of a comparison


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def for_one_process(config: JobConfig) -> JobConfig:
    """Return the configuration of one process, without what it does not need here."""
    config = copy.deepcopy(config)
    config.parallelism = Parallelism()
    config.training.global_batch_size, config.training.enable_cpu_offload = -1, False
    config.model.converters = []
    for number_format in NUMBER_FORMATS:  # one process gathers nothing
        section = getattr(config, number_format.name)
        for key in vars(section):
            if "all_gather" in key or "precompute" in key:
                setattr(section, key, False)
    if config.activation_checkpoint.mode == "auto":
        config.activation_checkpoint.mode = "none"
    return config


class Probe:
    """The measurements of one device with one configuration."""

    def __init__(self, config: JobConfig, device: torch.device) -> None:
        self.device, self.compile_first = device, config.training.compile
        self.config = for_one_process(config)
        self.dtype = DTYPES[config.training.mixed_precision_param]
        self.mesh: Mesh = build_mesh(resolve_degrees(self.config.parallelism, 1), device.type)
        self.kinds: dict[str, list[LinearKind]] = {BASE: linear_kinds(self.config, self.mesh, None)}
        self.emulated: dict[str, bool] = {}
        self.rates: dict[str, float] = {}
        # The speed over high precision, by (compiled, format, layer).
        self.gains: dict[tuple[bool, str, str], float] = {}

    def run(self) -> None:
        say(kind="copy", bytes_per_s=copy_bandwidth(self.device))
        self._convert()
        formats = {name: format for name in self.emulated if (format := format_of(self.kinds[name])) is not None}
        for name, rate in matmul_ceilings(self.device, formats):
            self.rates[name] = rate
            say(kind="matmul", format=name, flops_per_s=rate, emulated=self.emulated.get(name, False))
        for compiled in (self.compile_first, not self.compile_first):
            for measure in (partial(self._layers, compiled), partial(self._steps, compiled)):
                try:
                    measure()
                except Exception as e:  # of a compiler, for example: what else can be measured still is
                    why = str(e).strip().splitlines() or [type(e).__name__]
                    say(kind="failed", what=f"{'compiled' if compiled else 'eager'} layers or steps", why=why[0])
        say(kind="done")

    def _convert(self) -> None:
        for number_format in NUMBER_FORMATS:
            name = number_format.name
            if number_format.weight_bytes(self.config) == 1:
                why = "the recipe stores weights in the format to save memory; it is not meant to be faster"
                say(kind="refused", format=name, why=why)
                continue
            try:
                number_format.check(self._with(name))
                self.kinds[name] = linear_kinds(self.config, self.mesh, name)
                format = format_of(self.kinds[name])
                self.emulated[name] = bool(getattr(format and format.on(self.device), "emulate", False))
            except (ConfigError, ValueError) as e:
                say(kind="refused", format=name, why=str(e).splitlines()[0])

    def _with(self, converter: str) -> JobConfig:
        config = copy.deepcopy(self.config)
        config.model.converters = [converter]
        return config

    def _rate(self) -> float:
        """Return the FLOP/s of a matmul in high precision."""
        return self.rates[str(self.dtype).removeprefix("torch.")]

    # ---- layers

    def _tokens(self) -> int:
        """Return the rows of a layer's input: those of a microbatch, or as many as take a moment."""
        k, n = max((kind.sizes for kind in self.kinds[BASE]), key=lambda sizes: sizes[0] * sizes[1])
        affordable = int(_LAYER_SECONDS[self.device.type] * self._rate() / (6 * k * n))
        training = self.config.training
        return min(training.local_batch_size * training.seq_len, max(128, affordable // 128 * 128))

    def _layers(self, compiled: bool) -> None:
        """Measure each size of layers in each format once, those with the most FLOPs first."""
        tokens = self._tokens()
        measured: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
        emulation_shown: set[str] = set()
        ordered = sorted(self.kinds[BASE], key=lambda kind: -kind.count * kind.sizes[0] * kind.sizes[1])
        for base in ordered:
            converted = {
                name: kind
                for name, emulated in self.emulated.items()
                for kind in self.kinds[name]
                # Emulation is slower everywhere: one layer shows it.
                if kind.name == base.name and format_of([kind]) and name not in emulation_shown
            }
            emulation_shown |= {name for name in converted if self.emulated[name]}
            rows = measured.setdefault(base.sizes, {})
            missing = {name: kind for name, kind in converted.items() if name not in rows}
            if missing or not rows:
                ways = {
                    name: layer_step(kind.layer, tokens, self.dtype, self.device, compiled)
                    for name, kind in {BASE: base, **missing}.items()
                }
                seconds = time_in_turn(ways, self.device, _ROUNDS_SECONDS[self.device.type])
                rows |= {name: compared(seconds, name) for name in ways if name not in rows}
            about = {"kind": "layer", "compiled": compiled, "layer": base.suffix, "count": base.count}
            about |= {"features": base.sizes, "tokens": tokens}
            for name in (BASE, *converted):
                say(**about, format=name, emulated=self.emulated.get(name, False), **rows[name])
                if name != BASE:
                    self.gains[compiled, name, base.suffix] = rows[name]["speedup"]

    # ---- steps

    def _steps(self, compiled: bool) -> None:
        config = shallow(self.config, self._rate(), self.device)
        if config is None:
            say(kind="failed", what="steps", why="that of a single block takes too long, or too much memory, here")
            return
        training = config.training
        training.compile, config.compile.components = compiled, ["model"]
        native = [name for name, emulated in self.emulated.items() if not emulated]
        configs = {BASE: config, **{name: self._converted(config, name, compiled) for name in native}}
        ways = {
            name: model_step(changed, self.mesh, self.device, training.local_batch_size)
            for name, changed in configs.items()
        }
        seconds = time_in_turn(ways, self.device, _ROUNDS_SECONDS[self.device.type])
        about = {"kind": "step", "compiled": compiled, "blocks": depth_of(config), "of": depth_of(self.config)}
        about["tokens"] = training.local_batch_size * training.seq_len
        for name, changed in configs.items():
            filters = getattr(changed, name).filter_fqns if name != BASE else []
            say(**about, format=name, filter_fqns=filters, **compared(seconds, name))

    def _converted(self, config: JobConfig, name: str, compiled: bool) -> JobConfig:
        """Return ``config`` with a converter, which leaves out the layers that do not gain, unless none does."""
        config = copy.deepcopy(config)
        config.model.converters = [name]
        gains = {
            layer: gain for (mode, format, layer), gain in self.gains.items() if (mode, format) == (compiled, name)
        }
        losing = [layer for layer, gain in gains.items() if gain < GAINS]
        if len(losing) < len(gains):
            section = getattr(config, name)
            section.filter_fqns = [*section.filter_fqns, *losing]
        return config


def compared(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    """Return the median milliseconds, and the median ratio to high precision in the same round."""
    ratios = (base / taken for base, taken in zip(seconds[BASE], seconds[name], strict=True))
    return {"ms": median(seconds[name]) * 1e3, "speedup": median(ratios)}


def main() -> int:
    config = load_config(sys.argv[1:], os.environ.get(CONFIG_FILE) or None)
    logging.disable(logging.CRITICAL)  # the notices of converters are in the report
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device, _ = find_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    with preferred_kernels(device):
        Probe(config, device).run()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
