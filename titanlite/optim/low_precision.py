"""Adam and AdamW with moments in bfloat16, or in float8 with a scale for each block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.config.schema import Optimizer
from titanlite.optim.by_parameter import ByParameter, Place, Settings, compiled_update
from titanlite.optim.moments import (
    from_blocks,
    has_blocks,
    noise,
    round_to_bfloat16,
    to_blocks,
    zeros_of_blocks,
)
from titanlite.quant.streams import mix

_STATE = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")


class LowPrecisionAdam(ByParameter):
    """Adam and AdamW with moments of two bytes or one, or of stored weights. All arithmetic is in float32.

    In float8 the second moment is kept as its square root, which needs half the range. No positive one becomes 0, so
    that no update is divided by ``eps`` alone. Vectors, and matrices of which a process has rows that are no multiple
    of :data:`~titanlite.optim.moments.BLOCK` elements, keep float32.

    The update of a parameter is one compiled pass with ``options.implementation = "fused"``.
    """

    state_names = _STATE

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], options: Optimizer, seed: int) -> None:
        defaults = {"lr": options.lr, "betas": (options.beta1, options.beta2), "eps": options.eps}
        super().__init__(named, options, seed, {**defaults, "weight_decay": options.weight_decay})
        self._decoupled = options.name == "AdamW"
        self._dtype = getattr(torch, options.moments)
        self._adam: Callable[..., None] = adam if options.implementation == "fused" else _adam

    def numbers(self, group: dict[str, Any]) -> list[float]:
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"], float(self._decoupled)]

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor | None], settings: Settings, place: Place
    ) -> None:
        self._adam(weight, grad, *state, *settings, place.key, place.offset, place.shape)

    def create_state(self, param: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), device=param.device)}
        blocks = self._dtype.itemsize == 1 and has_blocks(param)
        dtype = torch.float32 if self._dtype.itemsize == 1 and not blocks else self._dtype
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = zeros_of_blocks(param, dtype, 1)
            if blocks:
                state[f"{key}_scale"] = zeros_of_blocks(param, torch.float32)
        return state


def _adam(
    param: Tensor,
    grad: Tensor,
    step: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
    numbers: Tensor,
    divisor: Tensor,
    skip: Tensor,
    key: int,
    offset: Sequence[int],
    shape: Sequence[int],
) -> None:
    """Update a shard of a parameter in place, and its state. The formulas are those of :class:`torch.optim.AdamW`.

    Args:
        param, grad: of one shape and any dtype.
        step, divisor, skip: float32 scalars.
        exp_avg, exp_avg_sq: of the shape of ``param``, in float32, bfloat16 or float8_e4m3fn.
        exp_avg_scale, exp_avg_sq_scale: float32 [..., n / BLOCK], with float8 moments only.
        numbers: float32 [6]: learning rate, both betas, eps, weight decay, and 1 for AdamW or 0 for Adam.
        key, offset, shape: see :class:`~titanlite.optim.by_parameter.Place`.
    """
    lr, beta1, beta2, eps, decay, decoupled = numbers.unbind()
    weight = param.float()
    if exp_avg_scale is None or exp_avg_sq_scale is None:
        first, second = exp_avg.float(), exp_avg_sq.float()
    else:
        first, second = from_blocks(exp_avg, exp_avg_scale), from_blocks(exp_avg_sq, exp_avg_sq_scale).square()
    count = step + 1
    gradient = grad.float() / divisor + (1 - decoupled) * decay * weight
    first = first + (gradient - first) * (1 - beta1)
    second = beta2 * second + (1 - beta2) * gradient.square()
    denominator = second.sqrt() / (1 - beta2**count).sqrt() + eps
    updated = weight * (1 - lr * decay * decoupled) - lr / (1 - beta1**count) * first / denominator
    results = [(param, updated.to(param.dtype)), (step, count)]
    if exp_avg.dtype == torch.float32:
        results += [(exp_avg, first), (exp_avg_sq, second)]
    else:
        noise1, noise2 = noise(mix(key + count.to(torch.int32)), offset, param.shape, shape)
        if exp_avg_scale is None or exp_avg_sq_scale is None:
            results += [(exp_avg, round_to_bfloat16(first, noise1)), (exp_avg_sq, round_to_bfloat16(second, noise2))]
        else:
            data, scale = to_blocks(first, noise1, keep_positive=False)
            results += [(exp_avg, data), (exp_avg_scale, scale)]
            data, scale = to_blocks(second.sqrt(), noise2, keep_positive=True)
            results += [(exp_avg_sq, data), (exp_avg_sq_scale, scale)]
    for tensor, result in results:
        if result.dtype == torch.float8_e4m3fn:  # which torch.where does not take
            tensor, result = tensor.view(torch.uint8), result.view(torch.uint8)
        tensor.copy_(torch.where(skip != 0, tensor, result))


adam = compiled_update(_adam, "adam", "updates of low-precision moments", changed=("param", *_STATE))
