"""A record of what compiled code launches, on tensors without data."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from absent_gpu.accesses import Part, Pointer, Traffic, count

MODE = FakeTensorMode(allow_non_fake_inputs=True)


@dataclass
class Launch:
    """One kernel. ``origin``: "inductor", "titanlite", or the name of an operator of a library such as "aten.mm"."""

    name: str
    origin: str
    traffic: Traffic


class Recorder(TorchDispatchMode):
    """Records the launches of generated code that runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._counted: dict[Any, Traffic] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "titanlite_quant":
            # The registered CUDA implementation, which allocates and launches; fake tensors would call the fake one.
            implementation = importlib.import_module("titanlite.quant.kernels.launch")
            name = {"cast": "cast_with"}.get(func._opname, func._opname)
            with self:
                return getattr(implementation, name)(*args, **(kwargs or {}))
        # Not every operator that writes to a given tensor has a version without data.
        out = kwargs["out"] if kwargs and "out" in kwargs else func(*args, **(kwargs or {}))
        if not (func.is_view or func._opname in _FREE or func.namespace == "prim"):
            read = sum(map(_bytes, {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}.values()))
            written = sum(map(_bytes, (t for t in tree_leaves(out) if isinstance(t, Tensor))))
            outputs = (kwargs or {}).get("out")
            read -= _bytes(outputs) if isinstance(outputs, Tensor) else 0
            name = f"{func.namespace}.{func._opname}"
            self.launches.append(Launch(name, name, Traffic(read, written, read + written, read + written)))
        return out

    def launch(
        self, name: str, origin: str, kernel: InterpretedFunction, grid: tuple[int, ...], arguments: dict[str, Any]
    ) -> None:
        self.launches.append(Launch(name, origin, self.traffic(kernel, grid, arguments)))

    def traffic(
        self, kernel: InterpretedFunction, grid: tuple[int, ...], arguments: dict[str, Any], parts: Sequence[Part] = ()
    ) -> Traffic:
        pointers = _pointers(arguments)
        key = (kernel, grid, tuple(pointers.items()))
        if key not in self._counted:
            self._counted[key] = count(kernel, grid, pointers, parts)
        return self._counted[key]


_FREE = {"empty", "empty_strided", "new_empty", "empty_like", "detach", "_unsafe_view", "as_strided", "set_"}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pointers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace the tensors by pointers; those that share memory get the same buffer."""
    buffers: dict[int, int] = {}
    pointers = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            buffer = buffers.setdefault(value.untyped_storage()._cdata, len(buffers))
            offset = int(value.storage_offset()) * value.element_size()
            value = Pointer(buffer, offset, _bytes(value), value.dtype)
        pointers[name] = value
    return pointers


# ---- generated code


class Tuned:
    """A kernel of inductor, with the configurations that it would time to choose one."""

    def __init__(self, fn: Any, configs: list[Any], inductor_meta: dict[str, Any]) -> None:
        self.fn, self.configs, self.inductor_meta = fn, configs, inductor_meta
        self.name = ""

    def _shapes(self) -> list[Any]:
        """Return one configuration for each shape of a program's tile; the length of its loops does not matter."""
        shapes = {}
        for config in self.configs:
            tile = ((name, size) for name, size in config.kwargs.items() if name.startswith(("XBLOCK", "YBLOCK")))
            shapes[tuple(sorted(tile))] = config
        return list(shapes.values())

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        recorder = _active
        assert recorder is not None
        choices = []
        for config in self._shapes():
            options = triton_heuristics.config_to_dict(config)
            names = [name for name in self.fn.arg_names if name not in options]
            arguments = dict(zip(names, args))
            known = {name: value for name, value in options.items() if name in self.fn.arg_names}
            grid = triton_heuristics.GridExpr.from_meta(self.inductor_meta, config).eval_slow({**arguments, **options})
            choices.append(recorder.traffic(self.fn, grid, {**arguments, **known}, _parts(self.inductor_meta, options)))
        # The compiler times them on the device; the one that moves least stands for the fastest.
        traffic = min(choices, key=lambda traffic: (traffic.sectors, traffic.total))
        recorder.launches.append(Launch(self.name, "inductor", traffic))


def _parts(meta: dict[str, Any], blocks: dict[str, int]) -> list[Part]:
    """Return the parts of a kernel that inductor has combined from several; nothing for others."""
    parts: list[Part] = []
    if meta["grid_type"] != "SequentialFlattenComboKernelGrid":
        assert "Combo" not in meta["grid_type"]
        return parts
    numbers, start = meta["combo_grid_meta"], 0
    for kernel in range(numbers["num_kernels"]):
        across = -(-numbers[f"xnumel_{kernel}"] // (1 if numbers[f"no_x_dim_{kernel}"] else blocks[f"XBLOCK_{kernel}"]))
        down = -(-numbers.get(f"ynumel_{kernel}", 1) // blocks.get(f"YBLOCK_{kernel}", 1))
        parts.append(Part(across * down, lambda program, first=start: (first + program, 0, 0)))  # type: ignore[misc]
        start += across * down
    return parts


def _autotune(size_hints: Any, configs: list[Any], triton_meta: Any, *_: Any, **kwargs: Any) -> Callable[[Any], Tuned]:
    return lambda fn: Tuned(fn, configs, kwargs["inductor_meta"])


class _AnyFunction:
    """Stands for a library of device functions, whose values do not matter here: returns the first argument."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: args[0]


class _Helpers:
    """Inductor's device functions, without the computation of values where it is slow in the interpreter."""

    maximum = minimum = staticmethod(lambda a, b: a)
    online_softmax_combine = staticmethod(lambda maximum, total, *_: (maximum, total))

    @staticmethod
    def online_softmax_reduce(maximum: Any, total: Any, dim: int, *_: Any) -> tuple[Any, Any]:
        return triton_helpers.max2(maximum, dim), triton_helpers.max2(total, dim)

    def __getattr__(self, name: str) -> Any:
        return getattr(triton_helpers, name)


LIBRARIES: Any = _AnyFunction()
HELPERS: Any = _Helpers()


def _kernel(_: AsyncCompile, name: str, source: str, device_str: str) -> Tuned:
    """Take the place of ``AsyncCompile.triton``: the kernel for the interpreter."""
    module = _module(name, source)
    module.libdevice = module.tl_math = LIBRARIES  # type: ignore[attr-defined]
    module.triton_helpers = HELPERS  # type: ignore[attr-defined]
    kernel: Tuned = next(value for value in vars(module).values() if isinstance(value, Tuned))
    kernel.name = name
    return kernel


def _module(name: str, source: str) -> types.ModuleType:
    """Import generated code from a file, where Triton looks for a kernel's source."""
    path = Path(tempfile.mkdtemp(dir=os.environ["TORCHINDUCTOR_CACHE_DIR"]), f"{name}.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reinterpret(tensor: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def module_of(graph: GraphLowering, allocations: dict[str, str], source_of_allocations: str) -> types.ModuleType:
    """Return the generated module, whose functions ``allocations`` are replaced by others of a module of ours."""
    code, _ = graph.codegen()
    source = code.value if hasattr(code, "value") else str(code)
    for name, replacement in allocations.items():
        line = f"from {source_of_allocations} import {replacement} as {name}"
        source, replaced = re.subn(rf"^{name} = .*$", line, source, flags=re.M)
        assert replaced == 1, name
    return _module("compiled", source)


def _load(graph: GraphLowering) -> types.ModuleType:
    """Take the place of ``GraphLowering.compile_to_module``: the generated module for tensors without data."""
    allocations = {"empty_strided_cuda": "_empty", "reinterpret_tensor": "_reinterpret"}
    module = module_of(graph, allocations, "absent_gpu.recorder")
    call = module.call

    def recorded(*args: Any) -> Any:
        assert _active is not None
        with MODE, _active:
            return call(*args)

    module.call = recorded  # type: ignore[attr-defined]
    return module


interpret = InterpretedFunction.run


def install() -> None:
    """Make inductor's generated code run on tensors without data, and its launches be recorded."""
    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (AsyncCompile, "triton", _kernel),
        (AsyncCompile, "wait", lambda *_: None),
        (triton_heuristics, "cached_autotune", _autotune),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (GraphLowering, "compile_to_module", _load),
        (InterpretedFunction, "run", _launch),
    ]
    for owner, name, function in replacements:
        setattr(owner, name, function)


def _launch(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """Take the place of ``InterpretedFunction.run``, for the kernels that titanlite launches itself."""
    assert _active is not None
    arguments = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    _active.launch(kernel.__name__, "titanlite", kernel, grid, arguments)


_active: Recorder | None = None


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record the launches within the context."""
    global _active
    recorder = Recorder()
    before, _active = _active, recorder
    try:
        with MODE:
            yield recorder
    finally:
        _active = before
