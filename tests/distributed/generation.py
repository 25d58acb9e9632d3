"""A worker: generates with the model whole, and spread over two processes; reports the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from titanlite.config import load_config
from titanlite.config.parallelism import Degrees
from titanlite.config.schema import Comm
from titanlite.distributed import runtime
from titanlite.distributed.data_parallel import allocate
from titanlite.distributed.init import WeightInit
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.inference.generate import generate
from titanlite.inference.sampling import Sampling, TokenSampler
from titanlite.models.layers import Decoder, DecoderArgs
from titanlite.models.llama3.spec import FLAVORS
from titanlite.models.spec import get_model_spec
from titanlite.training.build import build_model

TINY = DecoderArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=128, max_seq_len=40)
VOCAB_SIZE = 100  # in tensor parallelism the second process has few of them
PROMPT = [1, 2, 3]  # sequence parallelism divides neither this nor a single token
SAMPLINGS = {"greedy": Sampling(temperature=0), "drawn": Sampling(0.9, top_k=50, top_p=0.95, seed=3)}

CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"parallelism.data_parallel_shard_degree": 2},
    "fsdp, always resharded": {
        "parallelism.data_parallel_shard_degree": 2,
        "parallelism.fsdp_reshard_after_forward": "always",
    },
    "hsdp": {"parallelism.data_parallel_replicate_degree": 2},
    "fsdp, compiled and checkpointed": {
        "parallelism.data_parallel_shard_degree": 2,
        "training.compile": "true",
        "compile.backend": "eager",
        "activation_checkpoint.mode": "full",
    },
    "tp": {"parallelism.tensor_parallel_degree": 2},
    "tp, whole logits": {"parallelism.tensor_parallel_degree": 2, "parallelism.disable_loss_parallel": "true"},
    "tp, compiled and checkpointed": {
        "parallelism.tensor_parallel_degree": 2,
        "training.compile": "true",
        "compile.backend": "eager",
        "activation_checkpoint.mode": "full",
    },
    "tp in float8": {
        "parallelism.tensor_parallel_degree": 2,
        "model.converters": "float8",
        "float8.filter_fqns": "output",
        "float8.emulate": "true",
    },
}
FLOAT32 = {
    "model.flavor": "tiny",
    "training.seq_len": 40,
    "training.mixed_precision_param": "float32",
    "activation_checkpoint.mode": "none",
}


def texts(decoder: TokenSampler) -> dict[str, list[int]]:
    token_ids = {name: generate(decoder, PROMPT, 12, sampling).ids for name, sampling in SAMPLINGS.items()}
    return token_ids | {"uncached": generate(decoder, PROMPT, 12, SAMPLINGS["drawn"], cached=False).ids}


def whole(device: torch.device) -> dict[str, list[int]]:
    model = Decoder(TINY)
    model.init_weights(WeightInit(model, seed=0))
    return texts(TokenSampler(model, device, 40, VOCAB_SIZE))


def spread(options: dict[str, Any], mesh: Mesh, here: runtime.Runtime) -> dict[str, Any]:
    config = load_config([f"--{key}={value}" for key, value in {**FLOAT32, **options}.items()])
    (model,) = build_model(get_model_spec("llama3"), TINY, config, mesh).parts
    allocate(model, here.device, False)
    model.init_weights(WeightInit(model, seed=0))  # type: ignore[operator]
    model.train()
    sharded_logits = not config.parallelism.disable_loss_parallel
    decoder = TokenSampler(model, here.device, 40, VOCAB_SIZE, mesh.tp, sharded_logits, here.control)
    before = step(model)
    compiled = counters["stats"]["unique_graphs"]
    token_ids = texts(decoder)
    report = {
        "texts": token_ids,
        "sharded": all(isinstance(param, DTensor) for param in model.parameters()),
        "training": all(module.training for module in model.modules()),
        "same step": step(model) == before,
    }
    return report | {"compiled again": counters["stats"]["unique_graphs"] - compiled}


def step(model: nn.Module) -> float:
    """A forward and backward as in training; returns what stays the same for as long as the weights do."""
    model.zero_grad()
    out = model(torch.arange(16).view(2, 8)).float().square().mean()
    out.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return float(out.detach()) + sum(float(g.abs().sum()) for g in local)


def report() -> dict[str, Any]:
    FLAVORS["tiny"] = TINY  # here only: the tests import this module, too
    here = runtime.start_runtime(Comm())
    results: dict[str, Any] = {"whole": whole(here.device)}
    meshes: dict[Degrees, Mesh] = {}
    for name, options in CASES.items():
        replicate = options.get("parallelism.data_parallel_replicate_degree", 1)
        shard = options.get("parallelism.data_parallel_shard_degree", 1)
        degrees = Degrees(replicate, shard, 1, options.get("parallelism.tensor_parallel_degree", 1), 1)
        if degrees not in meshes:
            meshes[degrees] = build_mesh(degrees, here.device.type)
        results[name] = spread(options, meshes[degrees], here)
        torch._dynamo.reset()
    runtime.stop_runtime()
    return results
