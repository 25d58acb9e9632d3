"""One compiled transformer block on a GPU that is not there: prints what it launches, reads, writes and keeps, as JSON.

A child process of compiled_block.py, with the environment of :func:`absent_gpu.device.environment`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from absent_gpu import device, recorder
from absent_gpu.recorder import Launch
from titanlite.config.schema import ActivationCheckpoint
from titanlite.distributed.activation_checkpoint import apply_activation_checkpoint
from titanlite.distributed.fusion import use_block_fusion
from titanlite.models.layers import Block, DecoderArgs
from titanlite.quant.gathered_casts import use_cast_in_backward
from titanlite.quant.linear import quant_layers
from titanlite.quant.tensor import QuantTensor

# Operators whose bytes are counted apart: they are the same whatever the casts do.
_HEAVY = ("mm", "_scaled_mm", "addmm", "bmm", "attention")


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: None = None) -> Tensor:
    assert window is None
    # The dispatcher would look for a real GPU to choose between its implementations.
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True)[0]
    return out


class FlashAttention(nn.Module):
    """The attention of torchtitan's block."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return flash_attention(q, k, v)


def build(options: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the block, and its computation, to be compiled."""
    with torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        block = _torchtitan(options) if options.system == "torchtitan" else _titanlite(options)
        torch.set_default_dtype(torch.float32)
    if options.config != "bf16":
        _convert(block, options)
    with recorder.MODE:
        block.to_empty(device="cuda")
        if options.gathered == "float8":
            _gather(block)
        if options.system == "torchtitan":
            table = torch.empty(options.tokens, 128 // 2, device="cuda", dtype=torch.complex64)
            return block, lambda x: block(x, table, None)
        if options.ac != "none":
            mode = "full" if options.ac == "full" else "selective"
            ac = ActivationCheckpoint(mode=mode, selective_ac_option="op")  # type: ignore[arg-type]
            apply_activation_checkpoint(nn.ModuleDict({"0": block}), ac)
        rope = torch.randn(2, options.tokens, 128, device="cuda")
        compute: Any = block.run or block.compute
    return block, lambda x: compute(x, rope)


def _titanlite(options: argparse.Namespace) -> nn.Module:
    args = DecoderArgs(
        dim=options.dim, n_layers=1, n_heads=options.dim // 128, n_kv_heads=options.kv_heads, ffn_dim=options.ffn_dim
    )
    block = Block(args)
    block.attention.core = flash_attention
    return block


def _torchtitan(options: argparse.Namespace) -> nn.Module:
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import TransformerBlock

    args = TransformerModelArgs(
        dim=options.dim,
        n_layers=1,
        n_heads=options.dim // 128,
        n_kv_heads=options.kv_heads,
        multiple_of=1,
        ffn_dim_multiplier=options.ffn_dim / int(8 * options.dim / 3),
    )
    block: Any = TransformerBlock(0, args)
    assert block.feed_forward.w1.out_features == options.ffn_dim
    block.attention.inner_attention = FlashAttention()
    return block  # type: ignore[no-any-return]


def _convert(block: Any, options: argparse.Namespace) -> None:
    if options.system == "torchao":
        import torchao.float8 as float8

        float8.convert_to_float8_training(block, config=float8.Float8LinearConfig.from_recipe_name(options.config))
        return
    from titanlite.float8 import Float8LinearConfig, convert_to_float8_training
    from titanlite.quant.swiglu import swiglu_linear

    config = Float8LinearConfig.from_recipe_name(options.config)
    config = dataclasses.replace(
        config,
        kernels=options.kernels,
        target=options.architecture,
        enable_fsdp_float8_all_gather=options.gathered == "float8",
    )
    convert_to_float8_training(block, config=config)
    block.feed_forward.swiglu = swiglu_linear


def _gather(block: nn.Module) -> None:
    """Replace the weights of float8 layers by what FSDP2 has when it has gathered them in float8."""
    for layer in quant_layers(block):
        rows = layer.weight.shape[0]
        scale = torch.ones(rows, 1) if layer.format.has_scales_of_rows("weight") else torch.ones(())
        data = torch.empty(layer.weight.shape, device="cuda", dtype=torch.float8_e4m3fn)
        layer.weight = nn.Parameter(QuantTensor(data, scale.to("cuda"), torch.bfloat16))


def kept_bytes(out: Tensor, block: nn.Module) -> int:
    """Return the bytes that the compiled forward keeps for backward, without the parameters."""
    local = (p.qdata if isinstance(p, QuantTensor) else p for p in block.parameters())
    parameters = {parameter.untyped_storage()._cdata for parameter in local}
    assert out.grad_fn is not None
    saved = (tensor.untyped_storage() for tensor in out.grad_fn.saved_tensors)  # type: ignore[attr-defined]
    return sum({s._cdata: s.nbytes() for s in saved if s._cdata not in parameters}.values())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    block, compute = build(options)
    with recorder.recording() as record:
        x = torch.randn(1, options.tokens, options.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        compiled = torch.compile(compute, fullgraph=True)  # one graph, or an error
        compiled(x).sum().backward()
        graphs = _compiled_graphs()
        record.launches.clear()
        out = compiled(x)
        kept, forward = kept_bytes(out, block), len(record.launches)
        ones = torch.ones_like(out)
        out.backward(ones)
    casts = [launch for launch in record.launches if not _is_heavy(launch)]
    heavy = [launch for launch in record.launches if _is_heavy(launch)]
    return {
        **{key: getattr(options, key) for key in ("system", "config", "ac", "tokens", "architecture")},
        "kernels": options.kernels if options.system == "titanlite" and options.config != "bf16" else None,
        "fusion": options.fusion if options.system == "titanlite" else "compiler",
        "recompilations": _compiled_graphs() - graphs,
        "launches": len(record.launches),
        "once_mb": sum(launch.traffic.once for launch in casts) / 1e6,
        "mb": sum(launch.traffic.total for launch in casts) / 1e6,
        "sectors_mb": sum(launch.traffic.sectors for launch in casts) / 1e6,
        "forward_mb": sum(launch.traffic.total for launch in record.launches[:forward] if not _is_heavy(launch)) / 1e6,
        "matmuls_mb": sum(launch.traffic.total for launch in heavy) / 1e6,
        "kept_mib": kept / 2**20,
        "seconds": round(time.perf_counter() - began, 1),
        "list": [_row(launch) for launch in record.launches],
    }


def _compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _is_heavy(launch: Launch) -> bool:
    return launch.origin.startswith("aten.") and any(word in launch.name for word in _HEAVY)


def _row(launch: Launch) -> list[Any]:
    traffic = launch.traffic
    return [launch.name, *(round(n / 1e6, 1) for n in (traffic.read, traffic.written, traffic.sectors))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=("titanlite", "torchao", "torchtitan"), default="titanlite")
    parser.add_argument("--config", default="bf16")
    parser.add_argument("--kernels", choices=("inductor", "triton"), default="inductor")
    parser.add_argument("--fusion", choices=("block", "compiler"), default="block")
    parser.add_argument("--gathered", choices=("bf16", "float8"), default="bf16", help="in what FSDP2 gathers weights")
    parser.add_argument("--ac", choices=("none", "op", "full"), default="none")
    parser.add_argument("--architecture", choices=device.ARCHITECTURES, default="sm_90")
    for name, default in {"tokens": 8192, "dim": 4096, "kv-heads": 8, "ffn-dim": 14336}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    device.install(options.architecture)
    recorder.install()
    if options.system == "titanlite" and options.fusion == "block":
        use_block_fusion()
    if options.gathered == "float8":
        use_cast_in_backward()
    print(json.dumps(measure(options)), flush=True)
    os._exit(0)  # the compiler's threads can abort an orderly end


if __name__ == "__main__":
    main()
