"""The floor of a whole training step, part of roofline.py: what a step of train.py, or of peers.py, would take if each
of its parts ran at its ceiling, one after the other.

- *Matmuls*: each of the step's shapes, measured, in bfloat16 or float8 as the recipe has it (float8 with one scale per
  operand, the fastest there is), as often as the step has it; and those that selective activation checkpointing per
  operation computes again: every second one of a block.
- *Attention*: forward and backward, measured, by the fastest of PyTorch's implementations.
- *Memory*: the bytes that everything else has to move, at the speed of a copy: perfectly fused norms, rotary
  embeddings, SwiGLU, cross-entropy, casts, the weights on their way to the matmuls and back, AdamW.

``step_of_floor`` is the floor over the measured step; 1 would be perfect. ``step_of_floor_without_recompute`` counts
nothing that is computed again.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import cost
import harness
import matmul
import torch
import torch.nn.functional as F
from benchmark_models import FLAVORS
from cost import BF16, Ceilings, Gemm
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titanlite.models.layers import Decoder, DecoderArgs

SEQ_LEN = 8192
_PARTS = ("matmul_s", "matmul_again_s", "attention_s", "memory_s", "memory_again_s", "casts_s", "casts_again_s")
COLUMNS = ("config", "batch", "layers", *_PARTS, "floor_s", "step_time_s", "step_of_floor")
# Bytes that an optimizer step moves for each parameter: float32 masters to bfloat16 weights (4 + 2) and gradients back
# (2 + 4), the gradients' norm (4), AdamW, which reads and writes the parameter and both moments and reads the gradient.
PER_PARAMETER = 6 + 6 + 4 + 28


class Linears:
    """(features in, features out) of a block's linear layers, in the order of the forward."""

    def __init__(self, args: DecoderArgs) -> None:
        heads, kv, ffn = args.dim, args.n_kv_heads * args.head_size, args.ffn_dim
        self.all = {
            "wq": (args.dim, heads),
            "wk": (args.dim, kv),
            "wv": (args.dim, kv),
            "wo": (heads, args.dim),
            "w1": (args.dim, ffn),
            "w3": (args.dim, ffn),
            "w2": (ffn, args.dim),
        }
        # Every second matmul of a block (titanlite/distributed/activation_checkpoint.py).
        self.again = [size for i, size in enumerate(self.all.values()) if i % 2]
        # wq, wk and wv take one input, w1 and w3 another: cast once. What w2 takes is in cost.swiglu_bytes.
        self.inputs = [args.dim, heads, args.dim]


def step_gemms(args: DecoderArgs, recipe: str, tokens: int) -> tuple[list[Gemm], list[Gemm]]:
    """Return the matmuls of the whole step, also those that are computed again. The output projection is in
    bfloat16."""
    linears = Linears(args)
    once = [gemm for size in linears.all.values() for gemm in cost.gemms(recipe, tokens, *size)]
    again = [cost.gemms(recipe, tokens, *size)[0] for size in linears.again]
    return once * args.n_layers + cost.gemms("bf16", tokens, args.dim, args.vocab_size), again * args.n_layers


def cast_bytes(args: DecoderArgs, recipe: str, tokens: int, scales_follow: bool) -> int:
    """Return the bytes of the casts, but that of SwiGLU's product, and the passes that apply scales, of all layers."""
    linears = Linears(args)
    layer_bytes = sum(tokens * k * cost.input_bytes(recipe, k) for k in linears.inputs)
    for k, n in linears.all.values():
        layer_bytes += tokens * n * cost.grad_bytes(recipe, n) + k * n * cost.weight_bytes(recipe, k)
        layer_bytes += sum(gemm.rescale_bytes(scales_follow) for gemm in cost.gemms(recipe, tokens, k, n))
    return layer_bytes * args.n_layers


def cast_again_bytes(args: DecoderArgs, recipe: str, tokens: int) -> int:
    """Return the bytes of the casts that are computed again: largest magnitudes are kept, the casts themselves are
    not."""
    linears = Linears(args)
    layer_bytes = sum(tokens * k * cost.input_bytes(recipe, k, again=True) for k in linears.inputs)
    layer_bytes += sum(k * n * cost.weight_bytes_of_output(recipe, k, again=True) for k, n in linears.again)
    return layer_bytes * args.n_layers


def memory_bytes(args: DecoderArgs, recipe: str, tokens: int) -> tuple[int, int]:
    """Return the bytes of all that is neither matmul nor attention nor cast, where each operation is fused with its
    neighbours as far as matmuls and attention let it, and of SwiGLU with its casts: in the step, and of that what is
    computed again."""
    kv = args.n_kv_heads * args.head_size
    # Each norm with the addition before it: the stream and the branch in, the sum and the normalized out. Backward: the
    # gradients of both and the stream in, its gradient out. Again: the stream in, the normalized out.
    norms, norms_backward, norms_again = 2 * 4 * args.dim, 2 * 4 * args.dim, 2 * 2 * args.dim
    rope = 2 * (args.dim + kv)  # queries and keys, in and out
    # Again, where backward does not make it itself: the product.
    swiglu, swiglu_backward = cost.swiglu_bytes(recipe, args.ffn_dim)
    swiglu_again = swiglu if recipe == "bf16" else 0
    block = BF16 * (norms + norms_backward + 2 * rope) + args.ffn_dim * (swiglu + swiglu_backward)
    again = BF16 * (norms_again + rope) + args.ffn_dim * swiglu_again
    # The embeddings in and out, the last norm, and the logits, whose gradient is written where they were read.
    ends = 2 * args.dim + 5 * args.dim + 2 * args.vocab_size
    once = tokens * (args.n_layers * block + BF16 * ends) + PER_PARAMETER * parameters_of(args)
    return once, tokens * args.n_layers * again


def parameters_of(args: DecoderArgs) -> int:
    """Return the number of elements of all parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(args).parameters())


class Clock:
    """Measures each matmul and each attention once."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.known: dict[Any, float] = {}

    def _seconds(self, ways: dict[str, Callable[[], object]]) -> float:
        return min(harness.time_running(ways, self.device, self.rounds, 5).values())

    def gemm(self, gemm: Gemm) -> float:
        key = gemm[1:5]
        if key not in self.known:
            random = functools.partial(torch.randn, device=self.device, dtype=torch.bfloat16)
            a, b = random(gemm.m, gemm.k), random(gemm.n, gemm.k)
            if gemm.precision == "bf16":
                way: Callable[[], Tensor] = functools.partial(torch.mm, a, b.t())
            else:
                x, y = (matmul.quantized(t, matmul.E4M3, None) for t in (a, b))
                fast = gemm.precision == "fp8"
                way = matmul.ours(x, y.t(), fast, True) if self.device == "cpu" else matmul.raw(x, y.t(), fast)
            self.known[key] = self._seconds({"": way})
        return self.known[key]

    def attention(self, args: DecoderArgs, batch: int, seq_len: int) -> float:
        """Return the seconds of attention in one layer, forward and backward."""
        key = ("attention", args.n_heads, args.n_kv_heads, args.head_size, batch, seq_len)
        if key not in self.known:
            random = functools.partial(torch.randn, device=self.device, dtype=torch.bfloat16, requires_grad=True)
            q, k, v = (random(batch, h, seq_len, args.head_size) for h in (args.n_heads, *[args.n_kv_heads] * 2))
            grad = torch.randn_like(q)

            def step(backend: SDPBackend | None) -> tuple[Tensor, ...]:
                if backend is None:
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                else:
                    with sdpa_kernel(backend):
                        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                return torch.autograd.grad(out, (q, k, v), grad)

            ways: dict[str, Callable[[], object]] = {"default": functools.partial(step, None)}
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                try:
                    step(backend)
                except RuntimeError:  # not for this device, or not in this build
                    continue
                ways[str(backend)] = functools.partial(step, backend)
            self.known[key] = self._seconds(ways)
        return self.known[key]


class Given:
    """In place of :class:`Clock`: the time that ceilings give, without a device. ``attention_rate``: FLOP/s of causal
    attention, forward and backward together, of the FLOPs below the diagonal."""

    def __init__(self, at: Ceilings, attention_rate: float) -> None:
        self.at, self.attention_rate = at, attention_rate

    def gemm(self, gemm: Gemm) -> float:
        return gemm.seconds(self.at)

    def attention(self, args: DecoderArgs, batch: int, seq_len: int) -> float:
        # Two matmuls in forward, five in backward, which computes the scores again; half of each is masked.
        return 7 * batch * seq_len**2 * args.dim / self.attention_rate


def predicted(at: Ceilings, attention_rate: float, layers: int, batches: list[int]) -> list[dict[str, Any]]:
    """The floors of a compiled step of Llama 3 8B with so many ``layers``, and how much faster than bfloat16's."""
    args, clock = FLAVORS[f"8B-{layers}"], Given(at, attention_rate)
    rows = []
    for batch in batches:
        about = {"system": "roofline", "compile": True, "batch": batch, "layers": layers, "seq_len": SEQ_LEN}
        batch_floors = [floor({**about, "config": config}, args, at, clock) for config in harness.CONFIGS]
        rows += [{**row, "speedup_over_bf16": batch_floors[0]["floor_s"] / row["floor_s"]} for row in batch_floors]
    return rows


def model_of(row: dict[str, Any], toy: bool) -> DecoderArgs:
    return FLAVORS["toy" if toy else f"8B-{row['layers']}"]


def floor(row: dict[str, Any], args: DecoderArgs, at: Ceilings, clock: Clock | Given) -> dict[str, Any]:
    """The floor of the step of ``row``, which may have measured it, and its parts, in seconds."""
    tokens = row["batch"] * row["seq_len"]
    once, again = step_gemms(args, row["config"], tokens)
    memory, memory_again = memory_bytes(args, row["config"], tokens)
    parts = {
        "matmul_s": sum(map(clock.gemm, once)),
        "attention_s": args.n_layers * clock.attention(args, row["batch"], row["seq_len"]),
        "memory_s": memory / at.bandwidth,
        "casts_s": cast_bytes(args, row["config"], tokens, at.scales_follow) / at.bandwidth,
    }
    repeated = {
        "matmul_again_s": sum(map(clock.gemm, again)),
        "memory_again_s": memory_again / at.bandwidth,
        "casts_again_s": cast_again_bytes(args, row["config"], tokens) / at.bandwidth,
    }
    least, whole = sum(parts.values()), sum(parts.values()) + sum(repeated.values())
    about = {key: row[key] for key in ("system", "config", "compile", "batch", "layers", "seq_len")}
    floor_row = {**about, **parts, **repeated, "floor_s": whole, "floor_tps": tokens / whole}
    if step_time := row.get("step_time_s"):
        floor_row |= {"step_time_s": step_time, "step_of_floor": whole / step_time}
        floor_row["step_of_floor_without_recompute"] = least / step_time
    return floor_row


def floors(
    files: list[dict[str, Any]], at: Ceilings, args: argparse.Namespace, budget: harness.Budget
) -> list[dict[str, Any]]:
    """Return the floors of every compiled step of titanlite, each case from the first file that has it."""
    clock = Clock(args.device, args.rounds)
    by_case: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in files:
        for row in file["results"]:
            case = tuple(row.get(key) for key in ("config", "batch", "layers", "seq_len"))
            if row["system"] != "titanlite" or not row["compile"] or not row["step_time_s"] or case in by_case:
                continue
            if budget.left() <= 0:
                budget.left_out.append(f"the step of {row['config']}, batch {row['batch']}")
                continue
            by_case[case] = floor(row, model_of(row, file["toy"]), at, clock)
    return list(by_case.values())
