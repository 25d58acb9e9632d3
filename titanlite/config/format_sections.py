"""The sections of the number formats, [float8], [int8] and [mx], of the schema; see :mod:`titanlite.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from titanlite.config.value_rules import Scale

ScalingTypeName = Literal["dynamic", "delayed", "static"]


@dataclass
class Float8:
    """Options of the converter ``float8``; docs/float8.md has the cost of each option."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather FSDP's weights in float8: one byte per element, quantized once per optimizer step."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all gathered weights at once after the optimizer step, with one all-reduce."""
    force_recompute_fp8_weight_in_bwd: bool = False
    """Do not keep quantized weights between forward and backward: less memory, one more quantization."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """The float8 recipe; unset is tensorwise."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers to leave in high precision, by whole parts of their names; auto_filter_small_kn: small layers."""
    emulate: bool = False
    """Multiply the quantized values in float32. Without float8 units this is always done."""
    kernels: Literal["auto", "triton", "inductor"] = "auto"
    """The kernels of float8 casts: titanlite's (triton), the compiler's (inductor), or auto: in compiled blocks the
    kind that is faster, timed as a run begins on a GPU, or else the better one by count; elsewhere titanlite's."""
    kernels_chosen: str = ""
    """Informative: what auto has timed and chosen, as config.toml of the run folder says it."""
    scaling_type_input: ScalingTypeName = "dynamic"
    """Scale of the inputs: from the tensor itself (dynamic), from earlier steps (delayed), or constant (static)."""
    scaling_type_weight: ScalingTypeName = "dynamic"
    """Scale of the weights: as for the inputs."""
    scaling_type_grad_output: ScalingTypeName = "dynamic"
    """Scale of the gradients: as for the inputs."""
    static_scale_input: Scale | None = None
    """The factor of the inputs with static scaling: 448 / (the largest expected value)."""
    static_scale_weight: Scale | None = None
    """The factor of the weights with static scaling: 448 / (the largest expected value)."""
    static_scale_grad_output: Scale | None = None
    """The factor of the gradients with static scaling: 57344 / (the largest expected value)."""
    moe_fqns: list[str] = field(default_factory=list)
    """Experts to compute in float8, by whole parts of their names, such as experts. Needs the recipe rowwise."""


@dataclass
class Int8:
    """Options of the converter ``int8``; docs/quantized-training.md has the cost of each."""

    recipe_name: Literal["rowwise", "rowwise_with_gw_hp", "forward_only", "weights"] | None = None
    """The matmuls in int8: all three (rowwise; unset is this), all but the weight's gradient (rowwise_with_gw_hp), or
    the output only (forward_only). weights: the weights are stored in int8, and no matmul is in int8."""
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Layers to leave in high precision, by whole parts of their names. In the output projection int8 costs loss."""
    enable_fsdp_int8_all_gather: bool = False
    """Gather FSDP's weights in int8: one byte per element, quantized once per optimizer step."""
    enable_tensor_parallel_int8_all_gather: bool = False
    """Gather the inputs and gradients of tensor parallelism in int8 (rowwise only)."""
    emulate: bool = False
    """Multiply the quantized values in float32. Without int8 units this is always done."""
    moe_fqns: list[str] = field(default_factory=list)
    """Experts to compute in int8, by whole parts of their names, such as experts. Needs the recipe rowwise."""


@dataclass
class MX:
    """Options of the converter ``mx``; docs/quantized-training.md has the cost of each."""

    recipe_name: Literal["mxfp8", "mxfp8_with_gw_hp", "mxfp8_cublas", "mxfp8_emulated", "mxfp8_rceil"] = "mxfp8"
    """The matmuls in mxfp8: all three (mxfp8), or all but the weight's gradient (mxfp8_with_gw_hp). The others are
    names of torchtitan's: mxfp8_cublas is mxfp8, mxfp8_emulated adds mx.emulate, mxfp8_rceil that scale mode."""
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Layers to leave in high precision, by whole parts of their names."""
    scale_mode: Literal["rceil", "floor"] = "rceil"
    """The scale of a block: the smallest power of two that cuts off no value (rceil), or the standard's (floor)."""
    emulate: bool = False
    """Multiply the quantized values in float32. Without units for mxfp8 this is always done."""
    enable_fsdp_mxfp8_all_gather: bool = False
    """Let FSDP2 gather weights in mxfp8: a byte per element, and one per 32."""
    enable_tensor_parallel_mxfp8_all_gather: bool = False
    """Let tensor parallelism gather inputs and gradients in mxfp8."""
    use_fp8_dim1_cast_triton_kernel: bool = True
    mxfp8_dim1_cast_kernel_choice: str = "triton"
    moe_fqns: list[str] = field(default_factory=list)
    """Experts to compute in mxfp8, by whole parts of their names, such as experts."""
