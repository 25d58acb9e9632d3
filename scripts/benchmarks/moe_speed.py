"""The trainer's step of the debug mixture of experts against a plain PyTorch loop over transformers' Qwen3-MoE, in
turn, in one process.

    python scripts/benchmarks/moe_speed.py --output docs/benchmarks/moe_speed.json

It is cpu_step.py with experts: the same shape, weights, batches, AdamW, learning rates and clipping, without balance
loss. transformers computes its experts by its own grouped matmuls (experts_implementation = "grouped_mm"), or with
--experts=eager by its loop; its graph may break there. It is timed twice: with float32 weights under autocast, which
does not reach its grouped matmuls, and with the whole model in bfloat16, which also updates bfloat16 weights, where
titanlite has float32 ones. Options of the trainer may follow.
"""

from __future__ import annotations

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import cpu_step
import torch
import transformers
from torch import Tensor, nn

from titanlite.data import Batch
from titanlite.models.weight_map import Stack
from titanlite.train import Trainer

MODEL = ("--model.name=qwen3_moe", "--experts.balance_loss=0")


class ExpertsLoop(cpu_step.PlainLoop):
    """:class:`cpu_step.PlainLoop` over a model with experts."""

    fullgraph = False
    implementation = "grouped_mm"

    def same_model(self, trainer: Trainer) -> nn.Module:
        """``transformers``' model of the trainer's shape, with its weights: gate and up are one parameter there."""
        (ours,), hugging_face = trainer.model_parts, trainer.spec.hugging_face
        assert hugging_face is not None
        config = transformers.Qwen3MoeConfig(**hugging_face.to_config(trainer.model_args))
        config._attn_implementation, config._experts_implementation = "sdpa", self.implementation
        model: nn.Module = transformers.Qwen3MoeForCausalLM(config)
        places = hugging_face.weights(trainer.model_args)
        weights: dict[str, Tensor] = {}
        experts: dict[str, dict[str, Tensor]] = {}
        for name, param in ours.named_parameters():
            place, value = places[name], param.full_tensor().detach()  # type: ignore[attr-defined]
            if isinstance(place, Stack):
                folder, _, rest = place.tensors[0].partition(".experts.0.")
                experts.setdefault(f"{folder}.experts", {})[rest.removesuffix(".weight")] = value
            else:
                weights[str(place)] = value
        for name, parts in experts.items():
            weights[f"{name}.gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), 1)
            weights[f"{name}.down_proj"] = parts["down_proj"]
        model.load_state_dict(weights)
        return model.train()


class BFloat16Loop(ExpertsLoop):
    """The same with the whole model in bfloat16."""

    weights = "bfloat16"

    def __init__(self, trainer: Trainer, batches: list[Batch], autocast: bool) -> None:
        super().__init__(trainer, batches, autocast=False)

    def same_model(self, trainer: Trainer) -> nn.Module:
        return super().same_model(trainer).bfloat16()


if __name__ == "__main__":
    if "--experts=eager" in sys.argv:
        sys.argv.remove("--experts=eager")
        ExpertsLoop.implementation = "eager"
    sys.exit(cpu_step.main("moe_speed", __doc__, [ExpertsLoop, BFloat16Loop], ["bf16"], MODEL))
