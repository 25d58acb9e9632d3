"""A pass of the compiler that leaves the casts of gathered weights for the gradients to the backward.

FSDP2 gathers a weight in one byte per element, frees it after the forward, and gathers it again. The gradient of the
input needs it in another form, such as transposed, which depends on no gradient. So the compiler may compute that form
in the forward and keep it: a byte for every parameter of the model on each GPU. It takes parameters themselves as free
to keep. But if some are wrapped, it looks for them at the wrong places: it counts tensors before they are unwrapped
(torch 2.13, ``static_lifetime_input_indices`` in torch/_functorch/_aot_autograd/graph_compile.py).
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
import torch._inductor.config as inductor
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

_GATHERED = (
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)


def cast_in_backward(graph: fx.Graph) -> None:
    """Let what is computed from gathered weights, and used by the backward alone, be computed there.

    Args:
        graph: of forward and backward, before it is split into both.
    """
    nodes = list(graph.nodes)
    of_weights = _parts_of_weights([node for node in nodes if node.op == "placeholder"])
    of_gradients = {node for node in nodes if node.op == "placeholder" and node.name.startswith("tangents")}
    for node in nodes:
        if node.op == "output":  # of the forward too: what it returns is not for the backward alone
            continue
        inputs = node.all_input_nodes
        if not of_gradients.isdisjoint(inputs):
            of_gradients.add(node)
        elif inputs and of_weights.issuperset(inputs) and node.op == "call_function":
            of_weights.add(node)
    for_backward = of_gradients
    for node in reversed(nodes):
        if node.op != "placeholder" and node in of_weights and node.users and for_backward.issuperset(node.users):
            for_backward.add(node)
            node.meta["partitioner_tag"] = "must_be_in_backward"


def _parts_of_weights(inputs: list[fx.Node]) -> set[fx.Node]:
    """Return the inputs of a graph that are the bytes or the scales of gathered weights: a wrapped weight has one after
    the other."""
    parts: set[fx.Node] = set()
    for data, scale in pairwise(inputs):
        value = data.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in _GATHERED and value.ndim == 2:
            parts |= {data, scale}
    return parts


class _CastInBackward(CustomGraphPass):
    """The pass as the compiler takes it; its cache keeps graphs by ``uuid``."""

    def __call__(self, graph: fx.Graph) -> None:
        cast_in_backward(graph)

    def uuid(self) -> str:
        return "titanlite cast_in_backward 1"


def use_cast_in_backward() -> None:
    """Let the compiler run the pass for all that it compiles from now on. Another pass that is set there stays, with a
    warning."""
    if inductor.joint_custom_post_pass is None:
        inductor.joint_custom_post_pass = _CastInBackward()
    elif not isinstance(inductor.joint_custom_post_pass, _CastInBackward):
        warnings.warn(
            "torch._inductor.config.joint_custom_post_pass is set. So compiled code may keep the casts of weights that "
            "FSDP2 gathers in a number format from forward to backward: a byte for each parameter of the model. Call "
            "titanlite.quant.gathered_casts.cast_in_backward(graph) in your pass",
            stacklevel=2,
        )
