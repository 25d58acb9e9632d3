"""The values that code compiled for an absent GPU computes: its kernels by Triton's interpreter, on the CPU.

Call :func:`install` after those of :mod:`device` and :mod:`recorder`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.select_algorithm import extern_kernels
from torch._subclasses.fake_tensor import unset_fake_temporarily

from absent_gpu import recorder

_real: dict[int, Tensor] = {}  # by the storage of the tensor without data that stands for it
_alive: list[Tensor] = []  # so that no storage is used again


def real(fake: Tensor) -> Tensor:
    """Return the tensor on the CPU that ``fake`` stands for; normal random numbers if it has none yet."""
    storage = fake.untyped_storage()._cdata
    with unset_fake_temporarily():
        if storage not in _real:
            generator = torch.Generator().manual_seed(len(_real))
            _real[storage] = torch.randn(fake.shape, generator=generator).to(fake.dtype)
            _alive.append(fake)
        base = _real[storage]
        return base.as_strided(fake.shape, fake.stride(), base.storage_offset() + fake.storage_offset())


def _fake(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with recorder.MODE:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    _real[fake.untyped_storage()._cdata] = value
    _alive.append(fake)
    return fake


def _load(graph: GraphLowering) -> types.ModuleType:
    """Take the place of ``GraphLowering.compile_to_module``."""
    module = recorder.module_of(graph, {"empty_strided_cuda": "_empty"}, "absent_gpu.values")
    call = module.call
    module.extern_kernels = _Extern()  # type: ignore[attr-defined]

    def computed(args: list[Any]) -> tuple[Any, ...]:
        values = [real(arg) if isinstance(arg, Tensor) else arg for arg in args]
        args.clear()
        with unset_fake_temporarily():
            outputs = call(values)
        return tuple(map(_fake, outputs))

    module.call = computed  # type: ignore[attr-defined]
    return module


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


class _Extern:
    """The matmuls of libraries, on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(extern_kernels, name)

    @staticmethod
    def _scaled_mm(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *_: Any, out_dtype: Any = None, out: Tensor, **__: Any
    ) -> None:
        out.copy_(a.float() @ b.float() * scale_a * scale_b)


class _Functions:
    """Device functions of libraries, which Triton's interpreter does not know."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        functions: dict[str, Callable[..., Any]] = {"isnan": lambda x: x != x}
        return functions.get(name) or getattr(tl, name)


def _run(tuned: Any, *args: Any, stream: Any = None, **kwargs: Any) -> None:
    """Take the place of a launch of an inductor's kernel, with the first of its configurations."""
    config = tuned.configs[0]
    options = triton_heuristics.config_to_dict(config)
    names = [name for name in tuned.fn.arg_names if name not in options]
    arguments = dict(zip(names, args)) | {name: v for name, v in options.items() if name in tuned.fn.arg_names}
    grid = triton_heuristics.GridExpr.from_meta(tuned.inductor_meta, config).eval_slow({**arguments, **options})
    recorder.interpret(tuned.fn, grid=grid, warmup=False, **arguments)


def install() -> None:
    """Make inductor's generated code compute, on the CPU, instead of being recorded."""
    GraphLowering.compile_to_module = _load  # type: ignore[method-assign, assignment]
    recorder.Tuned.run = _run  # type: ignore[method-assign, assignment]
    recorder.LIBRARIES = _Functions()
    recorder.HELPERS = triton_helpers
