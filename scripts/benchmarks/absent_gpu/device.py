"""A GPU that is not there, as PyTorch and Triton see it. Install it once in a process, before anything is compiled."""

from __future__ import annotations

import subprocess
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

GUARD = Path(__file__).with_name("device_guard.cpp")
# Published figures: name, compute capability, multiprocessors, memory in GiB, L2 cache in MiB, shared memory in bytes.
_GPUS: dict[str, tuple[str, tuple[int, int], int, int, int, int]] = {
    "sm_89": ("NVIDIA L40S", (8, 9), 142, 48, 96, 101376),
    "sm_90": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 80, 50, 232448),
    "sm_100": ("NVIDIA B200", (10, 0), 148, 180, 126, 232448),
}
ARCHITECTURES = tuple(_GPUS)


def environment(folder: Path) -> dict[str, str]:
    """Build the device guard in ``folder``, and return the variables that a process with an absent GPU starts with.

    Raises:
        subprocess.CalledProcessError: there is no C++ compiler, or it fails.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    library = folder / "device_guard.so"
    lib = Path(torch.__file__).parent / "lib"
    includes = [f"-I{path}" for path in include_paths()]
    command = ["c++", "-O1", "-shared", "-fPIC", "-std=c++20", *includes, str(GUARD), "-o", str(library), f"-L{lib}"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"], check=True)
    return {
        "LD_PRELOAD": str(library),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=folder),
    }


def install(architecture: str) -> None:
    """Make a GPU of ``architecture`` the device "cuda" of this process, whose code generation is inductor's."""
    import torch
    import torch._dynamo.device_interface as device_interface
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch.cuda.random
    import torch.utils._triton
    import triton
    from triton.backends.compiler import GPUTarget

    name, capability, multiprocessors, memory, cache, shared = _GPUS[architecture]
    number = 10 * capability[0] + capability[1]
    properties = types.SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=multiprocessors,
        total_memory=memory << 30,
        max_threads_per_multi_processor=1536 if architecture == "sm_89" else 2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        L2_cache_size=cache << 20,
        gcnArchName="",
        is_integrated=False,
        clock_rate=1755000,
        memory_clock_rate=2619000,
        memory_bus_width=5120,
    )
    state = torch.zeros(16, dtype=torch.uint8)
    _replace(
        torch.cuda,
        get_rng_state=state,
        set_rng_state=None,
        is_available=True,
        device_count=1,
        current_device=0,
        _lazy_init=None,
        get_device_properties=properties,
        get_device_capability=capability,
        get_device_name=name,
        is_bf16_supported=True,
        set_device=None,
        synchronize=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
    )
    _replace(torch.cuda.random, get_rng_state=state, set_rng_state=None)
    _replace(torch._C, _cuda_getCurrentRawStream=0)
    _replace(torch.utils._triton, has_triton=True)
    torch.version.cuda = "13.0"
    interface = device_interface.CudaInterface
    _replace(interface.Worker, static=True, get_device_properties=properties, current_device=0)
    _replace(
        interface,
        static=True,
        get_compute_capability=number,
        get_device_properties=properties,
        is_available=True,
        is_bf16_supported=True,
        is_triton_capable=True,
        raise_if_triton_unavailable=None,
        current_device=0,
        device_count=1,
        get_raw_stream=0,
        synchronize=None,
    )
    driver = types.SimpleNamespace(
        binary_ext="cubin",
        get_current_target=lambda: GPUTarget("cuda", number, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        is_active=lambda: True,
        get_device_interface=lambda: torch.cuda,
    )
    triton.runtime.driver.set_active(driver)
    inductor_config.fx_graph_cache = False
    inductor_config.compile_threads = 1
    inductor_config.worker_start_method = "subprocess"
    inductor_config.joint_graph_constant_folding = False
    functorch_config.enable_autograd_cache = False
    # Both would compute on the device.
    joint_graph.lazy_init = _always(None)
    begin = post_grad.lazy_init
    post_grad.lazy_init = lambda *args, **kwargs: begin(torch.device("cpu"))


def _always(value: object) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _replace(module: Any, static: bool = False, **values: object) -> None:
    for name, value in values.items():
        setattr(module, name, staticmethod(_always(value)) if static else _always(value))
