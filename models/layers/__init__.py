"""The layers that all families share. They import torch and each other."""

from titanlite.models.layers.attention import Attention, AttentionSlot, Core, causal_attention, document_mask, visible
from titanlite.models.layers.decoder import LATENT_LAYOUT, LAYOUT, Block, Decoder, DecoderArgs
from titanlite.models.layers.feed_forward import FeedForward, swiglu
from titanlite.models.layers.grouped_mm import GROUPED_MATMULS, grouped_mm
from titanlite.models.layers.init import Init
from titanlite.models.layers.latent_attention import LatentArgs, LatentAttention
from titanlite.models.layers.layout import Layout, Projections
from titanlite.models.layers.mixture import BalanceLoss, Experts, Mixture, MixtureArgs
from titanlite.models.layers.rotary import RopeScaling, YarnScaling, apply_rope, rope_frequencies, rope_table
from titanlite.models.layers.size import ModelSize

__all__ = [
    "GROUPED_MATMULS",
    "LATENT_LAYOUT",
    "LAYOUT",
    "Attention",
    "AttentionSlot",
    "BalanceLoss",
    "Block",
    "Core",
    "Decoder",
    "DecoderArgs",
    "Experts",
    "FeedForward",
    "Init",
    "LatentArgs",
    "LatentAttention",
    "Layout",
    "Mixture",
    "MixtureArgs",
    "ModelSize",
    "Projections",
    "RopeScaling",
    "YarnScaling",
    "apply_rope",
    "causal_attention",
    "document_mask",
    "grouped_mm",
    "rope_frequencies",
    "rope_table",
    "swiglu",
    "visible",
]
