"""Rules by which the compiler fuses the operations of a transformer block into GPU kernels, so that few bytes
move twice.

Import it only when something is compiled: it loads the compiler.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch._inductor.config as inductor
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.loop_body import LoopBody, MemoryUsageType
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.scheduler import BaseSchedulerNode, ForeachKernelSchedulerNode, Scheduler, SchedulerNode
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V

ROW_VALUES = 32768
"""The values of one row, of all inputs together, that a kernel may keep in registers: 128 for each of 256 threads,
which have 255 registers each."""

_OPTIONS = {
    "combo_kernels": True,
    "combo_kernel_per_subkernel_blocks": True,
    "combo_kernel_max_num_nodes": 32,  # always 8 in torch 2.11
    # A concatenation computed element by element computes all its inputs for each element.
    "max_pointwise_cat_inputs": 0,
    "max_complex_pointwise_cat_inputs": 0,  # always 8 in torch 2.11, where rotary embeddings are computed so
}


class BlockFusion(InductorChoices):
    """Rules for kernels of normalized, quantized rows on GPUs. They change results by the order of additions, and by
    where intermediate values are rounded to bf16.

    - A row that fits into registers is read once. The compiler's own limit is 1,024 columns; beyond, it reads a row
      once for its sum or amax, and again for what depends on that.
    - A transposed copy is written by a kernel of its own, in tiles, and not by a reduction, which would write it byte
      by byte: 32 bytes of memory for each float8 value.
    - Two reductions share a kernel only if one reads nothing that the other does not read. The compiler joins the sums
      over the columns of two norms because both read the residual, and then cannot join either with its rows.
    """

    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        if inductor.triton.persistent_reductions and _fits_into_registers(features):
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    @staticmethod
    def can_fuse(
        scheduler: Scheduler, node1: BaseSchedulerNode, node2: BaseSchedulerNode, shared_data_score: int
    ) -> bool:
        if not InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score):
            return False
        if not all(node.is_gpu() and not node.is_foreach() for node in (node1, node2)):
            return True
        for transposing, other in ((node1, node2), (node2, node1)):
            if _writes_transposed(transposing) and not _may_fuse(scheduler, transposing, other):
                return False
        return not (node1.is_reduction() and node2.is_reduction()) or _share_inputs(node1, node2)

    def uuid(self) -> str:
        """Return a key for the compiler's cache: another one whenever this file changes. (torch 2.11 asks for none.)"""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


_before: dict[str, Any] = {}  # the compiler's options that the rules have replaced


def use_block_fusion(enabled: bool = True) -> None:
    """Let the compiler follow these rules in this process, and combine independent kernels of one kind into one launch;
    ``enabled`` = False: no longer.

    The options of the compiler that are set for it concern the code for GPUs only. (On the CPU concatenations are
    computed so anyway.)
    """
    if enabled and not _before:
        for name, value in {**_OPTIONS, "inductor_choices_class": BlockFusion}.items():
            if hasattr(inductor, name):
                _before[name] = getattr(inductor, name)
                setattr(inductor, name, value)
        ForeachKernelSchedulerNode.set_group_algorithm_for_combo_kernels(_groups_of_a_kind)
        V.set_choices_handler(BlockFusion())  # threads that have not compiled yet create theirs from the class
    elif not enabled and _before:
        for name, value in _before.items():
            setattr(inductor, name, value)
        _before.clear()
        default = ForeachKernelSchedulerNode._default_group_nodes_for_combo_kernels
        ForeachKernelSchedulerNode.set_group_algorithm_for_combo_kernels(default)
        V.set_choices_handler(InductorChoices())


def _groups_of_a_kind(scheduler: Scheduler) -> list[list[BaseSchedulerNode]]:
    """Return the kernels to combine: of the groups that the compiler makes, those of a kind. Those of a group have the
    same number of warps, and torch 2.11 chooses their tiles by one hint for all. For a kernel of another kind that can
    mean spilled registers, or one value per sector of memory."""
    groups: list[list[BaseSchedulerNode]] = []
    for nodes in ForeachKernelSchedulerNode._default_group_nodes_for_combo_kernels(scheduler):
        kinds: dict[Any, list[BaseSchedulerNode]] = defaultdict(list)
        for node in nodes:
            kinds[_kind(node)].append(node)
        groups += kinds.values()
    return groups


def _kind(node: BaseSchedulerNode) -> object:
    """Return a key that is equal for kernels that want the same tiles and warps."""
    if not node.is_reduction():
        return "elementwise"
    sizes: Any = node.group[1]
    rows, columns = sizes
    if _rows_fit(_parts(node), rows, columns):
        return "rows", int(columns) > 1024  # above, they take all the warps there are
    hints = {part.node.data.reduction_hint for part in _parts(node) if part.is_reduction()}  # type: ignore[union-attr]
    return hints.pop() if len(hints) == 1 and ReductionHint.DEFAULT not in hints else node


def _fits_into_registers(features: SIMDKernelFeatures) -> bool:
    nodes = list(features.scheduler_nodes())
    if not all(isinstance(node._body, LoopBody) for node in nodes):  # a template's has other loops
        return False
    return _rows_fit(nodes, features.numel, features.reduction_numel)


def _rows_fit(nodes: Iterable[SchedulerNode], rows: Any, columns: Any) -> bool:
    """Return whether ``nodes``, in one kernel, reduce ``rows`` contiguous rows whose values fit into the registers."""
    if not isinstance(columns, (int, sympy.Integer)) or int(columns) > ROW_VALUES:
        return False
    inputs: set[str | None] = set()
    outputs: set[str | None] = set()
    for node in nodes:
        elements = sympy_product(node._body.var_ranges.values())
        outputs |= set(node.get_buffer_names())
        for buffer, strides in _accesses(node, MemoryUsageType.LOAD):
            if node.is_reduction() and strides[-1] not in (0, 1):  # the innermost loop is the one that reduces
                return False
            if all(strides) and elements == rows * columns:
                inputs.add(buffer)
    read = len(inputs - outputs)
    return read > 0 and read * (1 << (int(columns) - 1).bit_length()) <= ROW_VALUES


def _inputs(node: BaseSchedulerNode) -> set[str | None]:
    """Return the matrices that ``node`` reads."""
    accesses = (access for part in _parts(node) for access in _accesses(part, MemoryUsageType.LOAD))
    return {buffer for buffer, strides in accesses if all(strides)} - set(node.get_buffer_names())


def _share_inputs(node1: BaseSchedulerNode, node2: BaseSchedulerNode) -> bool:
    """Return whether the inputs of one are among those of the other."""
    inputs1, inputs2 = _inputs(node1) - set(node2.get_buffer_names()), _inputs(node2) - set(node1.get_buffer_names())
    return inputs1 <= inputs2 or inputs2 <= inputs1


def _may_fuse(scheduler: Scheduler, transposing: BaseSchedulerNode, other: BaseSchedulerNode) -> bool:
    """Return whether a transposed copy may join another kernel: none that reduces, or that can join one that does."""
    if other.is_reduction():
        return False
    return _writes_transposed(other) or not _continues_row(scheduler, other)


def _continues_row(scheduler: Scheduler, node: BaseSchedulerNode) -> bool:
    """Return whether ``node`` can be computed in the kernel that reduces the same rows in one pass."""
    _, (elements, _) = node.group
    for dependency in node.unmet_dependencies:
        buffer = scheduler.name_to_buf.get(dependency.name)
        source = None if buffer is None else scheduler.name_to_fused_node.get(buffer.defining_op_name())
        if source is None or not source.is_reduction():
            continue
        rows, columns = source.group[1]
        if sympy_product((rows, columns)) == elements and _rows_fit(_parts(source), rows, columns):
            return True
    return False


def _writes_transposed(node: BaseSchedulerNode) -> bool:
    """Return whether an elementwise part of ``node`` reads along one loop and writes along another."""
    for part in _parts(node):
        if part.is_reduction():
            continue
        for _, written in _accesses(part, MemoryUsageType.STORE):
            for _, read in _accesses(part, MemoryUsageType.LOAD):
                if 1 in written and 1 in read and written.index(1) != read.index(1) and all(read):
                    return True
    return False


def _parts(node: BaseSchedulerNode) -> list[SchedulerNode]:
    """Return the loops that ``node`` is made of, but no template's."""
    parts = (part for part in node.get_nodes() if isinstance(part, SchedulerNode))
    return [part for part in parts if isinstance(part._body, LoopBody)]


def _accesses(node: SchedulerNode, usage: MemoryUsageType) -> list[tuple[str | None, list[Any]]]:
    """Return the buffer of each access, and its stride along each loop of ``node``, from the outermost on."""
    body = node._body
    loops = list(body.var_ranges)
    accesses = body.memory_usage[usage]
    indices = ((access.buffer_name, body.indexing_exprs[access.index_name]) for access in accesses)
    return [(buffer, V.graph.sizevars.stride_vars(index, loops, loops)) for buffer, index in indices]
