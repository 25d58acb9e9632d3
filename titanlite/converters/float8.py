"""The converter ``float8``, for linear layers in float8. It reads the options of ``titanlite.float8`` from the
configuration, and logs a table of the layers."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, cast

import torch
from torch import nn

from titanlite.config import JobConfig
from titanlite.converters.experts import convert_experts
from titanlite.converters.linears import (
    TOO_SMALL,
    check_shards,
    choose_linears,
    log_table,
    native_instead,
    target_or_device,
    warn_of_emulation,
)
from titanlite.converters.registry import TimedOption, register_converter
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.float8 import (
    CastConfig,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
    sync_float8_amax_and_scale_history,
)
from titanlite.float8.float8_linear_utils import too_small
from titanlite.quant import kernels
from titanlite.quant.devices import architecture
from titanlite.quant.float8.devices import has_native_float8, native_dtypes, why_not
from titanlite.quant.float8.format import Kernels

logger = logging.getLogger()


def library_config(config: JobConfig, emulate: bool) -> Float8LinearConfig:
    """Return the library's configuration for the options of [float8]."""
    options = config.float8
    casts: dict[str, Any] = {}
    for operand, other in (("input", "grad_weight"), ("weight", "grad_input"), ("grad_output", "grad_weight")):
        scaling = ScalingType(getattr(options, f"scaling_type_{operand}"))
        if scaling is not ScalingType.DYNAMIC:
            cast = CastConfig(scaling_type=scaling, static_scale=getattr(options, f"static_scale_{operand}"))
            casts |= {f"cast_config_{operand}": cast, f"cast_config_{operand}_for_{other}": cast}
    return dataclasses.replace(
        Float8LinearConfig.from_recipe_name(options.recipe_name or "tensorwise"),
        **casts,
        emulate=emulate,
        kernels=options.kernels,
        enable_fsdp_float8_all_gather=options.enable_fsdp_float8_all_gather,
        force_recompute_fp8_weight_in_bwd=options.force_recompute_fp8_weight_in_bwd,
    )


KINDS = {"inductor": "the compiler's kernels", "triton": "titanlite's"}


def kernels_by_count(config: Float8LinearConfig, compiled: bool, block_fusion: bool) -> tuple[Kernels, str]:
    """Return the kernels that are better by count (docs/performance.md), and why in words. Where bytes are about equal,
    launches decide.

    Args:
        compiled: the model is, by inductor.
        block_fusion: with the rules for blocks.
    """
    if not kernels.AVAILABLE:
        return "inductor", "triton is not installed"
    if not compiled:
        return "triton", "without the compiler, plain operations are not fused"
    if not has_dynamic_scales(config):
        return "inductor", "the scales are not dynamic"
    if block_fusion:
        return "inductor", "compile.block_fusion fuses casts with what is computed before them"
    if any(each.is_axiswise for each in config.casts.values()):
        return "triton", "without compile.block_fusion, the compiler writes scaled columns byte by byte"
    return "inductor", "the compiler fuses casts with what is computed before them"


def has_dynamic_scales(config: Float8LinearConfig) -> bool:
    return all(each.is_dynamic for each in config.casts.values() if each.is_cast)


@register_converter("float8")
class Float8Converter:
    is_native = staticmethod(has_native_float8)

    @staticmethod
    def has_units(architecture: str) -> bool:
        return bool(native_dtypes(architecture))

    @staticmethod
    def option_to_time(config: JobConfig, device: torch.device) -> TimedOption | None:
        options, compiling = config.float8, config.compile_options("model")
        if options.kernels != "auto" or options.emulate or not kernels.AVAILABLE or device.type != "cuda":
            return None
        if compiling is None or not compiling.by_inductor or not native_dtypes(architecture(device)):
            return None
        library = library_config(config, emulate=False)
        if not has_dynamic_scales(library):
            return None
        by_count, _ = kernels_by_count(library, True, compiling.fuses_blocks)
        return TimedOption("float8.kernels", KINDS, by_count)

    def __init__(self, config: JobConfig, mesh: Mesh) -> None:
        options = config.float8
        self.architecture = target_or_device(mesh)
        native = bool(native_dtypes(self.architecture))
        self.recipe = options.recipe_name or "tensorwise"
        if options.kernels == "triton" and (options.emulate or not native):
            why = "float8.emulate = true" if options.emulate else f"{self.architecture} has no float8 units"
            raise ConfigError(
                f"{why}, and emulation is plain operations; leave float8.kernels out",
                key="float8.kernels",
                value="triton",
            )
        self.config = dataclasses.replace(
            library_config(config, emulate=options.emulate or not native), target=mesh.target.architecture
        )
        compiling = config.compile_options("model")
        self.compiled = compiling is not None and compiling.by_inductor
        self.block_fusion = compiling is not None and compiling.fuses_blocks
        reason = why_not(
            self.architecture,
            set(self.config.format.dtypes),
            emulate=self.config.emulate,
            compiled=self.compiled,
        )
        if reason:
            raise ConfigError(reason, key="model.converters", value="float8")
        if not native and not options.emulate:
            warn_of_emulation("float8", self.architecture)
        self.mesh = mesh
        self.filter_fqns, self.moe_fqns = options.filter_fqns, options.moe_fqns
        self.precompute = options.precompute_float8_dynamic_scale_for_fsdp
        timed, _, why = options.kernels_chosen.partition(": ")
        self.timed_kernels = (cast(Kernels, timed), why) if timed in KINDS and self.compiled else None
        self.delayed = any(c.scaling_type is ScalingType.DELAYED for c in self.config.casts.values())

    def convert(self, model: nn.Module) -> str:
        choice = choose_linears(
            model, "float8", self.config.format, self.filter_fqns, lambda k, n: too_small(self.recipe, k, n)
        )
        self._check_shards(choice.chosen)
        if not self.config.emulate and self.config.kernels == "auto":
            self.config = dataclasses.replace(self.config, kernels=self._choose_kernels())
        try:
            convert_to_float8_training(
                model, module_filter_fn=lambda _, name: name not in choice.kept, config=self.config
            )
        except ValueError as e:
            raise ConfigError(str(e), key="model.converters", value="float8") from e
        experts = convert_experts(model, "float8", self.config.format, self.moe_fqns)
        log_table(model, choice, self._why_no_gain)
        instead = native_instead(self.architecture) if self.config.emulate else ""
        return f"{self.recipe}{', emulated' if self.config.emulate else ''}, {choice.share()}{experts}{instead}"

    def _why_no_gain(self, in_features: int, out_features: int) -> str | None:
        slower = not self.config.emulate and too_small(self.recipe, in_features, out_features)
        return TOO_SMALL if slower else None

    def _choose_kernels(self) -> Kernels:
        """Return the kernels that ``kernels = "auto"`` selects, and log the reason."""
        chosen, why = self.timed_kernels or kernels_by_count(self.config, self.compiled, self.block_fusion)
        logger.info('float8.kernels = "auto": %s; %s', chosen, why)
        return chosen

    def _check_shards(self, chosen: dict[str, nn.Linear]) -> None:
        """Check that all shards have the same number of rows, since scales of rows are gathered with the rows."""
        if not (self.config.enable_fsdp_float8_all_gather and self.config.cast_config_weight.is_axiswise):
            return
        check_shards(chosen, self.mesh, "float8", "float8.enable_fsdp_float8_all_gather")

    def post_optimizer_hook(self, model: nn.Module) -> None:
        if self.delayed:
            sync_float8_amax_and_scale_history(model, group=self.mesh.stage.get_group())
        if self.precompute:
            precompute_float8_dynamic_scale_for_fsdp(model)
