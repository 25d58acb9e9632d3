"""A worker: trains through bad steps, and reports what each of its runs did.

Cases are {name: {"options": {option: value}, "bad": {step: kind}, "rank": the only one that is bad, or None for all,
"window": losses before the first step}}. Kinds: nan, inf or spike, the factor of the loss; gradients, one of which is
infinite; or omitted, as if the step's update had never been asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.parallel import share_meshes
from titanlite import train
from titanlite.config import load_config
from titanlite.errors import TrainingError
from titanlite.models.layers import DecoderArgs
from titanlite.models.llama3.spec import FLAVORS
from titanlite.train import Trainer

FACTORS = {"nan": float("nan"), "inf": float("inf"), "spike": 50.0}

build_loss = train.build_loss


class Waits(TorchDispatchMode):
    """Counts the times that the host asks for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Run:
    def __init__(self, folder: Path, case: dict[str, Any]) -> None:
        self.bad = {int(step): fault for step, fault in case["bad"].items()}
        self.only = case["rank"]
        train.build_loss = lambda *args: self.poisoned(build_loss(*args))
        options = {**case["options"], "job.dump_folder": folder}
        self.trainer = Trainer(load_config([f"--{key}={value}" for key, value in options.items()]))
        self.parameters = self.trainer.parameters()
        runner = self.trainer.runner
        runner.forward_backward = self.spoiled(runner.forward_backward)  # type: ignore[method-assign]
        self.messages = Messages()
        logging.getLogger().addHandler(self.messages)
        if case["window"]:
            state = {"losses": case["window"], "skipped": 0, "in_a_row": 0}
            self.trainer.step_guard.load_state_dict(state)

    def how(self) -> str:
        """What is to go wrong on this rank in the step under way."""
        here = self.only is None or self.trainer.runtime.rank == self.only
        return self.bad.get(self.trainer.step, "") if here else ""

    def poisoned(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda logits, labels: loss_fn(logits, labels) * FACTORS.get(self.how(), 1.0)

    def spoiled(self, forward_backward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(batch: Any) -> Any:
            loss = forward_backward(batch)
            grad = self.parameters[0].grad
            if self.how() == "gradients" and grad is not None:
                local(grad).view(-1)[-1] = float("inf")
            if self.how() == "omitted":
                self.trainer.step_guard.step = self.omit  # type: ignore[method-assign]
            return loss

        return run

    def omit(self, optimizer: torch.optim.Optimizer, *values: Tensor) -> Tensor:
        del self.trainer.step_guard.step  # type: ignore[method-assign]
        return self.trainer.step_guard.judge(*values[:3], values[4])  # the fourth is the divisor of the gradients

    def digest(self) -> str:
        """Of every bit of the parameters and of the optimizer's state."""
        hasher = hashlib.sha256()
        state = self.trainer.optimizer.state
        for param in self.parameters:
            for tensor in (param, *(state[param][key] for key in sorted(state[param]))):
                hasher.update(local(tensor.detach()).contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def go(self) -> dict[str, Any]:
        error, digests, waited = None, [], []
        train_step = self.trainer.train_step

        def counted() -> Any:
            with Waits() as waits:
                result = train_step()
            waited.append(waits.count)
            return result

        self.trainer.train_step = counted  # type: ignore[method-assign]
        try:
            for _ in range(self.trainer.config.training.steps):
                self.trainer.advance()
                digests.append(self.digest())
        except TrainingError as e:
            error = str(e)
        state = self.trainer.step_guard.state_dict()
        self.trainer._log_summary()
        self.trainer.close()
        return {"digests": digests, "waits": waited, "said": self.messages.said, "error": error, "state": state}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def report(cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What each case did, on this rank."""
    FLAVORS["tiny"] = DecoderArgs(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=64, vocab_size=0)
    share_meshes()
    reports = {}
    for name, case in cases.items():
        run_folder = folder / name.replace(" ", "_")
        reports[name] = Run(run_folder, case).go()
        dist.barrier()
        lines = (run_folder / "metrics.jsonl").read_text().splitlines()
        reports[name]["rows"] = [json.loads(line) for line in lines]
    dist.destroy_process_group()
    return reports
