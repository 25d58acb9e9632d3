"""The memory of compiled code, counted on tensors without data. A backend for ``torch.compile`` takes the place of the
default one (see :mod:`titanlite.plan.memory`)."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import register_backend
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2, auto_functionalized_v2_dense

from titanlite.config.schema import MEMORY_BACKEND
from titanlite.plan.memory import active_tracker
from titanlite.quant.gathered_casts import cast_in_backward

_aten = torch.ops.aten
# Operations that generated kernels do not compute: vendors' matmuls, attention, and all outside the namespace aten.
_EXTERN = {
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _aten._scaled_mm,
    _aten._int_mm,
    _aten._grouped_mm,
    _aten.convolution,
    _aten.convolution_backward,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_cudnn_attention_backward,
    _aten.sort,
    _aten.topk,
}


def _is_extern(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OperatorBase):
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return target.namespace not in ("aten", "prims") or target.overloadpacket in _EXTERN


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return target is operator.getitem or (isinstance(target, torch._ops.OpOverload) and target.is_view)


def _run(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``target(*args, **kwargs)``, with two exceptions. Attention with dropout that backward recomputes carries
    the state of the random generator, which tensors without data do not need. An operator that writes to its arguments
    writes in place. (Generated code first copies an argument whose old value is still read; this is not counted.)"""
    if target is auto_functionalized_v2:
        return auto_functionalized_v2_dense(args[0], (), **kwargs)  # in place
    name = getattr(target, "__name__", "")
    if name == "run_and_save_rng_state":
        return torch.empty(16, dtype=torch.uint8), args[0](*args[1:], **kwargs)
    if name == "run_with_rng_state":
        return args[1](*args[2:], **kwargs)
    if name == "graphsafe_run_with_rng_state":
        return args[0](*args[1:], **{k: v for k, v in kwargs.items() if k != "rng_state"})
    return target(*args, **kwargs)


class _CountedGraph:
    """A compiled graph that uses memory as the default backend of ``torch.compile`` would on a GPU.

    Pointwise operations and reductions are fused into their users. Their results exist as tensors only as inputs of an
    operation that no generated kernel computes, or as outputs of the graph. A tensor is freed after its last use, and
    the output of a generated kernel can reuse the memory of an input that nothing reads later.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._boxed_call = True  # on the instance, because wrappers read it there
        self.graph = graph
        nodes = list(graph.graph.nodes)
        self.stored: set[fx.Node] = set()
        for node in nodes:
            if _is_extern(node) or node.op in ("placeholder", "get_attr", "output"):
                self.stored.add(node)
                if node.op != "placeholder":
                    self.stored.update(self._behind_views(node.all_input_nodes))
        # The tensors that must be kept for a value: itself, or the inputs of the kernels that will compute it.
        sources: dict[fx.Node, set[fx.Node]] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            reads = set().union(*(sources[n] for n in node.all_input_nodes))
            sources[node] = {node} if node in self.stored else reads
            if node in self.stored:
                last[node] = node
                last.update(dict.fromkeys(reads, node))
        # They belong to the caller, so their memory cannot be reused.
        self._inputs = {n for n in nodes if n.op == "placeholder" and n.name.startswith(("primals", "tangents"))}
        order = {node: i for i, node in enumerate(nodes)}
        self.ends: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in nodes:
            ends = max((node, *(last[n] for n in sources[node]), *node.users), key=order.__getitem__)
            self.ends[ends].append(node)

    @staticmethod
    def _behind_views(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
        for node in nodes:
            while _is_view(node):
                node = node.all_input_nodes[0]
            yield node

    def __call__(self, args: list[Any]) -> Any:
        values: dict[fx.Node, Any] = {}
        arguments = list(args)
        args.clear()  # the caller has released them
        arguments.reverse()
        tracker = active_tracker()
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = arguments.pop()
            elif node.op == "get_attr":
                values[node] = getattr(self.graph, node.target)
            else:
                operands = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if node.op == "output":
                    return operands[0][0]
                with tracker.paused() if tracker else nullcontext():
                    values[node] = out = _run(node.target, *operands)
                del operands
                if not _is_extern(node):
                    self._end(node, values, self._inputs)
                if tracker and node in self.stored:
                    tracker.add(out)
                del out
            self._end(node, values, set())
            if node in self.ends[node]:
                del values[node]
        raise AssertionError("a graph without an output")

    def _end(self, node: fx.Node, values: dict[fx.Node, Any], kept: set[fx.Node]) -> None:
        for ended in self.ends[node]:
            if ended is not node and ended not in kept:
                values.pop(ended, None)


@register_backend(name=MEMORY_BACKEND)  # type: ignore[untyped-decorator]
def memory_backend(graph: fx.GraphModule, inputs: list[Tensor], **_: Any) -> Any:
    """A backend for ``torch.compile`` that computes nothing faster, but uses as much memory as "inductor". It has the
    same decompositions and the same partition of forward and backward, which recomputes cheap operations (min-cut)."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def counted(graph: fx.GraphModule, _: Any) -> _CountedGraph:
        return _CountedGraph(graph)

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        cast_in_backward(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **{**options, "compiler": "inductor"})

    return aot_autograd(
        fw_compiler=counted,
        bw_compiler=counted,
        inference_compiler=counted,
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )(graph, inputs)
