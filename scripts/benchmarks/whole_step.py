"""Count the bytes that a whole training step of Llama 3 8B moves on each of several GPUs that are not there, in parts.

    python scripts/benchmarks/whole_step.py --out docs/benchmarks/whole_step.json

The blocks and the loss are compiled for a GPU as in compiled_block.py. Everything else runs operator by operator: the
trainer's own step on tensors without data, as in an estimate (titanlite/plan/estimate.py), with FSDP2 over ``--gpus``
devices, and each operator counts the bytes of its tensors. Parts, in MB of each device:

- ``blocks``: all kernels of the blocks but matmuls and attention;
- ``casts``: of shards to float8, before FSDP2 gathers them in float8;
- ``fsdp``: FSDP2's casts to bfloat16, and its copies into and out of what it gathers and reduces; the messages
  themselves are not counted;
- ``ends``: the embedding, the last norm, and the loss; without the matmuls of the output projection;
- ``optimizer``: the norm of the gradients and AdamW.

A step of ``--layers`` blocks is that of one block and as often what a second one adds. The casts of tensor parallelism
are in compiled blocks whose collectives this does not trace. It needs a C++ compiler, and no GPU; nothing is timed.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import compiled_block
import harness
import results
from absent_gpu import device
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titanlite.config import load_config, resolve_degrees
from titanlite.plan.estimate import build as build_model
from titanlite.plan.estimate import dimensions, for_memory, lone_mesh, measure
from titanlite.plan.lone_rank import in_a_process
from titanlite.plan.memory import MemoryTracker, collective_of, copies_to_itself
from titanlite.quant.kernels import AMAXES
from titanlite.training.build import build_loss

TOKENS, VOCAB_SIZE = 8192, 128256
PARTS = ("blocks", "casts", "fsdp", "ends", "optimizer")
_FREE = ("empty", "_unsafe_view", "_record_function")
_MATMULS = ("mm", "_scaled_mm")
_FSDP = ("_to_copy", "copy_", "_foreach_copy_", "split_with_sizes_copy", "all_gather_copy_in", "chunk_cat")
_OPTIMIZER = ("_fused_adamw_", "_foreach_norm")

Counts = dict[str, tuple[int, float]]  # part -> launches, bytes


class Eager(MemoryTracker):
    """Counts the operators outside compiled code, whose own operators are paused.

    Attributes:
        counts: launches and bytes of each part.
    """

    def __init__(self, dimensions: dict[str, str]) -> None:
        super().__init__(dimensions)
        self.counts: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))

    def restart_peak(self) -> None:
        """Forget what was called before the step."""
        super().restart_peak()
        self.counts.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.split("::")[1]
        if out is NotImplemented or self._paused or func.is_view or name.startswith((*_FREE, *_MATMULS)):
            return out
        if func.namespace in ("prim", "profiler") or copies_to_itself(func, args):
            return out
        if collective_of(func, args, out) is not None:
            return out
        if func is AMAXES and not out.numel():  # those of rows: the cast finds them as it reads the rows
            return out
        part = self._part(func.namespace, name)
        launches, moved = self.counts[part]
        self.counts[part] = launches + 1, moved + bytes_of(func, args, kwargs or {}, out)
        return out

    def _part(self, namespace: str, name: str) -> str:
        if namespace == "titanlite_quant":
            return "casts"
        return "fsdp" if name in _FSDP else "optimizer" if name in _OPTIMIZER else "ends"


def bytes_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Return the bytes that an operator reads of its arguments, and writes to those that its schema says it changes and
    to its results."""
    name = func._schema.name
    if name == "fsdp::all_gather_copy_in":  # its rank's part of what is gathered
        return 2 * _size(args[0])
    if name == "aten::embedding":  # the rows that it looks up
        return 2 * _size(out)
    read, written = dict[int, Tensor](), dict[int, Tensor]()
    schema = func._schema.arguments
    for argument, value in [*zip(schema, args, strict=False), *((a, kwargs.get(a.name)) for a in schema[len(args) :])]:
        tensors = {id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
        changes = argument.alias_info is not None and argument.alias_info.is_write
        if changes:
            written.update(tensors)
        if not (changes and (argument.is_out or "copy" in name)):  # its old values are not read
            read.update(tensors)
    known = read.keys() | written.keys()
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and id(leaf) not in known]
    return _size([*read.values(), *written.values(), *made])


def _size(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def eager(config_name: str, gathered: str, gpus: int, layers: int) -> Counts:
    """Return the counts outside compiled code of a step with ``layers`` blocks; in a process of its own.

    Args:
        gathered: "bf16" or "float8": what FSDP2 gathers the weights of linear layers in.
    """
    options = ["--training.local_batch_size=1", f"--training.seq_len={TOKENS}", "--training.compile"]
    options += ["--activation_checkpoint.mode=none", f"--model.args.n_layers={layers}"]
    if config_name != "bf16":
        options += ["--model.converters=float8", f"--float8.recipe_name={config_name}", "--float8.filter_fqns=output"]
        options += [f"--float8.enable_fsdp_float8_all_gather={str(gathered == 'float8').lower()}"]
    config = load_config(options, "llama3_8b")
    degrees = resolve_degrees(config.parallelism, gpus)
    with lone_mesh(config, degrees, 0, gpus) as mesh:
        config = for_memory(config)
        built, _ = build_model(config, mesh, VOCAB_SIZE)
        tracker = Eager(dimensions(mesh))
        measure(built, build_loss(config, mesh), config, mesh, tracker)
        return dict(tracker.counts)


def blocks(config_name: str, gathered: str, env: dict[str, str]) -> dict[str, Any]:
    """Return the counts of one compiled block, whose weights were gathered so."""
    case = {"architecture": "sm_90", "tokens": TOKENS, "ac": "none", "config": config_name, "gathered": gathered}
    return compiled_block.count({**case, "system": "titanlite", "kernels": "inductor", "fusion": "block"}, env)


def count(
    config_name: str, gathered: str, gpus: int, layers: int, block: dict[str, Any], loss: tuple[int, float]
) -> dict[str, Any]:
    one, two = (in_a_process(eager, config_name, gathered, gpus, depth) for depth in (1, 2))
    counts: Counts = {"blocks": (layers * block["launches"], 1e6 * layers * max(block["mb"], block["sectors_mb"]))}
    for part in PARTS[1:]:
        first, second = one.get(part, (0, 0.0)), two.get(part, (0, 0.0))
        launches, moved = (a + (layers - 1) * (b - a) for a, b in zip(first, second, strict=True))
        counts[part] = int(launches), moved
    counts["ends"] = counts["ends"][0] + loss[0], counts["ends"][1] + loss[1]
    row: dict[str, Any] = {"system": "titanlite", "config": config_name, "gathered": gathered, "gpus": gpus}
    row["layers"] = layers
    row |= {f"{part}_mb": round(moved / 1e6, 1) for part, (_, moved) in counts.items()}
    row["mb"] = round(sum(moved for _, moved in counts.values()) / 1e6, 1)
    return {**row, "launches": sum(launches for launches, _ in counts.values())}


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--configs", type=harness.words, default=list(harness.CONFIGS))
    parser.add_argument("--gpus", type=harness.numbers, default=[1, 8])
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        env = device.environment(Path(folder))
        child = harness.run([sys.executable, "-m", "absent_gpu.loss"], compiled_block.LIMIT, env)
        if child.status:
            raise SystemExit(child.why())
        loss = json.loads(child.output.splitlines()[-1])
        ends = loss["launches"], 1e6 * loss["mb"]
        for config_name, gathered in itertools.product(args.configs, ("bf16", "float8")):
            if config_name == "bf16" and gathered == "float8":
                continue
            block = blocks(config_name, gathered, env)
            for gpus in args.gpus:
                rows.append(count(config_name, gathered, gpus, args.layers, block, ends))
                print(json.dumps(rows[-1]), flush=True)
    results.save("whole_step", rows, args, "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
