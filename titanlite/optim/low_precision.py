"""Adam and AdamW with moments in bfloat16, or in float8 with a scale for each block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.config.schema import Optimizer
from titanlite.optim.moments import (
    BLOCK,
    from_blocks,
    has_blocks,
    key_of,
    mix,
    noise,
    round_to_bfloat16,
    to_blocks,
)
from titanlite.quant.compiled import CompiledFunction
from titanlite.quant.fsdp import plain, shard_with_offset

_STATE = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")


class LowPrecisionAdam(torch.optim.Optimizer):
    """Adam and AdamW with moments of two bytes or one. The weights and all arithmetic are in float32.

    In float8 the second moment is kept as its square root, which needs half the range. No positive one becomes 0, so
    that no update is divided by ``eps`` alone. Vectors, and matrices of which a process has rows that are no multiple
    of :data:`~titanlite.optim.moments.BLOCK` elements, keep float32.

    The update of a parameter is one compiled pass with ``options.implementation = "fused"``. It divides the gradients
    and skips a step by the protocol of :class:`torch.amp.GradScaler`, as torch's fused optimizers do.

    Args:
        named: the parameters with their names.
        seed: of the run; the rounding is a function of it, of the parameter's name, of its step and of the place in it.
    """

    _step_supports_amp_scaling = True

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], options: Optimizer, seed: int) -> None:
        defaults = {"lr": options.lr, "betas": (options.beta1, options.beta2), "eps": options.eps}
        super().__init__(list(named), {**defaults, "weight_decay": options.weight_decay})  # type: ignore[arg-type]
        self._decoupled = options.name == "AdamW"
        self._places: dict[Tensor, tuple[int, tuple[int, ...], torch.Size]] = {}
        self._dtype, self._seed = getattr(torch, options.moments), seed
        self._update: Callable[..., None] = adam if options.implementation == "fused" else _adam

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            settings: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if param.grad is None:
                    continue
                if param not in self.state:
                    self.state[param] = self._create_state(param)
                if param not in self._places:
                    self._places[param] = key_of(self._seed, name), shard_with_offset(plain(param))[1], param.shape
                if param.device not in settings:
                    settings[param.device] = self._settings(group, param.device)
                state = [_local(self.state[param].get(key)) for key in _STATE]
                weight, grad = _local(plain(param)), _local(param.grad)
                self._update(weight, grad, *state, *settings[param.device], *self._places[param])

    def load_state_dict(self, state_dict: Any) -> None:
        """Raise NotImplementedError: torch's own would cast the moments to the dtype of the parameters. titanlite's
        checkpoints load into the tensors of ``state``."""
        raise NotImplementedError("load into the tensors of .state, as titanlite.checkpoint does")

    def _settings(self, group: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is the same for all parameters: the numbers of the group, the divisor, and whether to skip."""
        numbers = [group["lr"], *group["betas"], group["eps"], group["weight_decay"], float(self._decoupled)]
        one, zero = torch.ones((), device=device), torch.zeros((), device=device)
        divisor, skip = getattr(self, "grad_scale", one), getattr(self, "found_inf", zero)
        return torch.tensor(numbers).to(device, non_blocking=True), divisor.to(device), skip.to(device)

    def _create_state(self, param: Tensor) -> dict[str, Tensor]:
        weight = plain(param)
        state = {"step": torch.zeros((), device=param.device)}
        blocks = self._dtype.itemsize == 1 and has_blocks(weight)
        dtype = torch.float32 if self._dtype.itemsize == 1 and not blocks else self._dtype
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = _zeros(weight, dtype)
            if blocks:
                state[f"{key}_scale"] = _zeros(weight, torch.float32, BLOCK)
        return state


def _zeros(like: Tensor, dtype: torch.dtype, divisor: int = 1) -> Tensor:
    """Return zeros in ``dtype``, sharded as ``like``, with its last dimension divided by ``divisor``."""
    local = like.to_local() if isinstance(like, DTensor) else like
    zeros = torch.zeros((*local.shape[:-1], local.shape[-1] // divisor) if local.dim() else (), device=local.device)
    zeros = zeros.to(dtype)
    if not isinstance(like, DTensor):
        return zeros
    shape = torch.Size((*like.shape[:-1], like.shape[-1] // divisor))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
        key: of the parameter, for the noise.
        offset, shape: the place of the shard in the whole parameter, and the shape of that.
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


_adam_compiled = CompiledFunction(_adam, "updates of low-precision moments")


# An operator, so that an estimate on fake tensors counts no temporaries: the compiled code has none.
_CHANGED = ("param", *_STATE)
adam = torch.library.custom_op(
    "titanlite_optim::adam",
    lambda *args: _adam_compiled(*args),
    mutates_args=_CHANGED,
    schema=torch.library.infer_schema(_adam, mutates_args=_CHANGED),
)
adam.register_fake(lambda *args: None)
