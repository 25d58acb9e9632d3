"""What a process starts from: its device, its generators of random numbers, its memory."""

from __future__ import annotations

import os
import platform
import queue
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from titanlite.config import load_config
from titanlite.config.schema import Comm
from titanlite.distributed import runtime
from titanlite.distributed.data_parallel import allocate
from titanlite.environment import LAUNCHER_PID
from titanlite.errors import ConfigError


def test_a_group_lasts_as_long_as_the_runtime() -> None:
    here = runtime.start_runtime(Comm())
    assert (here.rank, here.world_size, dist.is_initialized()) == (0, 1, True)
    runtime.stop_runtime()
    assert not dist.is_initialized()


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    second = torch.device("cuda", 1)
    assert runtime._pick_device(1) == (second, "GPU 1 of the 2 found")
    assert taken == [second]
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU of its own, there are 2"):
        runtime._pick_device(2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_generator_is_seeded(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def drawn(seed: int) -> tuple[float, float, float]:
        here: Any = None  # is asked for a seed only where none is given
        assert runtime.set_seed(seed, deterministic, here) == seed
        return random.random(), np.random.random(), torch.rand(()).item()

    first, other, again = drawn(1), drawn(2**32 + 2), drawn(1)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert asked == [True] * 3 * deterministic


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_on_the_meta_device_gets_its_memory(offload: bool) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    allocate(model, torch.device("cpu"), load_config([f"--training.enable_cpu_offload={str(offload).lower()}"]))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_a_worker_without_its_launcher_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(os, "_exit", ended.put)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")  # where the kernel does not do it
    monkeypatch.setenv(LAUNCHER_PID, str(os.getpid()))  # which is not the parent
    runtime.end_with_launcher()
    assert ended.get(timeout=10) == 1
