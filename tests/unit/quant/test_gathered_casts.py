"""What a compiled block keeps for backward where FSDP2 gathers its weights in one byte per element."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from titanlite.quant.fsdp import wrapped_for_gather
from titanlite.quant.gathered_casts import use_cast_in_backward
from titanlite.quant.int8.format import Int8Format, is_native
from titanlite.quant.linear import QuantLinear
from titanlite.quant.tensor import QuantTensor

FORMAT = Int8Format(gathered=("weight",))
LAYERS, WIDTH = 4, 64


def kept(uses_pass: bool) -> tuple[int, list[Tensor]]:
    """Run compiled layers with gathered weights. Return the number of int8 matrices kept that are no weight's memory,
    and the gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.Sequential()
    memory = set()
    for _ in range(LAYERS):
        layer = QuantLinear.from_linear(nn.Linear(WIDTH, WIDTH, bias=False), FORMAT)
        data, scale = FORMAT.quantize(layer.weight.detach(), FORMAT.amax(layer.weight, "weight"), "weight")
        assert scale is not None
        memory.add(data.untyped_storage().data_ptr())
        layer._parameters["weight"] = nn.Parameter(QuantTensor(data, scale, torch.float32))  # as FSDP2 sets it
        layers.append(layer)
    copies = []

    def pack(x: Tensor) -> Tensor:
        if x.dtype is torch.int8 and x.shape == (WIDTH, WIDTH) and x.untyped_storage().data_ptr() not in memory:
            copies.append(x)
        return x

    x = torch.randn(24, WIDTH, requires_grad=True)  # so that no activation has a weight's shape
    with inductor.patch(joint_custom_post_pass=None):
        if uses_pass:
            use_cast_in_backward()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = torch.compile(layers)(x)
        return len(copies), list(torch.autograd.grad(out.square().sum(), (x, *layers.parameters())))


def test_wrapping_a_weight_sets_the_pass() -> None:
    """In a loop of one's own too. A pass that somebody has set stays, and a warning says what follows."""
    weight = nn.Parameter(torch.randn(64, 64))
    with inductor.patch(joint_custom_post_pass=None):
        wrapped_for_gather(weight, FORMAT)
        ours = inductor.joint_custom_post_pass
        assert ours is not None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped_for_gather(weight, FORMAT)
        inductor.joint_custom_post_pass = type("Other", (CustomGraphPass,), dict(vars(type(ours))))()
        with pytest.warns(UserWarning, match="joint_custom_post_pass is set"):
            wrapped_for_gather(weight, FORMAT)


@pytest.mark.slow
@pytest.mark.skipif(not is_native("cpu"), reason="emulated, the cast is fused with the matmul and not kept")
def test_no_cast_of_a_gathered_weight_is_kept_for_backward() -> None:
    """Else a GPU would keep a byte for every parameter of the model. The gradients are the same."""
    copies, gradients = kept(True)
    assert copies == 0
    without, expected = kept(False)
    assert without > 0, "torch keeps none by itself: the pass is not needed any more"
    for mine, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5)
