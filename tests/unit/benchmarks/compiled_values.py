"""A small block compiled for an absent GPU by the rules of titanlite.distributed.fusion: prints, as JSON, how near
its output and gradients are to those of the block on the CPU, in dB."""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch
from absent_gpu import device

TOKENS, DIM, FFN_DIM = 48, 1152, 256  # rows longer than the compiler's own limit, of no power of two


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="bf16")
    options = parser.parse_args()
    device.install("sm_90")

    import torch._inductor.config as inductor
    from absent_gpu import recorder, values
    from torch import Tensor

    from titanlite.distributed.fusion import use_block_fusion
    from titanlite.float8 import Float8LinearConfig, convert_to_float8_training
    from titanlite.models.layers import Block, DecoderArgs

    def core(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Stand for attention, whose kernels are no part of the compiled code."""
        return q * k.repeat_interleave(q.shape[1], 1) + v.repeat_interleave(q.shape[1], 1)

    recorder.install()
    values.install()
    use_block_fusion()
    inductor.triton.mix_order_reduction_non_strict_mode = True  # for so few rows too

    def build(emulate: bool) -> Block:
        args = DecoderArgs(dim=DIM, n_layers=1, n_heads=DIM // 128, n_kv_heads=1, ffn_dim=FFN_DIM)
        with torch.device("meta"):
            block = Block(args).bfloat16()
        block.attention.core = core
        if options.config != "bf16":
            config = Float8LinearConfig.from_recipe_name(options.config)
            config = dataclasses.replace(config, kernels="inductor", target="sm_90", emulate=emulate)
            convert_to_float8_training(block, config=config)
        return block

    block, eager = build(False), build(True).to_empty(device="cpu")
    with recorder.MODE:
        block.to_empty(device="cuda")
        x = torch.empty(1, TOKENS, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        rope = torch.empty(2, TOKENS, 128, device="cuda")
        grad = torch.empty(1, TOKENS, DIM, device="cuda", dtype=torch.bfloat16)
    for parameter in block.parameters():
        values.real(parameter.detach()).mul_(parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1)
    with recorder.MODE:
        out = torch.compile(block.compute, fullgraph=True)(x, rope)
        grads = torch.autograd.grad(out, [x, *block.parameters()], grad)
    eager.load_state_dict({name: values.real(value) for name, value in block.state_dict().items()})
    eager_x = values.real(x.detach()).requires_grad_()
    expected = eager.compute(eager_x, values.real(rope))
    expected_grads = torch.autograd.grad(expected, [eager_x, *eager.parameters()], values.real(grad))
    names = ["output", "x", *(name for name, _ in block.named_parameters())]
    pairs = zip(names, (out, *grads), (expected, *expected_grads))
    print(json.dumps({name: _decibels(values.real(a.detach()), b.detach()) for name, a, b in pairs}))


def _decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float(20 * torch.log10(b.norm() / (a - b).norm()))


if __name__ == "__main__":
    main()
