"""Initial weights are a function of seed, name and element index, and are normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from titanlite.distributed.init import WeightInit
from titanlite.quant.streams import stream_key, uniform

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The published algorithm, on Python's own integers."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [0, 1, stream_key(0, "layers.0.w"), MASK])
def test_uniform_is_splitmix64(key: int) -> None:
    index = torch.tensor([0, 1, 2, 1000, 2**31, 2**40])
    expected = [((splitmix64(key + (i + 1) * 0x9E3779B97F4A7C15) >> 12) + 0.5) / 2**52 for i in index.tolist()]
    assert uniform(key, index).tolist() == expected


def test_splitmix64_is_the_reference_sequence() -> None:
    # The first outputs for seed 1234567, as published with the reference implementation.
    assert [splitmix64(1234567 + i * 0x9E3779B97F4A7C15) for i in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(300, 500))
        self.b = nn.Parameter(torch.empty(300, 500))


def normals(seed: int) -> Two:
    model = Two()
    init = WeightInit(model, seed)
    with torch.no_grad():
        init.normal(model.a, std=2.0)
        init.trunc_normal(model.b, std=1.0)
    return model


def test_the_values_are_normal() -> None:
    x = torch.sort(normals(0).a.flatten().double() / 2).values
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    grid = (torch.arange(x.numel()) + 0.5) / x.numel()
    # Kolmogorov-Smirnov at a level of 1e-4.
    assert (cdf - grid).abs().max() < 2.23 / math.sqrt(x.numel())


def test_neighbours_and_streams_are_independent() -> None:
    model = normals(0)
    n = model.a.numel()
    a, b = model.a.flatten() / 2, model.b.flatten()
    for x, y in ((a[:-1], a[1:]), (a[:-500], a[500:]), (a, b), (a, normals(1).a.flatten() / 2)):
        assert abs((x * y).mean().item()) < 4 / math.sqrt(n)


def test_seed_and_name_decide() -> None:
    assert torch.equal(normals(3).a, normals(3).a)
    assert not torch.equal(normals(3).a, normals(4).a)
    assert not torch.equal(normals(3).a / 2, normals(3).b)
