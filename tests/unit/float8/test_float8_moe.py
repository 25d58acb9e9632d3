"""Experts of any model in float8, by a filter of modules: what is called converted computes in the format."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.float8.test_float8_oracle import sqnr
from titanlite.float8 import Float8LinearConfig, convert_moe_to_float8_training, high_precision
from titanlite.models.layers import Experts, MixtureArgs
from titanlite.quant.grouped_mm import quantized_grouped_mm

GROUPS, K, M = 4, 32, 48


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Mine(nn.Module):
    """Experts as users write them."""

    def __init__(self, m: int = M) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(GROUPS, K, m) / 8)
        self.down = nn.Parameter(torch.randn(GROUPS, m, K) / 8)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(F.silu(F.grouped_mm(x, self.up, offs=offsets)), self.down, offs=offsets)


class Looping(Mine):
    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        ends = offsets.tolist()
        parts = zip([0, *ends], ends, self.up, self.down)
        return torch.cat([x[start:stop] @ up @ down for start, stop, up, down in parts])


def model() -> nn.Module:
    return nn.ModuleDict({"experts": Mine(), "head": nn.Linear(K, K), "other": nn.ModuleDict({"experts": Mine()})})


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(70, K, requires_grad=True), torch.tensor([3, 20, 20, 70], dtype=torch.int32)


def by_hand(experts: Any, x: Tensor, offsets: Tensor) -> Tensor:
    hidden = F.silu(quantized_grouped_mm(x, experts.up, offsets, "float8_rowwise"))
    return quantized_grouped_mm(hidden, experts.down, offsets, "float8_rowwise")


def test_chosen_modules_compute_in_float8_and_others_as_before() -> None:
    plain, (x, offsets) = model(), rows()
    converted: Any = convert_moe_to_float8_training(
        copy.deepcopy(plain), module_filter_fn=lambda _, name: name.startswith("other")
    )
    exact: Any = plain
    assert torch.equal(converted["experts"](x, offsets), exact["experts"](x, offsets))
    mine, theirs = converted["other"]["experts"], exact["other"]["experts"]
    assert isinstance(mine, Mine)
    results = []
    for out, module in ((mine(x, offsets), mine), (by_hand(theirs, x, offsets), theirs)):
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, module.up, module.down))])
    assert all(map(torch.equal, *results))
    with high_precision(converted):
        assert torch.equal(mine(x, offsets), theirs(x, offsets))
    assert converted.state_dict().keys() == plain.state_dict().keys()
    assert all(type(value) is Tensor for value in converted.state_dict().values())


def test_a_converted_module_is_copied_and_saved() -> None:
    x, offsets = rows()
    experts = convert_moe_to_float8_training(Mine())
    out = experts(x, offsets)
    assert torch.equal(copy.deepcopy(experts)(x, offsets), out)
    assert torch.equal(pickle.loads(pickle.dumps(experts))(x, offsets), out)
    plain, file = Mine(), io.BytesIO()
    torch.save(experts.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert sqnr(plain(x, offsets), out) > 20


def test_compiled_code_computes_in_float8() -> None:
    """The compiler leaves these experts out; those with a slot it takes whole."""
    x, offsets = rows()
    experts = convert_moe_to_float8_training(Mine())
    compiled = torch.compile(lambda x: experts(x * 2, offsets) + 1, backend="aot_eager")
    torch.testing.assert_close(compiled(x), by_hand(experts, x * 2, offsets) + 1)


def test_a_slot_for_the_grouped_matmul_is_filled() -> None:
    (x, offsets), experts = rows(), Experts(K, MixtureArgs(GROUPS, 2, M))
    with torch.no_grad():
        for param in experts.parameters():
            param.normal_(std=0.1)
    plain = experts(x, torch.ones(70), offsets)
    convert_moe_to_float8_training(experts)
    out = experts(x, torch.ones(70), offsets)
    assert type(experts) is Experts
    assert 20 < sqnr(plain, out) < 40


def test_the_experts_of_transformers() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = qwen.Qwen3MoeConfig(hidden_size=K, moe_intermediate_size=M, num_experts=GROUPS)
    config._experts_implementation = "grouped_mm"
    experts = qwen.Qwen3MoeExperts(config)
    with torch.no_grad():
        for param in experts.parameters():
            param.normal_(std=0.1)
    given = torch.randn(40, K), torch.randint(0, GROUPS, (40, 2)), torch.rand(40, 2)
    plain = experts(*given)
    assert 20 < sqnr(plain, convert_moe_to_float8_training(experts)(*given)) < 40


def test_nothing_is_called_converted_that_is_not() -> None:
    x, offsets = rows()
    looping = convert_moe_to_float8_training(Looping())
    with pytest.raises(RuntimeError, match=r"forward did not call torch\.nn\.functional\.grouped_mm"):
        looping(x, offsets)
    assert looping(x[:0], torch.zeros_like(offsets)).shape == (0, K)  # no rows, nothing to multiply
    experts = convert_moe_to_float8_training(Mine())
    with pytest.raises(ValueError, match="must be called as"):
        experts(x.expand(GROUPS, -1, -1), None)


def replaced() -> nn.Module:
    experts: Any = Mine()
    experts.forward = lambda *_: None
    return experts


@pytest.mark.parametrize(
    ("module", "why", "options"),
    [
        (nn.Linear(K, M), "no module has parameters of three dimensions", {}),
        (Mine(40), "features are not multiples of 16", {}),
        (nn.Conv1d(32, 32, 32), "is a Conv1d", {}),
        (Mine().to(torch.float8_e4m3fn), "not a high-precision dtype", {}),
        (replaced(), "replaced on the instance", {}),
        (Mine(), "left out by module_filter_fn", {"module_filter_fn": lambda *_: False}),
        (Mine(), "use rowwise", {"config": Float8LinearConfig()}),
        (convert_moe_to_float8_training(Mine()), "converted already", {}),
        (convert_moe_to_float8_training(Experts(K, MixtureArgs(GROUPS, 2, M))), "converted already", {}),
    ],
)
def test_what_cannot_be_converted_is_refused(module: nn.Module, why: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"convert_moe_to_float8_training: .*{why}"):
        convert_moe_to_float8_training(module, **options)


def test_experts_that_are_sharded_already_are_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    try:
        x, offsets = rows()
        with pytest.raises(ValueError, match="before fully_shard"):
            convert_moe_to_float8_training(fully_shard(Mine()))
        experts = convert_moe_to_float8_training(Mine())
        out = experts(x, offsets)
        assert torch.equal(fully_shard(experts)(x, offsets), out)
    finally:
        torch.distributed.destroy_process_group()
