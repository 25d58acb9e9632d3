"""A worker: reads a folder of weights into models that are sharded in different ways; reports what is wrong.

The folder's folders plain, tied, float8, fused and those of families hold weights of seed 3.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.parallel_functions import config_of, mesh_of
from titanlite.checkpoint import hugging_face
from titanlite.checkpoint.hugging_face import HuggingFaceFolder
from titanlite.distributed.data_parallel import allocate
from titanlite.distributed.init import WeightInit
from titanlite.distributed.parallelize import chain, parallelize
from titanlite.distributed.pipeline import part_of
from titanlite.float8 import Float8LinearConfig, convert_to_float8_training
from titanlite.models.layers import LAYOUT, Decoder, DecoderArgs
from titanlite.models.llama3.spec import HUGGING_FACE
from titanlite.models.spec import get_model_spec
from titanlite.models.weight_map import Place, Rows, Stack, WeightMap
from titanlite.quant.fsdp import ShardedWeight

# Sizes that four do not divide: FSDP's shards are uneven, and some are empty.
ARGS = DecoderArgs(dim=40, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=54, vocab_size=70, max_seq_len=8)
FOLDERS = {
    "plain": ARGS,
    "tied": replace(ARGS, tie_embeddings=True),
    "float8": replace(ARGS, dim=64, ffn_dim=112),  # which wants multiples of 16
    "fused": ARGS,
    "qwen2": replace(ARGS, qkv_bias=True),
    "qwen3": replace(ARGS, qk_norm=True),
    "phi3": ARGS,
}
FORMATS: Any = {name: get_model_spec(name).hugging_face for name in ("qwen2", "qwen3", "phi3")}
SEED = 3

# What is read, and how it is sharded; float8 is gathered in float8.
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "fsdp": ("plain", {"shard": 4}),
    "hsdp": ("plain", {"replicate": 2, "shard": 2}),
    "fsdp_tp": ("plain", {"shard": 2, "tp": 2}),
    "hsdp_tp": ("plain", {"replicate": 2, "tp": 2}),
    "fsdp_tp_tied": ("tied", {"shard": 2, "tp": 2}),
    "pp_fsdp": ("plain", {"pp": 2, "shard": 2}),
    "pp_tp": ("plain", {"pp": 2, "tp": 2}),
    "fsdp_float8": ("float8", {"shard": 4}),
    "fsdp_fused": ("fused", {"shard": 4}),
    "fsdp_tp_fused": ("fused", {"shard": 2, "tp": 2}),
    "fsdp_phi3": ("phi3", {"shard": 4}),
    "fsdp_tp_phi3": ("phi3", {"shard": 2, "tp": 2}),
    "fsdp_tp_qwen2": ("qwen2", {"shard": 2, "tp": 2}),
    "fsdp_tp_qwen3": ("qwen3", {"shard": 2, "tp": 2}),
}


def weights_of(kind: str) -> WeightMap:
    """Where the parameters are in a folder of this kind; in "fused" some share a tensor, and some are several."""
    args = FOLDERS[kind]
    places: dict[str, Place] = dict(FORMATS.get(kind, HUGGING_FACE).weights(args))
    for i in range(args.n_layers) if kind == "fused" else ():
        for start, name in ((0, "w1"), (args.ffn_dim, "w3")):
            places[f"layers.{i}.feed_forward.{name}.weight"] = Rows(f"gate_up.{i}", start, start + args.ffn_dim)
        rows = range(args.n_kv_heads * args.head_size)
        places[f"layers.{i}.attention.wk.weight"] = Stack(tuple(f"key.{i}.{row}" for row in rows))
    return places


class Counting:
    """A file that is read, or a tensor in it; counts the elements that were taken."""

    taken = 0

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> Counting:
        return Counting(self.inner.__enter__())

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)

    def get_slice(self, name: str) -> Counting:
        return Counting(self.inner.get_slice(name))

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self.inner[index]
        Counting.taken += part.numel()
        return part


def build(args: DecoderArgs, degrees: dict[str, int], float8: bool) -> Decoder:
    """This process's part, with the weights of another seed."""
    mesh, config = mesh_of(**degrees), config_of("default")
    with torch.device("meta"):
        model = Decoder(args)
    if float8:
        options = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
        convert_to_float8_training(model, config=options, module_filter_fn=lambda _, name: name != "output")
    if mesh.pp.size() > 1:
        names = [name for entry in chain(model, LAYOUT) for name in entry]
        half = names.index("layers.2")
        model = part_of(model, names[half:] if mesh.pp.get_local_rank() else names[:half])  # type: ignore[assignment]
    parallelize(model, LAYOUT, mesh, config)
    allocate(model, torch.device("cpu"), False)
    model.init_weights(WeightInit(model, 0))
    return model


def problems(out: Path, kind: str, degrees: dict[str, int]) -> list[str]:
    args = FOLDERS[kind]
    whole = Decoder(args)
    whole.init_weights(WeightInit(whole, SEED))
    model = build(args, degrees, kind == "float8")
    # The parameters that are gathered in float8 are tensors of a kind of their own; in the state dict they are plain.
    state: dict[str, Any] = dict(model.named_parameters()) if kind == "float8" else dict(model.state_dict())
    source = HuggingFaceFolder(out / kind)
    Counting.taken, opened = 0, hugging_face._opened
    hugging_face._opened = lambda file: Counting(opened(file))
    source.load_into(state, weights_of(kind))
    hugging_face._opened = opened
    faults = []
    local_elements = sum(tensor.to_local().numel() for tensor in state.values())
    if Counting.taken != local_elements or (
        degrees.get("shard") == 4 and local_elements > 0.3 * sum(p.numel() for p in whole.parameters())
    ):
        faults.append(f"{Counting.taken} elements were read for {local_elements} of its own")
    assert (kind == "float8") == any(isinstance(tensor.to_local(), ShardedWeight) for tensor in state.values())
    for name, tensor in model.state_dict().items():
        assert isinstance(tensor, DTensor), name
        if not torch.equal(tensor.full_tensor(), whole.state_dict()[name]):
            faults.append(f"{name} {tensor.placements}")
    return faults if state else ["there was nothing to load"]


def bytes_of_disk(folder: Path) -> int:
    """What the disk delivers for this process, while all ranks load a folder that the system's cache does not hold."""
    model = build(ARGS, {"shard": 4}, float8=False)
    if dist.get_rank() == 0:
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()
    before = read_from_disk()
    HuggingFaceFolder(folder).load_into(dict(model.state_dict()), weights_of("plain"))
    return read_from_disk() - before


def read_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])


def report(folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    results: dict[str, Any] = {name: problems(folder, *case) for name, case in CASES.items()}
    results["bytes of disk"] = bytes_of_disk(folder / "plain")
    dist.destroy_process_group()
    return results
