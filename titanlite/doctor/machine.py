"""The facts of a machine: devices, memory, connections and versions. Nothing is measured."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from titanlite import __version__
from titanlite.errors import counted
from titanlite.metrics.device import GIB, host_memory, peak_flops
from titanlite.quant.devices import architecture

_PACKAGES = ("torch", "triton", "torchao", "transformers", "tokenizers", "datasets", "numpy")


def machine(device: torch.device) -> dict[str, str]:
    """Return the rows of a table about this machine. A fact that cannot be read says why, and is no error."""
    facts: dict[str, Callable[[], str]] = {
        "system": lambda: f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": _processor,
        "its instructions": _instructions,
        "memory": _memory,
        "disk": _disk,
        "GPUs": _gpus,
    }
    if device.type == "cuda":
        facts |= {
            "architecture": lambda: architecture(device),
            "peak": lambda: _peak(device),
            "driver": _driver,
            "between the GPUs": _interconnect,
        }
    facts |= {"versions": _versions}
    return {name: read_fact(fact) for name, fact in facts.items()}


def read_fact(fact: Callable[[], str]) -> str:
    """Return the fact, or why it cannot be read: drivers and files of machines differ."""
    try:
        return fact()
    except Exception as e:
        return f"unknown ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'})"


def find_device() -> tuple[torch.device, str]:
    """Return the device that the trainer would use, with a remark where a GPU is there but cannot be used."""
    try:
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")
            return torch.device("cuda", 0), ""
    except Exception as e:
        return torch.device("cpu"), f"there is a GPU, but it cannot be used ({str(e).splitlines()[0]})"
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        return torch.device("cpu"), "there may be a GPU, but this torch is built for the CPU"
    return torch.device("cpu"), ""


def usable_cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    model = platform.processor() or "unknown"
    file = Path("/proc/cpuinfo")
    if file.exists():
        names = [line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {counted(usable_cores(), 'core')}, {counted(torch.get_num_threads(), 'thread')} of torch"


def _instructions() -> str:
    sets: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # before torch 2.12 there is no such function
    of_matmuls = [name for name, there in sets.items() if there is True and name[:2] in ("av", "am")]  # AVX's and AMX's
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *sorted(of_matmuls)])


def _memory() -> str:
    text = f"{host_memory() / GIB:.1f} GiB"
    available = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return f"{text}, {int(available[0].split()[1]) / (1 << 20):.1f} GiB of it free" if available else text


def _disk() -> str:
    return f"{shutil.disk_usage('.').free / GIB:,.0f} GiB free in the current folder"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.1f} GiB)" for gpu in gpus)


def _peak(device: torch.device) -> str:
    peak = peak_flops(torch.cuda.get_device_name(device))
    return "not known: mfu will be n/a" if peak is None else f"{peak / 1e12:,.0f} TFLOP/s in dense bfloat16"


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader").splitlines()[0]


def _interconnect() -> str:
    count = torch.cuda.device_count()
    if count == 1:
        return "a single GPU"
    peers = all(torch.cuda.can_device_access_peer(0, other) for other in range(1, count))
    links = "NVLink" if "GB/s" in _output("nvidia-smi", "nvlink", "--status") else "PCIe"
    return f"{links}, {'' if peers else 'not all '}with direct access to each other's memory"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


def _versions() -> str:
    versions = [f"titanlite {__version__}", f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    libraries = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    versions += [f"{name} {number}" for name, number in libraries.items() if number]
    if torch.cuda.is_available() and torch.backends.cudnn.is_available():
        versions.append(f"cuDNN {torch.backends.cudnn.version()}")
    return ", ".join(versions)
