"""A worker: trains in one way of parallelism after the other, and reports what each did."""

from __future__ import annotations

import faulthandler
import functools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from titanlite import train
from titanlite.config import load_config
from titanlite.config.schema import Comm
from titanlite.data import Batch, DataLoader
from titanlite.distributed import runtime
from titanlite.distributed.mesh import Mesh
from titanlite.models.layers import DecoderArgs, LatentArgs, MixtureArgs, YarnScaling
from titanlite.models.llama3.spec import FLAVORS
from titanlite.models.spec import get_model_spec
from titanlite.optim import IGNORED
from titanlite.quant.compiled import CompiledFunction
from titanlite.train import Trainer

# As small as all dimensions allow, with grouped queries.
TINY_MODEL = DecoderArgs(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=0)

# The same with what each family has, and windows shorter than the tests' sequences of 32.
TINY_FAMILIES = {
    "llama": replace(TINY_MODEL, rope_scaling=YarnScaling(4.0, 16), n_kv_heads=4, head_dim=32),
    "mistral": replace(TINY_MODEL, sliding_window=8, head_dim=32),
    "qwen2": replace(TINY_MODEL, qkv_bias=True),
    "qwen3": replace(TINY_MODEL, qk_norm=True),
    "qwen3_moe": replace(TINY_MODEL, qk_norm=True, mixture=MixtureArgs(6, 2, 32)),
    "mixtral": replace(TINY_MODEL, mixture=MixtureArgs(5, 2, 32)),  # over two processes, sharded by features
    "deepseek_v3": replace(
        TINY_MODEL,
        n_kv_heads=4,
        latent=LatentArgs(kv_rank=16, q_rank=32, nope_dim=16, rope_dim=16, value_dim=24),
        mixture=MixtureArgs(
            8, 2, 32, n_shared_experts=1, n_dense_layers=1, scores="sigmoid", bias=True, n_groups=4, group_limit=2
        ),
    ),
    "phi3": replace(TINY_MODEL, sliding_window=12, partial_rotary_factor=0.5),
}

# Latent attention whose queries are made of hidden states, and a router without groups, as Moonlight has them.
TINY_MOONLIGHT = replace(
    TINY_FAMILIES["deepseek_v3"],
    latent=LatentArgs(kv_rank=16, nope_dim=16, rope_dim=16, value_dim=24),
    mixture=MixtureArgs(8, 3, 32, n_shared_experts=2, n_dense_layers=1, scores="sigmoid", bias=True, scale=2.446),
)

# The cases whose eager casts are compiled, as users have them.
COMPILED_CASTS = ("FSDP 2, int8 all-gather",)

_KINDS = {
    "all_gather": ("_allgather_base_", "all_gather_into_tensor", "allgather_into_tensor_coalesced_"),
    "reduce_scatter": ("_reduce_scatter_base_", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced_"),
    "all_reduce": ("allreduce_", "all_reduce"),
    "all_to_all": ("alltoall_base_", "all_to_all_single"),
    "send": ("send",),
    "recv": ("recv_",),
    "broadcast": ("broadcast_", "broadcast"),
    **{name: (name,) for name in ("exchange_loads", "to_experts", "from_experts")},
}
KINDS = {op: kind for kind, ops in _KINDS.items() for op in ops}


class Traffic(TorchDispatchMode):
    """Counts the collectives of each dimension of the mesh: calls, and bytes of the smaller side.

    Dimensions that hold the same ranks may share a group, and DTensor may use that of an earlier run: so a dimension is
    told by its ranks, and by the operators: tensor and context parallelism call the functional ones, and FSDP2 reduces
    by reduce-scatter alone.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        meshes = {name: mesh.world[name] for name in ("dp_replicate", "fsdp", "tp", "pp")} | {"cp": mesh.cp}
        ranks = {name: (*m.mesh.tolist(),) for name, m in meshes.items() if m.size() > 1}
        # Those that FSDP2 shards experts over. (Where they are the ranks of another dimension, they count as it.)
        if mesh.experts is not None and mesh.experts.fsdp.size() > 1:
            ranks["expert_fsdp"] = (*mesh.experts.fsdp.mesh.tolist(),)
        self.functional = {ranks[name]: name for name in ("tp", "cp") if name in ranks}
        self.others = {ranks[n]: n for n in ("expert_fsdp", "dp_replicate", "fsdp", "pp") if n in ranks}
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.bytes: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "titanlite") and func._opname in KINDS:
            tensors, group = [], "ep" if func.namespace == "titanlite" else "?"
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, Tensor):
                    tensors.append(leaf)
                elif isinstance(leaf, str) and leaf.isdecimal() and group == "?":
                    group = self.functional.get(ranks_of(_resolve_process_group(leaf)), "?")
                elif isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in leaf._type().qualified_name():
                    group = self._other(dist.ProcessGroup.unbox(leaf), KINDS[func._opname])
            key = f"{group}/{KINDS[func._opname]}"
            self.calls[key] += 1
            sizes = [t.numel() * t.element_size() for t in tensors]
            self.bytes[key] += sizes[0] if group == "ep" else min(sizes)
        return func(*args, **(kwargs or {}))

    def _other(self, group: dist.ProcessGroup, kind: str) -> str:
        dimension = self.others.get(ranks_of(group), "")
        if dimension and (kind != "all_reduce" or dimension == "dp_replicate"):
            return dimension
        return "world" if group.group_name == dist.group.WORLD.group_name else "control"  # type: ignore[union-attr]


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    return (*dist.get_process_group_ranks(group),)


def is_checkpointed(block: Any) -> bool:
    """Whether the way to run a block, or what the compiler was given of it, is a call of ``checkpoint``."""
    function = getattr(block.run, "_torchdynamo_orig_callable", block.run)
    return isinstance(function, functools.partial) and function.func is checkpoint


def share_meshes() -> None:
    """One mesh, and one group beside it, for all runs of the same degrees: each group has threads of its own."""
    train.build_mesh = functools.cache(train.build_mesh)
    here = runtime.start_runtime(Comm())
    runtime.start_runtime = lambda comm: here


class Masked:
    """A loader whose labels are scored only where they are multiples of ``modulus``."""

    def __init__(self, loader: DataLoader, modulus: int) -> None:
        self.loader, self.modulus = loader, modulus

    def __next__(self) -> Batch:
        batch = next(self.loader)
        return Batch(batch.inputs, batch.labels.where(batch.labels % self.modulus == 0, IGNORED))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def first_batch(trainer: Trainer) -> Batch:
    """The one that the trainer will take."""
    state = trainer.loader.state_dict()
    batch = next(trainer.loader)
    trainer.loader.load_state_dict(state)
    return batch


def sequences_with_borders(batch: Batch) -> int:
    """The number of sequences in which a document begins that is not their first."""
    return 0 if batch.starts is None else int((batch.starts > 0).any(-1).sum())


def mean_loss_by_hand(trainer: Trainer) -> float:
    """The mean loss of the first batch of one process, in float64, from its logits."""
    batch = first_batch(trainer)
    (model,) = trainer.model_parts
    with torch.no_grad():
        logits = torch.stack([model(tokens) for tokens in batch.inputs]).double()
    likelihoods = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    return -likelihoods[batch.labels != IGNORED].mean().item()


def first_moments(trainer: Trainer) -> dict[str, Tensor]:
    """Adam's, whole, by parameter of this rank's stages. After one step they are its gradients but for a factor."""
    names = {param: name for part in trainer.model_parts for name, param in part.named_parameters()}
    moments = {names[param]: state["exp_avg"] for param, state in trainer.optimizer.state.items()}
    return {name: m.full_tensor() if isinstance(m, DTensor) else m.clone() for name, m in moments.items()}


def run(name: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    modulus = options.pop("mask", 0)
    run_folder = folder / name.replace(" ", "_")
    faulthandler.dump_traceback_later(90)  # where each rank is, should they hang
    trainer = Trainer(load_config([f"--{k}={v}" for k, v in {**options, "job.dump_folder": run_folder}.items()]))
    config = trainer.config
    compiled_graphs = []
    traffic = Traffic(trainer.mesh)
    if modulus:
        trainer.loader = Masked(trainer.loader, modulus)  # type: ignore[assignment]
    moments = folder / f"{name}, rank {trainer.runtime.rank}.pt"
    by_hand = mean_loss_by_hand(trainer) if modulus and trainer.runtime.world_size == 1 else None
    borders = sequences_with_borders(first_batch(trainer))
    try:
        for step in range(1, config.training.steps + 1):
            if step == 3 and not config.training.compile:
                with traffic:
                    trainer.advance()
            else:
                trainer.advance()
            if step == 1 and (modulus or config.data.document_mask):
                torch.save(first_moments(trainer), moments)
            compiled_graphs.append(counters["stats"]["unique_graphs"])
        parameters = [p for part in trainer.model_parts for p in part.parameters()]
        local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        report = {
            "by hand": by_hand,
            "sequences_with_borders": borders,
            "biases": {
                name: buffer.tolist()
                for part in trainer.model_parts
                for name, buffer in part.named_buffers()
                if name.endswith("router.bias")
            },
            "moments": str(moments),
            "elements": sum(p.numel() for p in local),
            "model_elements": trainer.size.params,
            "parts": [[name for name, _ in part.named_parameters()] for part in trainer.model_parts],
            "calls": traffic.calls,
            "bytes": traffic.bytes,
            "graphs": compiled_graphs,
            "checkpointed": sum(is_checkpointed(layer) for p in trainer.model_parts for layer in p.layers.values()),  # type: ignore[operator, union-attr]
        }
    finally:
        trainer.close()
        faulthandler.cancel_dump_traceback_later()
    dist.barrier()
    if trainer.runtime.rank == 0:
        report["rows"] = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        if config.validation.enable:
            lines = (run_folder / "validation.jsonl").read_text().splitlines()
            report["validation"] = [json.loads(line) for line in lines]
    if config.training.compile:
        torch._dynamo.reset()
    counters.clear()
    return report


def report(cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What each case did, on this rank."""
    FLAVORS["tiny"] = TINY_MODEL
    for family, args in TINY_FAMILIES.items():
        get_model_spec(family).flavors["tiny"] = args  # type: ignore[index]
    get_model_spec("deepseek_v3").flavors["tiny_moonlight"] = TINY_MOONLIGHT  # type: ignore[index]
    share_meshes()
    reports = {}
    for name, options in cases.items():
        try:
            with pytest.MonkeyPatch.context() as patched:
                if name not in COMPILED_CASTS:
                    # The functions that eager code compiles, int8's casts for example, take seconds in every process.
                    patched.setattr(CompiledFunction, "_call", lambda self, *args: self.plain(*args))
                reports[name] = run(name, options, folder)
        except Exception as e:
            raise RuntimeError(f"{name}: {options}") from e
    dist.destroy_process_group()
    return reports
