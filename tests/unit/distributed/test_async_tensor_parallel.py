"""Which GPUs asynchronous tensor parallelism accepts, and what it then switches on; no GPU is needed to be asked."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.distributed._symmetric_memory
from torch import nn

from titanlite.distributed.tensor_parallel import enable_async_tensor_parallel
from titanlite.errors import ConfigError


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The groups for which symmetric memory was switched on, in a machine of 4 GPUs that reach each other."""
    groups: list[str] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda gpu, other: True)
    monkeypatch.setattr(torch.distributed._symmetric_memory, "enable_symm_mem_for_group", groups.append)
    with torch._inductor.config.patch(_micro_pipeline_tp=False):
        yield groups


def mesh(size: int, device: str = "cuda") -> Any:
    return SimpleNamespace(
        device_type=device, size=lambda: size, get_group=lambda: SimpleNamespace(group_name=f"group of {size}")
    )


def test_it_is_switched_on_for_the_group(enabled: list[str]) -> None:
    enable_async_tensor_parallel(nn.Linear(2, 2), mesh(2))
    assert enabled == ["group of 2"]
    assert torch._inductor.config._micro_pipeline_tp


@pytest.mark.parametrize(
    ("size", "device", "unreachable", "words"),
    [
        (2, "cpu", (), "this runs on cpu"),
        (8, "cuda", (), "GPU 0 does not reach those elsewhere"),
        (2, "cuda", (2, 3), r"GPU 0 does not reach \[2, 3\]"),
    ],
)
def test_gpus_that_do_not_reach_each_other(
    enabled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    device: str,
    unreachable: tuple[int, ...],
    words: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda gpu, other: other not in unreachable)
    with pytest.raises(ConfigError, match=words):
        enable_async_tensor_parallel(nn.Linear(2, 2), mesh(size, device))
    assert enabled == []
