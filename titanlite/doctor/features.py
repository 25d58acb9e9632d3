"""What each feature needs beside torch, and whether this machine has it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from titanlite.converters import formats_with_units
from titanlite.distributed.attention_kernel import AttentionInputs, describe_kernel, preferred_kernels
from titanlite.doctor.machine import read_fact
from titanlite.environment import is_installed
from titanlite.quant import kernels
from titanlite.quant.devices import architecture, sm


class Feature(NamedTuple):
    """A feature.

    Attributes:
        option: how it is asked for.
        needs: what it takes.
        there: whether this machine has that.
    """

    name: str
    option: str
    needs: str
    there: bool


def features(device: torch.device, converters: list[str]) -> list[Feature]:
    """Return the features that need more than torch. ``converters`` are the names of those to number formats."""
    units, gpu = architecture(device), device.type == "cuda"
    native = formats_with_units(units)
    compiler = ("triton", is_installed("triton")) if gpu else ("a C++ compiler (g++ or clang++)", _cxx())
    features = [Feature("compiled blocks", "training.compile", compiler[0], compiler[1])]
    features += [
        Feature(f"{name} in its own units", f"model.converters={name}", "units for it; else emulated", name in native)
        for name in converters
    ]
    features += [
        Feature("kernels of float8, mxfp8 and int8", "chosen by itself", "a GPU, triton", gpu and kernels.AVAILABLE),
        Feature(
            "FlashAttention 3",
            "chosen by itself",
            "a Hopper GPU, the package flash_attn_interface",
            sm(units) == 90 and is_installed("flash_attn_interface"),
        ),
        Feature("several processes", "NGPU", "NCCL on GPUs, gloo on CPUs", _communicates(gpu)),
        Feature(
            "asynchronous tensor parallelism",
            "parallelism.enable_async_tensor_parallel",
            "several GPUs with direct access to each other's memory, training.compile",
            gpu and _peers(),
        ),
        Feature("checkpoints through pinned memory", "checkpoint.async_mode=async_with_pinned_mem", "a GPU", gpu),
        Feature("TensorBoard", "metrics.enable_tensorboard", "the package tensorboard", is_installed("tensorboard")),
        Feature("Weights & Biases", "metrics.enable_wandb", "the package wandb", is_installed("wandb")),
        Feature(
            "lm-eval's tasks",
            "lm_eval --model hf, on an exported folder",
            "the package lm_eval",
            is_installed("lm_eval"),
        ),
        Feature(
            "data sets of the hub", "training.dataset=c4", "the package datasets, a network", is_installed("datasets")
        ),
        Feature("pictures", "titanlite compare --picture", "the package matplotlib", is_installed("matplotlib")),
    ]
    return features


def attention(device: torch.device, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> str:
    """Return the attention kernel that would run, in words."""
    if device.type != "cuda":
        return "torch's for the CPU, causal"

    def choice() -> str:
        with preferred_kernels(device):
            return describe_kernel(AttentionInputs(heads, kv_heads, head_dim, dtype), device, ring=False)

    return read_fact(choice)


def _cxx() -> bool:
    return any(map(shutil.which, ("g++", "clang++", "c++")))


def _quietly(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except Exception:  # a driver that does not answer has not got it
        return False


def _communicates(gpu: bool) -> bool:
    return _quietly(lambda: dist.is_available() and (dist.is_nccl_available() if gpu else dist.is_gloo_available()))


def _peers() -> bool:
    count = torch.cuda.device_count()
    return count > 1 and _quietly(lambda: all(torch.cuda.can_device_access_peer(0, i) for i in range(1, count)))
