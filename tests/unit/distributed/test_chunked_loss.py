"""The loss in chunks of the vocabulary, on one process: against one pass and float64; under tensor parallelism and
pipelines it is tested in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import titanlite.plan.compiled_memory  # noqa: F401  # registers a backend
from tests.support.runs import run_trainer
from titanlite.config import JobConfig, load_config
from titanlite.config.parallelism import Degrees
from titanlite.config.schema import Comm, Compile
from titanlite.data import Batch
from titanlite.distributed import runtime
from titanlite.distributed.chunked_loss import ChunkedCrossEntropy, compute_loss_in_chunks
from titanlite.distributed.data_parallel import allocate
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.parallelize import parallelize
from titanlite.errors import ConfigError
from titanlite.models.layers import LAYOUT, Decoder, DecoderArgs
from titanlite.optim import IGNORED, cross_entropy_loss
from titanlite.plan.memory import MemoryTracker
from titanlite.training.step import StepRunner

WORDS, DIM = 200, 32
Gradients = tuple[Tensor, Tensor, Tensor]  # the loss, and the gradients of the hidden states and of the weight


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    here = runtime.start_runtime(Comm())
    yield build_mesh(Degrees(1, 1, 1, 1, 1), here.device.type)
    dist.destroy_process_group()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_pass(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_loss(hidden @ weight.t(), labels)


def float64_pass(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")


def gradients(loss_fn: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Gradients:
    """Gradients of the mean over all labels, as in a step."""
    hidden, weight = (t.clone().to(dtype).requires_grad_() for t in (hidden, weight))
    loss = loss_fn(hidden, weight, labels)
    (loss / labels.numel()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    return loss.detach(), hidden.grad, weight.grad


def error(computed: Gradients, exact: Gradients) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(computed, exact)]


def labels_scored(share: float) -> Tensor:
    """Labels of which this share is scored: all of the first words, that are in one chunk, and some of the others."""
    labels = torch.randint(WORDS, (3, 40), generator=torch.Generator().manual_seed(1))
    kept = (random(3, 40, seed=2).sigmoid() < share) | (labels < 16)
    return labels.where(kept, IGNORED)


@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 25])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_losses_and_gradients_are_those_of_one_pass(mesh: Mesh, chunks: int, share: float) -> None:
    given = 3 * random(3, 40, DIM), random(WORDS, DIM, seed=3), labels_scored(share)
    chunked = ChunkedCrossEntropy(chunks, mesh.tp, False, None)
    assert len([*chunked.parts(given[1])]) == chunks
    exact = gradients(float64_pass, *given, torch.float64)
    computed, whole = (gradients(loss_fn, *given, torch.float32) for loss_fn in (chunked, one_pass))
    assert max(error(computed, exact)) < 1e-6
    for ours, theirs in zip(computed, whole):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    # In bfloat16, each chunk adds a rounding to the gradient of the hidden states, and none to that of the weight.
    rounded = tuple(t.bfloat16() if t.is_floating_point() else t for t in given)
    exact = gradients(float64_pass, *rounded, torch.float64)
    computed, whole = (error(gradients(f, *rounded, torch.bfloat16), exact) for f in (chunked, one_pass))
    assert computed[0] < 1.02 * whole[0] + 1e-6
    assert computed[1] < 1.1 * whole[1]
    assert computed[2] < 1.02 * whole[2]


def test_no_label_is_scored(mesh: Mesh) -> None:
    labels = torch.full((2, 4), IGNORED)
    chunked = ChunkedCrossEntropy(3, mesh.tp, False, None)
    assert all((t == 0).all() for t in gradients(chunked, random(2, 4, DIM), random(WORDS, DIM), labels, torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(mesh: Mesh, value: float) -> None:
    hidden, labels = random(1, 4, DIM), torch.tensor([[0, 20, 40, 63]])
    hidden[0, 1, 2] = value
    assert not ChunkedCrossEntropy(3, mesh.tp, False, None)(hidden, random(WORDS, DIM), labels).isfinite()


def test_a_label_out_of_the_vocabulary_has_no_finite_loss(mesh: Mesh) -> None:
    chunked = ChunkedCrossEntropy(3, mesh.tp, False, None)
    for label in (WORDS, -1):
        assert not chunked(random(1, 1, DIM), random(WORDS, DIM), torch.tensor([[label]])).isfinite()


def test_large_logits_do_not_overflow(mesh: Mesh) -> None:
    hidden, weight = random(1, 8, DIM).sign(), 1e3 * random(WORDS, DIM)
    labels = (hidden @ weight.t()).argmax(-1)
    computed = gradients(ChunkedCrossEntropy(3, mesh.tp, False, None), hidden, weight, labels, torch.float32)
    assert all(t.isfinite().all() for t in computed)


def test_there_is_no_second_derivative(mesh: Mesh) -> None:
    hidden = random(1, 4, DIM).requires_grad_()
    loss = ChunkedCrossEntropy(3, mesh.tp, False, None)(
        hidden, random(WORDS, DIM).requires_grad_(), torch.zeros(1, 4).long()
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("compiling", [None, Compile(backend="titanlite_memory")], ids=["eager", "compiled"])
def test_logits_of_one_chunk_exist_at_a_time(mesh: Mesh, compiling: Compile | None) -> None:
    """Beside the gradients, and the sum of those of the hidden states in float32."""
    tokens, words, dim, chunks = 512, 4096, 64, 8
    loss_fn = ChunkedCrossEntropy(chunks, mesh.tp, False, compiling)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        given = torch.empty(1, tokens, dim, dtype=torch.bfloat16), torch.empty(words, dim, dtype=torch.bfloat16)
        hidden, weight = (t.requires_grad_() for t in given)
        labels, before = torch.empty(1, tokens, dtype=torch.int64), tracker.live
        loss_fn(hidden, weight, labels).backward()
        taken = tracker.peak - before
    logits, others = tokens * words // chunks, 2 * dim * (words + 4 * tokens) + 32 * tokens
    per_logit = 2 + 2 if compiling else 2 + 4 + 2 + 1  # and its gradient; in eager mode in float32 too, and a mask
    assert 0.9 * per_logit * logits < taken < per_logit * logits + others


# ---- in a model


def config_of(*options: str) -> JobConfig:
    given = "--training.mixed_precision_param=float32", "--training.seq_len=32", "--activation_checkpoint.mode=none"
    return load_config([*given, *options])


def runner(mesh: Mesh, config: JobConfig, tied: bool) -> StepRunner:
    args = DecoderArgs(DIM, 2, 4, 2, 64, vocab_size=WORDS, max_seq_len=32, tie_embeddings=tied)
    with torch.device("meta"):
        model = Decoder(args)
    chunked = config.training.loss_chunks > 1
    if chunked:
        compute_loss_in_chunks(model, LAYOUT, mesh, config)
    parallelize(model, LAYOUT, mesh, config)
    allocate(model, torch.device("cpu"), False)
    model.init_weights(WeightInit(model, 0))
    return StepRunner([model], None if chunked else cross_entropy_loss, None, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, []),
        (True, []),
        (False, ["--parallelism.fsdp_reshard_after_forward=always"]),
        (True, ["--parallelism.fsdp_reshard_after_forward=always", "--activation_checkpoint.mode=full"]),
    ],
)
def test_a_step_of_a_model_is_that_of_one_pass(mesh: Mesh, tied: bool, options: list[str]) -> None:
    """Over microbatches whose shares of scored labels differ."""
    labels = torch.stack([labels_scored(share)[:, :32] for share in (1.0, 0.05, 0.4)])
    batch = Batch(labels.clamp(min=0).roll(1, -1), labels)
    one, chunked = (runner(mesh, config_of(*options, f"--training.loss_chunks={n}"), tied) for n in (1, 5))
    steps = [r.forward_backward(batch) for r in (one, chunked)]
    assert steps[1].total.item() == pytest.approx(steps[0].total.item(), rel=1e-6)
    ours, theirs = ([*r.parts[0].named_parameters()] for r in (chunked, one))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, a), (_, b) in zip(ours, theirs):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad.full_tensor(), rtol=1e-5, atol=1e-7, msg=name)  # type: ignore[union-attr]
    assert chunked.evaluate(batch).total.item() == pytest.approx(steps[0].total.item(), rel=1e-6)
    tokens = batch.inputs[0]
    with torch.no_grad():
        assert torch.equal(chunked.parts[0](tokens), one.parts[0](tokens))  # without labels, logits


class WithoutLabels(Decoder):
    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return super().forward(x, positions)


def biased(model: Decoder) -> Decoder:
    model.output = nn.Linear(DIM, WORDS)
    return model


class OfMyOwn(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def capped(model: Decoder) -> Decoder:
    model.output = OfMyOwn(DIM, WORDS, bias=False)
    return model


@pytest.mark.parametrize(
    ("build", "chunks", "words"),
    [
        (WithoutLabels, 2, "WithoutLabels takes no labels"),
        (lambda args: biased(Decoder(args)), 2, "has a bias"),
        (lambda args: capped(Decoder(args)), 2, "is a OfMyOwn with a forward of its own"),
        (Decoder, 26, "use at most 25"),
    ],
)
def test_what_cannot_be_exact_is_refused(mesh: Mesh, build: Any, chunks: int, words: str) -> None:
    model = build(DecoderArgs(DIM, 1, 4, 2, 64, vocab_size=WORDS))
    with pytest.raises(ConfigError, match=words) as refused:
        compute_loss_in_chunks(model, LAYOUT, mesh, config_of(f"--training.loss_chunks={chunks}"))
    assert (refused.value.key, refused.value.value) == ("training.loss_chunks", chunks)


@pytest.mark.slow
def test_a_run_in_chunks_logs_the_losses_of_one_pass(tmp_path: Path) -> None:
    """With float8, validation and a sample; a projection in float8 is refused."""
    options: dict[str, Any] = {
        "model__converters": "float8",
        "float8__filter_fqns": "output",
        "validation__enable": "true",
        "validation__steps": 1,
        "training__steps": 2,
        "training__loss_chunks": 4,
    }
    run = partial(run_trainer, training__mixed_precision_param="float32")
    runs = []
    for name, given in ONE_AND_CHUNKED.items():
        (tmp_path / name).mkdir()
        runs.append(run(tmp_path / name, **{**options, **given}))
    one, chunked = runs
    assert one.status == chunked.status == 0, chunked.output
    assert "in 4 chunks of the vocabulary" in chunked.output
    # Another order of a sum can be another number in float8, after the first update.
    for ours, theirs, bound in zip(chunked.rows(), one.rows(), (1e-6, 1e-4), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=bound)
    refused = run(tmp_path, **{**options, "float8__filter_fqns": "wk"})
    assert refused.status == 2
    assert "training.loss_chunks = 4" in refused.output
    assert "float8.filter_fqns" in refused.output


ONE_AND_CHUNKED: dict[str, dict[str, Any]] = {"one": {"training__loss_chunks": 1}, "chunked": {}}
