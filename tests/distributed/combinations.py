"""The combinations that the tests of parallelism prove: what each is, and what it is tried with.

docs/internals/parallelism.md has a table of them, made from here by scripts/benchmarks/tables.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

BATCH, SEQ_LEN = 8, 32

SCHEDULES = ["1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble"]
if torch.__version__ < "2.13":
    SCHEDULES.remove("ZBVZeroBubble")  # refused there on the CPU
# Run the backward of a block in two halves.
SPLIT_BACKWARD = ["PP 2 InterleavedZeroBubble", "PP 2 ZBVZeroBubble", "PP 2 CSV"]


@dataclass(frozen=True)
class Way:
    """A way to spread the model over ``shard * replicate * cp * tp * pp`` processes, of the same global batch."""

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        return self.replicate * self.shard * self.cp * self.tp * self.pp

    def all_options(self) -> dict[str, Any]:
        return {
            "parallelism.data_parallel_replicate_degree": self.replicate,
            "parallelism.data_parallel_shard_degree": self.shard,
            "parallelism.context_parallel_degree": self.cp,
            "parallelism.tensor_parallel_degree": self.tp,
            "parallelism.pipeline_parallel_degree": self.pp,
            "training.local_batch_size": BATCH // (self.replicate * self.shard),
            **self.options,
        }


def _pipeline(schedule: str = "1F1B") -> dict[str, Any]:
    """Cut so that every stage has a layer, of the models that the tests use: the smallest one's output projection would
    be a stage by itself."""
    two_each = any(name in schedule for name in ("Interleaved", "Looped", "ZBV"))
    return {
        "parallelism.pipeline_parallel_schedule": schedule,
        "parallelism.pipeline_parallel_split_points": "layers.1,layers.2,layers.3" if two_each else "layers.2",
    }


_ALLTOALL = {"parallelism.context_parallel_rotate_method": "alltoall"}

WAYS = {
    "FSDP 2": Way(shard=2),
    "HSDP 2 x 2": Way(replicate=2, shard=2),
    "TP 2": Way(tp=2),
    "FSDP 2 x TP 2": Way(shard=2, tp=2),
    **{f"PP 2 {name}": Way(pp=2, options=_pipeline(name)) for name in SCHEDULES},
    "PP 2 CSV": Way(pp=2, options=_pipeline("PipelineScheduleMulti")),
    "CP 2 allgather": Way(cp=2),
    "CP 2 alltoall": Way(cp=2, options=_ALLTOALL),
    "FSDP 2 x CP 2": Way(shard=2, cp=2),
    "CP 2 x TP 2": Way(cp=2, tp=2, options=_ALLTOALL),
    "PP 2 x TP 2": Way(pp=2, tp=2, options=_pipeline()),
    "PP 2 x FSDP 2": Way(pp=2, shard=2, options=_pipeline("Interleaved1F1B")),
    "PP 2 x CP 2": Way(pp=2, cp=2, options=_pipeline()),
    "FSDP 2 x TP 2 x PP 2": Way(shard=2, tp=2, pp=2, options=_pipeline()),
}


def _experts(degree: int, **options: Any) -> dict[str, Any]:
    return {"parallelism.expert_parallel_degree": degree, **options}


# The ways of models with experts: expert parallelism borrows the processes of the other dimensions.
EXPERT_WAYS = {
    "EP 2": Way(shard=2, options=_experts(2)),
    "EP 4": Way(shard=4, options=_experts(4)),
    "FSDP 4, EP 2": Way(shard=4, options=_experts(2)),
    "HSDP 2 x 2, EP 2": Way(replicate=2, shard=2, options=_experts(2)),
    "TP 2": Way(tp=2),
    "TP 2, EP 2": Way(tp=2, options=_experts(2)),
    "FSDP 2 x TP 2, EP 2": Way(shard=2, tp=2, options=_experts(2)),
    "CP 2, EP 2": Way(cp=2, options=_experts(2)),
    "CP 2": Way(cp=2, options=_ALLTOALL),
    "CP 2 x TP 2, EP 4": Way(cp=2, tp=2, options=_experts(4)),
    "PP 2": Way(pp=2, options=_pipeline()),
    "PP 2 x FSDP 2, EP 2": Way(pp=2, shard=2, options=_experts(2, **_pipeline("Interleaved1F1B"))),
    "PP 2 x TP 2, EP 2": Way(pp=2, tp=2, options=_experts(2, **_pipeline())),
    "PP 2 x CP 2, EP 2": Way(pp=2, cp=2, options=_experts(2, **_pipeline())),
}
# The others have their mechanisms.
EXPERT_WAYS_LONG = (
    *("HSDP 2 x 2, EP 2", "TP 2", "TP 2, EP 2", "CP 2", "CP 2 x TP 2, EP 4", "PP 2"),
    *("PP 2 x TP 2, EP 2", "PP 2 x CP 2, EP 2"),
)

_FLOAT8 = {"training.mixed_precision_param": "bfloat16", "model.converters": "float8"}


def _recipe(name: str) -> dict[str, Any]:
    return {**_FLOAT8, "float8.recipe_name": name}


def _checkpointing(mode: str, option: str = "2") -> dict[str, Any]:
    return {"activation_checkpoint.mode": mode, "activation_checkpoint.selective_ac_option": option}


# The graphs, guards and cuts are the compiler's own; only the last step, code for the machine, is left out.
_COMPILE = {"training.compile": "true", "compile.backend": "aot_eager_decomp_partition"}

_MASKS = {"data.document_mask": "true"}
_CHUNKS = {"training.loss_chunks": 3}  # of different sizes

# What each way is tried with, beside float32: options on top of the way's own.
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"training.mixed_precision_param": "bfloat16"},
    "tensorwise": _recipe("tensorwise"),
    "rowwise": _recipe("rowwise"),
    "rowwise_with_gw_hp": _recipe("rowwise_with_gw_hp"),
    "float8 delayed": {
        **_FLOAT8,
        **{f"float8.scaling_type_{o}": "delayed" for o in ("input", "weight", "grad_output")},
    },
    "float8 all-gather": {
        **_FLOAT8,
        "float8.enable_fsdp_float8_all_gather": "true",
        "float8.precompute_float8_dynamic_scale_for_fsdp": "true",
    },
    "mxfp8": {
        "training.mixed_precision_param": "bfloat16",
        "model.converters": "mx",
        "mx.filter_fqns": "output,wk,wv",  # these two have less than a block of 32 on each rank
    },
    "mxfp8 all-gather": {
        "training.mixed_precision_param": "bfloat16",
        "model.converters": "mx",
        "mx.filter_fqns": "",
        "mx.enable_fsdp_mxfp8_all_gather": "true",
    },
    "mxfp8 all-gather, TP": {
        "training.mixed_precision_param": "bfloat16",
        "model.converters": "mx",
        "mx.filter_fqns": "output,wk,wv",
        "mx.enable_fsdp_mxfp8_all_gather": "true",
        "mx.enable_tensor_parallel_mxfp8_all_gather": "true",
    },
    "int8": {"training.mixed_precision_param": "bfloat16", "model.converters": "int8"},
    "int8 all-gather": {
        "training.mixed_precision_param": "bfloat16",
        "model.converters": "int8",
        "int8.filter_fqns": "",
        "int8.enable_fsdp_int8_all_gather": "true",
    },
    "int8 all-gather, TP": {
        "training.mixed_precision_param": "bfloat16",
        "model.converters": "int8",
        "int8.filter_fqns": "",
        "int8.enable_tensor_parallel_int8_all_gather": "true",
        "int8.enable_fsdp_int8_all_gather": "true",
    },
    "int8 weights": {
        "training.mixed_precision_param": "bfloat16",
        "model.converters": "int8",
        "int8.filter_fqns": "",
        "int8.recipe_name": "weights",
        "optimizer.implementation": "for-loop",
    },
    "AC full": _checkpointing("full"),
    "AC selective 2": _checkpointing("selective", "2"),
    "AC selective op": _checkpointing("selective", "op"),
    "document masks": _MASKS,
    "loss chunks": _CHUNKS,
    "compile": _COMPILE,
    "compile, document masks": {**_COMPILE, **_MASKS},
    "compile, AC full": {**_COMPILE, **_checkpointing("full")},
    "compile, loss chunks": {**_COMPILE, **_CHUNKS},
    "compile, tensorwise, AC selective 2": {**_COMPILE, **_recipe("tensorwise"), **_checkpointing("selective", "2")},
    "compile, rowwise, AC selective op": {**_COMPILE, **_recipe("rowwise"), **_checkpointing("selective", "op")},
}

# What models with experts are tried with.
EXPERT_VARIANTS: dict[str, dict[str, Any]] = {
    **{name: VARIANTS[name] for name in ("AC full", "AC selective op", "compile", "compile, AC full")},
    "compile, rowwise experts, AC selective op": {
        **VARIANTS["compile, rowwise, AC selective op"],
        "float8.moe_fqns": "experts",
    },
    "compile, inductor": {"training.compile": "true"},  # to the code for the machine
    # Experts in number formats.
    "rowwise experts": {**VARIANTS["rowwise"], "float8.moe_fqns": "experts"},
    "mxfp8 experts": {**VARIANTS["mxfp8"], "mx.moe_fqns": "experts"},
    # Balance losses of the tokens of a microbatch, on one data-parallel process or on all.
    **{f"balance over {over}": {"experts.balance_loss_over": over} for over in ("batch", "global_batch")},
}


# What each way is tried with, and with which ways that is not left to scripts/test.sh --long: in eager mode, and with
# those that compute with DTensors, or repeat or keep collectives of other dimensions.
EXPERT_PAIRS: dict[str, tuple[str, ...]] = {
    "AC full": ("CP 2, EP 2",),
    "AC selective op": ("FSDP 2 x TP 2, EP 2",),
    "compile": (),
}


# Of EP 2: those whose parts others have.
EXPERT_VARIANTS_LONG = (
    *("AC full", "compile", "compile, AC full", "compile, inductor"),
    "compile, rowwise experts, AC selective op",
)


def expert_cell(way: str, variant: str = "") -> str:
    """Return "yes" if the tests try a model with experts in this combination, "(yes)" if scripts/test.sh
    --long does, and "" if none does."""
    if not variant:
        return "(yes)" if way in EXPERT_WAYS_LONG else "yes"
    if way == "EP 2":
        return "(yes)" if variant in EXPERT_VARIANTS_LONG else "yes"
    if variant not in EXPERT_PAIRS:
        return ""
    return "yes" if way in EXPERT_PAIRS[variant] else "(yes)"


# The ways whose mechanism a variant touches, with which the tests try it; every other pair that composes is run by
# scripts/test.sh --long. A way that combines dimensions stands for each of them.
TOUCHED: dict[str, list[str]] = {
    "bfloat16": ["CP 2 alltoall", "HSDP 2 x 2", "PP 2 1F1B"],
    "tensorwise": ["FSDP 2 x TP 2"],  # a scale of each shard
    "rowwise": ["TP 2", "PP 2 ZBVZeroBubble"],  # gathers in float8; the backward in two halves
    "rowwise_with_gw_hp": ["TP 2"],  # gathers in high precision
    "float8 delayed": ["FSDP 2"],  # amaxes agreed by the ranks that hold a layer
    "float8 all-gather": ["HSDP 2 x 2", "FSDP 2 x TP 2"],
    "mxfp8": ["TP 2"],
    "mxfp8 all-gather": ["FSDP 2"],
    "mxfp8 all-gather, TP": ["FSDP 2 x TP 2"],
    "int8": ["PP 2 1F1B", "TP 2"],
    "int8 all-gather": ["FSDP 2"],
    "int8 all-gather, TP": ["FSDP 2 x TP 2"],
    "int8 weights": ["FSDP 2 x TP 2"],  # scales of rows that two ranks have
    "AC full": ["TP 2", "CP 2 alltoall", "PP 2 ZBVZeroBubble"],  # collectives are repeated; so is recomputation
    "AC selective 2": ["PP 2 InterleavedZeroBubble"],  # counts blocks of the whole model
    "AC selective op": ["TP 2", "CP 2 alltoall"],  # keeps results of collectives, and of attention
    "document masks": ["TP 2", "PP 2 ZBVZeroBubble"],  # the documents of each microbatch
    "compile, document masks": ["TP 2"],
    "loss chunks": ["PP 2 ZBVZeroBubble", "FSDP 2 x TP 2"],
    "compile": ["FSDP 2", "TP 2", "CP 2 alltoall", "PP 2 InterleavedZeroBubble"],
    "compile, AC full": ["TP 2"],  # compiled before it is checkpointed
    "compile, loss chunks": ["FSDP 2 x TP 2"],  # compiled blocks under both
    "compile, tensorwise, AC selective 2": ["FSDP 2"],
    "compile, rowwise, AC selective op": ["TP 2"],
}
# Schedules and rotations differ from each other as on the smallest model.
DEBUG_WAYS = ["FSDP 2", "TP 2", "CP 2 alltoall", "PP 2 1F1B", "FSDP 2 x TP 2"]


def composes(way: str, variant: str) -> bool:
    """Whether a variant is one that this way can be combined with; the others are refused."""
    options = {**VARIANTS[variant], **WAYS[way].all_options()}
    per_op = options.get("activation_checkpoint.selective_ac_option") == "op"
    if WAYS[way].cp > 1 and "data.document_mask" in options:
        return False
    if WAYS[way].tp == 1 and any("enable_tensor_parallel" in option for option in options):
        return False
    if WAYS[way].tp > 1 and variant == "mxfp8 all-gather":
        return False  # wk and wv have less than a block of 32 on each rank
    later_torch = any(key in options for key in ("training.compile", "model.converters", "training.loss_chunks"))
    compiled = "training.compile" in options
    if way not in SPLIT_BACKWARD:
        return True
    return not (per_op and not compiled) and (torch.__version__ >= "2.13" or not later_torch)


def tried(way: str, variant: str) -> bool:
    """Whether the tests try this combination without being asked for every one."""
    return composes(way, variant) and way in TOUCHED[variant]


def cases(variants: list[str]) -> list[tuple[str, str]]:
    """The combinations that compose, as (way, variant)."""
    return [(way, variant) for variant in variants for way in WAYS if composes(way, variant)]
