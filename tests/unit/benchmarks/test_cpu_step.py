"""scripts/benchmarks/cpu_step.py runs, and what makes a step fast on the CPU leaves its results alone."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.runs import ROOT
from titanlite.config import load_config
from titanlite.config.parallelism import Degrees
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.parallelize import float32_attention, parallelize
from titanlite.models.layers import LAYOUT, Attention, Decoder, DecoderArgs, causal_attention

pytestmark = pytest.mark.long

ARGS = DecoderArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=128, max_seq_len=32)


def run_script(tmp_path: Path, precision: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own, as it hides GPUs; ``fault`` is run before it."""
    options = ["--pairs=1", "--block=1", "--batches=2", "--mode=eager", f"--precision={precision}"]
    options += [f"--output={tmp_path / 'cpu_step.json'}", "--training.seq_len=32"]
    code = f"import sys, cpu_step; {fault}\nsys.argv = {['cpu_step.py', *options]}\nsys.exit(cpu_step.main())"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts/benchmarks'}"}
    given = [sys.executable, "-c", code]
    return subprocess.run(given, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_the_benchmark(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("transformers")
    done = run_script(tmp_path, precision)
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((tmp_path / "cpu_step.json").read_text())["results"]
    assert (ours["system"], theirs["system"]) == ("titanlite", "transformers")
    assert ours["config"] == theirs["config"] == precision
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-3 if precision == "bf16" else 1e-5)
    assert ours["ratio_to_transformers"] == pytest.approx(ours["step_ms"] / theirs["step_ms"])
    assert "median ratio" in done.stdout


def test_the_benchmark_of_experts_has_both_precisions_of_the_other_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output = tmp_path / "moe_speed.json"
    options = ["--pairs=1", "--block=1", "--batches=2", "--mode=eager", f"--output={output}", "--training.seq_len=32"]
    given = [sys.executable, str(ROOT / "scripts/benchmarks/moe_speed.py"), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(given, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    assert [row.get("weights") for row in results] == [None, "float32", None, "bfloat16"]


def test_the_benchmark_times_nothing_that_differs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = run_script(tmp_path, "bf16", fault="cpu_step.TOLERANCES['bf16'] = 0.0")
    assert done.returncode == 1
    assert "the losses of the first steps differ by" in done.stderr
    assert not (tmp_path / "cpu_step.json").exists()


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield build_mesh(Degrees(1, 1, 1, 1, 1), "cpu")
    finally:
        dist.destroy_process_group()


def sharded(mesh: Mesh, args: DecoderArgs = ARGS, *options: str) -> Decoder:
    model = Decoder(args)
    parallelize(model, LAYOUT, mesh, load_config(["--activation_checkpoint.mode=none", *options]))
    model.init_weights(WeightInit(model, 0))
    return model


@pytest.mark.parametrize(
    ("n_heads", "dtype", "expected"),
    [(4, "bfloat16", float32_attention), (4, "float32", causal_attention), (1, "bfloat16", causal_attention)],
)
def test_small_heads_attend_in_float32(mesh: Mesh, n_heads: int, dtype: str, expected: object) -> None:
    args = DecoderArgs(dim=64, n_layers=1, n_heads=n_heads, n_kv_heads=1, ffn_dim=96, vocab_size=128, max_seq_len=32)
    model = sharded(mesh, args, f"--training.mixed_precision_param={dtype}")
    (attention,) = (module for module in model.modules() if isinstance(module, Attention))
    assert getattr(attention.core, "func", attention.core) is expected


def test_float32_attention_is_closer_to_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 48, 16), (2, 2, 48, 16), (2, 2, 48, 16)]
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)

    def error(result: Tensor) -> float:
        return (result.double() - causal_attention(q.double(), k.double(), v.double())).abs().max().item()

    ours = float32_attention(causal_attention, q, k, v)
    assert ours.dtype == torch.bfloat16
    assert error(ours) <= error(causal_attention(q, k, v))
    assert error(ours) < 2**-7  # half a unit in the last place of a number below 4


class Copies(TorchDispatchMode):
    """Elements of what was copied to other memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].data_ptr() != args[1].data_ptr():
            self.made.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_one_process_copies_weights_once_and_no_gradients(mesh: Mesh) -> None:
    model = sharded(mesh)
    with Copies() as copies:
        model(torch.zeros(1, 2, dtype=torch.long)).float().sum().backward()
    weights = [p.numel() for p in model.parameters() if p.ndim > 1]
    assert len([size for size in copies.made if size >= min(weights)]) == len(weights)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries manage memory in their own way")
def test_freed_memory_is_kept() -> None:
    code = """
import resource, torch
from titanlite.distributed.runtime import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(1 << 20) for _ in range(32)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = [faults() for _ in range(8)]
assert keep_freed_memory()
after = [faults() for _ in range(8)]
print(before[-1], after[-1])
"""
    # Its first threshold; glibc moves it with what a program has freed.
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
    given = [sys.executable, "-c", code]
    done = subprocess.run(given, env=env, capture_output=True, text=True, cwd=ROOT, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10
