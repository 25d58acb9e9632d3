"""Attention of sequences that several ranks share, on gloo processes: the numbers of attention to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import context_parallel_attention
from tests.distributed.context_parallel_attention import (
    BATCHES,
    DTYPES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NAMES,
    SEQ_LEN,
    SIZES,
    WORLD,
)
from tests.support.forks import on_ranks
from tests.support.runs import environment
from titanlite.distributed.context_parallel import (
    METHODS,
    ContextParallel,
    _attend,
    _attend_backward,
    load_balanced_positions,
    ring_attention,
)
from titanlite.models.layers import causal_attention


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw."""
    return on_ranks(WORLD, tmp_path_factory.mktemp("cp"), environment(), context_parallel_attention.report)


each_size = pytest.mark.parametrize("size", SIZES)
each_method = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
SHAPES = [(batch, kv_heads) for batch in BATCHES for kv_heads in KV_HEADS]


# ---- positions


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.slow
def test_each_position_once_and_equal_work(size: int) -> None:
    positions = [load_balanced_positions(48, rank, size) for rank in range(size)]
    assert torch.cat(positions).sort().values.tolist() == list(range(48))
    work = {int((p + 1).sum()) for p in positions}  # a position sees itself and all before it
    assert work == {48 * 49 // 2 // size}
    for p in positions:
        assert p.dtype == torch.int64
        assert p.tolist() == sorted(p.tolist())  # causal attention within a shard needs no mask of its own


@pytest.mark.slow
def test_which_positions() -> None:
    assert [load_balanced_positions(8, rank, 2).tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


@each_size
@pytest.mark.slow
def test_shards_are_those_positions(ranks: Any, size: int) -> None:
    for number, rank in enumerate(ranks):
        place, positions, tokens = rank["shards"][str(size)]
        assert place == number % size
        assert positions == load_balanced_positions(SEQ_LEN, place, size).tolist()
        assert tokens == [SEQ_LEN + p for p in positions]


# ---- numbers


@pytest.mark.parametrize(("batch", "kv_heads"), SHAPES)
@each_dtype
@each_method
@each_size
@pytest.mark.slow
def test_as_exact_as_one_process(ranks: Any, size: int, method: str, dtype: str, batch: int, kv_heads: int) -> None:
    for rank in ranks:
        report = rank["parity"][f"{size}/{method}/{dtype}/{batch}/{kv_heads}"]
        assert report["dtypes"] == [f"torch.{dtype}"] * 4
        for name in NAMES:
            if dtype == "float32":
                assert report["ours"][name] < 2e-6, name
            else:
                # Each block is rounded, then what they are merged to.
                assert report["ours"][name] < 1.5 * report["torch"][name] + 2e-3, name


@pytest.mark.parametrize(("batch", "kv_heads"), SHAPES)
@each_dtype
@each_size
@pytest.mark.slow
def test_methods_agree(ranks: Any, size: int, dtype: str, batch: int, kv_heads: int) -> None:
    for rank in ranks:
        one, other = (rank["parity"][f"{size}/{method}/{dtype}/{batch}/{kv_heads}"] for method in METHODS)
        assert one["sums"][:2] == other["sums"][:2]  # the same blocks, merged in the same order
        # Gradients of K and V are summed in another order, in float32.
        assert one["sums"] == pytest.approx(other["sums"], rel=1e-2 if dtype == "bfloat16" else 1e-5, abs=1e-2)


@each_method
@each_size
@pytest.mark.slow
def test_large_scores(ranks: Any, size: int, method: str) -> None:
    for rank in ranks:
        errors = rank["large"][f"{size}/{method}"]
        for name in NAMES:
            assert errors["ours"][name] < 2 * errors["torch"][name] + 1e-5, name


@each_method
@each_size
@pytest.mark.slow
def test_without_some_gradients(ranks: Any, size: int, method: str) -> None:
    for rank in ranks:
        assert rank["partly"][f"{size}/{method}"]


# ---- what is communicated


@pytest.mark.parametrize(("batch", "kv_heads"), SHAPES)
@each_dtype
@each_method
@each_size
@pytest.mark.slow
def test_communication(ranks: Any, size: int, method: str, dtype: str, batch: int, kv_heads: int) -> None:
    elements = 2 * batch * kv_heads * SEQ_LEN // size * HEAD_DIM  # of a shard, K and V
    shard, grads = elements * DTYPES[dtype].itemsize, elements * 4
    if size == 1:
        expected: tuple[list[Any], list[Any]] = ([], [])
    elif method == "allgather":
        gather = ["all_gather_into_tensor", shard]
        expected = [gather], [gather, ["reduce_scatter_tensor", size * grads]]
    else:
        step, home = ["all_to_all_single", shard], ["all_to_all_single", grads]
        expected = [step] * (size - 1), [step, *[step, home] * (size - 2), home]
    for rank in ranks:
        report = rank["parity"][f"{size}/{method}/{dtype}/{batch}/{kv_heads}"]
        assert (report["forward"], report["backward"]) == expected


# ---- compiled, checkpointed


@each_method
@each_size
@pytest.mark.slow
def test_checkpointed_to_the_bit(ranks: Any, size: int, method: str) -> None:
    for rank in ranks:
        matches = rank["checkpointed"][f"{size}/{method}"]
        assert matches == {f"{mode}/{dtype}": True for mode in ("full", "op") for dtype in DTYPES}


@each_method
@pytest.mark.slow
def test_compiled(ranks: Any, method: str) -> None:
    for number, rank in enumerate(ranks):
        frames = 1 if number in (1, 2) else 0  # layers and steps share their code
        assert rank["compiled"][method] == {"same": True, "frames": frames}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of the third of 4 ranks, of which there are no others."""
    dist.init_process_group("fake", rank=2, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.slow
def test_heads_of_values_have_a_size_of_their_own(size: int) -> None:
    """As in latent attention, smaller or larger than those of keys; on one process, which has the whole sequence."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        torch.manual_seed(0)
        q, k, v = (shard(heads=4, head_dim=features) for features in (16, 16, size))
        results = []
        for attention in (ContextParallel(init_device_mesh("cpu", (1,))).attention, causal_attention):
            out = attention(q, k, v)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    finally:
        dist.destroy_process_group()


def shard(dtype: torch.dtype = torch.float32, heads: int = HEADS, head_dim: int = HEAD_DIM, device: str = "cpu") -> Any:
    return torch.randn(1, heads, 8, head_dim, dtype=dtype, device=device, requires_grad=True)


@each_method
@pytest.mark.slow
def test_compiled_code_keeps_its_own_shard_only(mesh: DeviceMesh, method: str) -> None:
    """Inductor's way to divide the graph must not keep for backward what other ranks sent in forward."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    attention = torch.compile(ContextParallel(mesh, method).attention, fullgraph=True, backend=backend)
    attention(shard(), shard(heads=2), shard(heads=2)).sum().backward()
    forward, backward = (list(graph.graph.nodes) for graph in graphs)
    shapes = [tuple(n.meta["val"].shape) for n in forward[-1].args[0]]
    whole = (1, HEADS, 8, HEAD_DIM)
    assert set(shapes) <= {whole, (1, 2, 8, HEAD_DIM), whole[:3]}
    # The output, what it is returned as, q, log-sum-exp, k and v; the last two once more for every head of q (CPU).
    assert len(shapes) <= 8
    names = [n.target._opname for n in backward if getattr(n.target, "namespace", "") == "_c10d_functional"]
    counts = {name: names.count(name) for name in names if name != "wait_tensor"}
    assert counts == (
        {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1} if method == "allgather" else {"all_to_all_single": 6}
    )


# ---- CUDA, without one: shapes and dtypes


@pytest.mark.parametrize(("queries", "keys", "causal"), [(8, 8, True), (8, 4, False), (4, 8, False)])
@pytest.mark.slow
def test_cuda_kernels_are_called_rightly(queries: int, keys: int, causal: bool) -> None:
    # On the meta device, which takes the same path, and torch's own description of the kernels.
    given = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
                given.append(args)
            return func(*args, **(kwargs or {}))

    with Spy():
        q, k, v = (
            torch.empty(1, heads, seq, HEAD_DIM, dtype=torch.bfloat16, device="meta")
            for heads, seq in ((HEADS, queries), (2, keys), (2, keys))
        )
        out, lse = _attend(q, k, v, causal=causal, grouped=True)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
        lse = torch.empty(1, HEADS, 2 * queries, device="meta")[:, :, queries:]  # of a part of the queries
        for grad, like in zip(
            _attend_backward(out, q, k, v, out, lse, causal=causal, grouped=True), (q, k, v), strict=True
        ):
            assert (grad.shape, grad.dtype, grad.device) == (like.shape, like.dtype, like.device)
        ((*_, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal, _, _),) = given
        assert lse.is_contiguous()  # the kernel does not look at its strides
        assert (cum_q, cum_k, max_q, max_k, dropout, is_causal) == (None, None, queries, keys, 0, causal)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float32, 16, r'torch.float32 on cuda: .* float16 and bfloat16 only; set .*_param = "bfloat16"'),
        (torch.bfloat16, 12, "head_dim 12 on cuda: flash attention needs a multiple of 8, at most 256; choose"),
        (torch.bfloat16, 264, "head_dim 264 on cuda"),
    ],
)
@pytest.mark.slow
def test_cuda_refuses(mesh: DeviceMesh, dtype: torch.dtype, head_dim: int, message: str) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        ContextParallel(mesh).attention(*(shard(dtype, head_dim=head_dim, device="cuda") for _ in range(3)))


# ---- bad input


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 4, 8, 16), (1, 3, 8, 16), (1, 3, 8, 16)),
        ((1, 4, 8, 16), (1, 2, 8, 16), (1, 4, 8, 16)),
        ((1, 4, 8, 16), (1, 4, 6, 16), (1, 4, 6, 16)),
        ((1, 4, 7, 16), (1, 4, 7, 16), (1, 4, 7, 16)),
        ((2, 4, 8, 16), (1, 4, 8, 16), (1, 4, 8, 16)),
        ((1, 4, 8, 16), (1, 4, 8, 8), (1, 4, 8, 8)),
    ],
)
@pytest.mark.slow
def test_refuses_shapes(q: Any, k: Any, v: Any) -> None:
    with pytest.raises(ValueError, match=r"q \(\d, 4, .*: must be \[batch, heads, local_seq, head_dim\]"):
        ring_attention(*(torch.zeros(shape) for shape in (q, k, v)), group_name="", rank=0, size=1)


@pytest.mark.slow
def test_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="on meta: there are kernels for cpu and cuda only"):
        ring_attention(*[torch.zeros(1, 1, 2, 8, device="meta")] * 3, group_name="", rank=0, size=1)


@pytest.mark.slow
def test_refuses_lengths() -> None:
    with pytest.raises(ValueError, match="a sequence of 36 tokens cannot be cut into 8 chunks for 4 ranks: must be a "):
        load_balanced_positions(36, 0, 4)


@pytest.mark.slow
def test_refuses_methods_and_meshes(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match='by "ring": must be one of allgather, alltoall'):
        ContextParallel(mesh, "ring")
    with pytest.raises(ValueError, match="mesh of 2 dimensions: must be one"):
        ContextParallel(init_device_mesh("cpu", (2, 2)))
