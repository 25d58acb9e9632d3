"""The FLOPs and bytes of a linear layer in bfloat16 and with each float8 recipe, counted from its configuration, and
the ceilings that turn counts into seconds. No GPU is needed to count."""

from __future__ import annotations

from typing import NamedTuple

from casts import bytes_per_element, reads, swiglu_reads

from titanlite.float8 import Float8LinearConfig

BF16 = 2  # bytes
RESCALE = 2 * BF16  # a product is read and written once more


class Ceilings(NamedTuple):
    """The rates that the device reaches: FLOP/s of bfloat16 matmuls and of float8 ones with fast and with full
    accumulation, and bytes/s of a copy, reads and writes together. ``scales_follow``: scales of rows take a pass of
    their own after matmuls with full accumulation (titanlite/quant/float8/matmul.py)."""

    bf16: float
    fp8: float
    fp8_full: float
    bandwidth: float
    scales_follow: bool = False


class Gemm(NamedTuple):
    """(m, k) times (k, n); ``precision`` is a rate of :class:`Ceilings`; ``row_scales``: it has full accumulation
    and scales of rows, which some devices apply in another pass."""

    name: str
    m: int
    k: int
    n: int
    precision: str
    row_scales: bool

    def seconds(self, at: Ceilings) -> float:
        """The longer one of computing, and of moving the operands and the product; without rescaling."""
        rate: float = getattr(at, self.precision)
        operands = (self.m * self.k + self.k * self.n) * (BF16 if self.precision == "bf16" else 1)
        return max(2 * self.m * self.k * self.n / rate, (operands + BF16 * self.m * self.n) / at.bandwidth)

    def rescale_bytes(self, scales_follow: bool) -> int:
        return RESCALE * self.m * self.n if self.row_scales and scales_follow else 0


def config_of(recipe: str) -> Float8LinearConfig | None:
    """None for "bf16"."""
    return None if recipe == "bf16" else Float8LinearConfig.from_recipe_name(recipe)


def gemms(recipe: str, m: int, k: int, n: int) -> list[Gemm]:
    """The three of a layer with ``k`` features in and ``n`` out, for ``m`` tokens."""
    config = config_of(recipe)
    sizes = {"output": (m, k, n), "grad_input": (m, n, k), "grad_weight": (n, m, k)}
    if config is None:
        return [Gemm(name, *size, "bf16", False) for name, size in sizes.items()]
    uses = {
        "output": (config.cast_config_input, config.cast_config_weight, config.gemm_config_output),
        "grad_input": (
            config.cast_config_grad_output,
            config.cast_config_weight_for_grad_input,
            config.gemm_config_grad_input,
        ),
        "grad_weight": (
            config.cast_config_grad_output_for_grad_weight,
            config.cast_config_input_for_grad_weight,
            config.gemm_config_grad_weight,
        ),
    }
    matmuls = []
    for name, (a, b, gemm_config) in uses.items():
        precision = "bf16" if not a.is_cast else "fp8" if gemm_config.use_fast_accum else "fp8_full"
        row_scales = (a.is_axiswise or b.is_axiswise) and not gemm_config.use_fast_accum
        matmuls.append(Gemm(name, *sizes[name], precision, row_scales))
    return matmuls


def _again(by_rows: str, by_columns: str, features: int) -> int:
    """As ``bytes_per_element``, with the largest magnitudes known."""
    once = bytes_per_element(by_rows, by_columns, features)
    return once - BF16 * (reads(by_rows, by_columns, features) - 1)


def input_bytes(recipe: str, k: int, again: bool = False) -> int:
    """That casting a layer's input takes, for each of its elements; ``k`` features. ``again``: with its largest
    magnitudes known."""
    config = config_of(recipe)
    if config is None:
        return 0
    layouts = config.cast_config_input.layout, config.cast_config_input_for_grad_weight.layout
    return _again(*layouts, k) if again else bytes_per_element(*layouts, k)


def swiglu_bytes(recipe: str, k: int) -> tuple[int, int]:
    """Return the bytes that SwiGLU moves for each of its ``k`` features, with the cast of its product for the layer
    that takes it, and in backward. In float8 the product is not written: backward makes the copy for grad_weight beside
    the gradients."""
    config = config_of(recipe)
    if config is None:
        return 3 * BF16, 5 * BF16
    first, second = config.cast_config_input.layout, config.cast_config_input_for_grad_weight.layout
    return 2 * BF16 * swiglu_reads(first, second, k) + 1, 5 * BF16 + (BF16 if second == "none" else 1)


def grad_bytes(recipe: str, n: int) -> int:
    """As :func:`input_bytes`, of the gradient of its output, of ``n`` features."""
    config = config_of(recipe)
    if config is None:
        return 0
    layouts = config.cast_config_grad_output.layout, config.cast_config_grad_output_for_grad_weight.layout
    return bytes_per_element(*layouts, n)


def weight_bytes(recipe: str, k: int) -> int:
    """As :func:`input_bytes`, of its weight, once in forward and once in backward: compiled code, and weights that
    FSDP2 gathers anew, have no copy from forward."""
    config = config_of(recipe)
    if config is None:
        return 0
    backward = bytes_per_element("none", config.cast_config_weight_for_grad_input.layout, k)
    return weight_bytes_of_output(recipe, k) + backward


def weight_bytes_of_output(recipe: str, k: int, again: bool = False) -> int:
    """The part of :func:`weight_bytes` that is of forward."""
    config = config_of(recipe)
    if config is None:
        return 0
    layout = config.cast_config_weight.layout
    return _again(layout, "none", k) if again else bytes_per_element(layout, "none", k)


def cast_bytes(recipe: str, m: int, k: int, n: int) -> int:
    """All that the casts of one layer's step move."""
    return m * k * input_bytes(recipe, k) + m * n * grad_bytes(recipe, n) + k * n * weight_bytes(recipe, k)


class Prediction(NamedTuple):
    """Seconds of forward and backward: the matmuls, and in float8 the casts and the passes that apply scales."""

    matmuls: float
    casts: float
    rescales: float

    @property
    def seconds(self) -> float:
        return sum(self)


def predict(recipe: str, m: int, k: int, n: int, at: Ceilings) -> Prediction:
    products = gemms(recipe, m, k, n)
    return Prediction(
        sum(gemm.seconds(at) for gemm in products),
        cast_bytes(recipe, m, k, n) / at.bandwidth,
        sum(gemm.rescale_bytes(at.scales_follow) for gemm in products) / at.bandwidth,
    )
