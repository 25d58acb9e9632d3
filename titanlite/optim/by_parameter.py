"""Optimizers that update one parameter after the other: with state of low precision, or weights that are stored in a
number format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.config.schema import Optimizer
from titanlite.quant.compiled import CompiledFunction
from titanlite.quant.format import Format, Operand
from titanlite.quant.fsdp import plain, shard_with_offset
from titanlite.quant.stored import StoredWeight, stored_weight
from titanlite.quant.streams import mix, random_bits, rounding_key


class Place(NamedTuple):
    """The place of this process's part of a parameter.

    Attributes:
        key, weight_key: int32 keys of the random bits that its state, and the weight itself, are rounded with.
        offset, shape: the place in the whole parameter, and the shape of that.
    """

    key: int
    weight_key: int
    offset: tuple[int, ...]
    shape: torch.Size


class Settings(NamedTuple):
    """What is the same for all parameters of a group, on one device.

    Attributes:
        numbers: float32 [n], those of :meth:`ByParameter.numbers`.
        divisor: what to divide the gradients by.
        skip: not 0 if the step is to change nothing.
    """

    numbers: Tensor
    divisor: Tensor
    skip: Tensor


def compiled_update(function: Callable[..., None], name: str, purpose: str, changed: Iterable[str]) -> Any:
    """Return ``function`` compiled, as the operator ``titanlite_optim::name``, which overwrites the arguments
    ``changed``. An operator, so that an estimate on fake tensors counts no temporaries: the compiled code has none.

    Args:
        purpose: named in the warning if it cannot be compiled.
    """
    compiled, schema = CompiledFunction(function, purpose), torch.library.infer_schema(function, mutates_args=changed)
    operator = torch.library.custom_op(
        f"titanlite_optim::{name}", lambda *args: compiled(*args), mutates_args=changed, schema=schema
    )
    operator.register_fake(lambda *args: None)
    return operator


class ByParameter(torch.optim.Optimizer):
    """An optimizer that updates one parameter after the other. All arithmetic is in float32.

    A weight that is stored quantized is dequantized, updated and stored again, rounded stochastically: only one is in
    float32 at a time.

    It divides the gradients and skips a step by the protocol of :class:`torch.amp.GradScaler`, as torch's fused
    optimizers do.

    Args:
        named: the parameters with their names.
        seed: of the run; the rounding is a function of it, of the parameter's name, of its step and of the place in it.

    Attributes:
        state_names: the names of the tensors of state of a parameter, of which the first is "step".
    """

    _step_supports_amp_scaling = True
    state_names: tuple[str, ...] = ("step",)

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], options: Optimizer, seed: int, defaults: dict[str, Any]
    ) -> None:
        super().__init__(list(named), defaults)  # type: ignore[arg-type]
        self._seed, self._fused = seed, options.implementation == "fused"
        self._places: dict[Tensor, Place] = {}

    @abstractmethod
    def numbers(self, group: dict[str, Any]) -> list[float]:
        """Return the numbers that an update depends on."""

    @abstractmethod
    def create_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""

    @abstractmethod
    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor | None], settings: Settings, place: Place
    ) -> None:
        """Update this process's part of a parameter, and its state, in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            settings: dict[torch.device, Settings] = {}
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if param.grad is None:
                    continue
                if param not in self.state:
                    self.state[param] = self.create_state(param)
                if param not in self._places:
                    keys = rounding_key(self._seed, name), rounding_key(self._seed, f"{name} weight")
                    self._places[param] = Place(*keys, shard_with_offset(param)[1], param.shape)
                if param.device not in settings:
                    settings[param.device] = self._settings(group, param.device)
                self._update(param, settings[param.device], self._places[param])

    def _update(self, param: Tensor, settings: Settings, place: Place) -> None:
        state = [_local(self.state[param].get(key)) for key in self.state_names]
        grad, stored = _local(param.grad), stored_weight(param)
        assert grad is not None
        weight = _local(plain(param)) if stored is None else stored.dequantized()
        assert weight is not None
        self.update(weight, grad, state, settings, place)
        if stored is not None:
            self._store(stored, weight, self.state[param]["step"], settings.skip, place)

    def _store(self, stored: StoredWeight, weight: Tensor, step: Tensor, skip: Tensor, place: Place) -> None:
        write = store if self._fused else _store

        def rounded(old: Operand, new: Tensor, amax: Tensor) -> None:
            assert old.scale is not None
            write(
                old.data,
                old.scale,
                new,
                amax,
                step,
                skip,
                place.weight_key,
                place.offset,
                place.shape,
                _number(stored.format),
            )

        stored.update(weight, rounded)

    def load_state_dict(self, state_dict: Any) -> None:
        """Raise NotImplementedError: torch's own would cast the state to the dtype of the parameters. titanlite's
        checkpoints load into the tensors of ``state``."""
        raise NotImplementedError("load into the tensors of .state, as titanlite.checkpoint does")

    def _settings(self, group: dict[str, Any], device: torch.device) -> Settings:
        one, zero = torch.ones((), device=device), torch.zeros((), device=device)
        divisor, skip = getattr(self, "grad_scale", one), getattr(self, "found_inf", zero)
        numbers = torch.tensor(self.numbers(group)).to(device, non_blocking=True)
        return Settings(numbers, divisor.to(device), skip.to(device))


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- the rounding of stored weights

_formats: list[Format] = []


def _number(format: Format) -> int:
    """Return a number for the format: an operator takes tensors and numbers alone."""
    if format not in _formats:
        _formats.append(format)
    return _formats.index(format)


def _store(
    data: Tensor,
    scale: Tensor,
    weight: Tensor,
    amax: Tensor,
    step: Tensor,
    skip: Tensor,
    key: int,
    offset: Sequence[int],
    shape: Sequence[int],
    format: int,
) -> None:
    """Overwrite a stored weight with new values, rounded stochastically.

    Args:
        data, scale: the stored weight.
        weight: the new values, float32.
        amax: of its whole rows.
        step: float32 scalar, the number of updates.
        skip: float32 scalar; not 0: change nothing.
        key, offset, shape: see :class:`Place`.
        format: the number of the format.
    """
    bits = random_bits(mix(key + step.to(torch.int32)), offset, weight.shape, shape)
    new = _formats[format].requantize(Operand(data, scale), weight, amax, bits)
    assert new.scale is not None
    data.copy_(torch.where(skip != 0, data, new.data))
    scale.copy_(torch.where(skip != 0, scale, new.scale))


store = compiled_update(_store, "store", "updates of stored weights", changed=("data", "scale"))
