"""Rotary position embeddings (Su et al., "RoFormer", 2021).

Element i is paired with i + head_dim/2, as in Hugging Face's checkpoints, so that weights move to and from them without
a permutation. (Meta's own files pair 2i with 2i+1; the two differ by a permutation of the rows of wq and wk.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies for long contexts (Llama 3.1 model card, ``rope_scaling``)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return the rotation per position of each pair, in radians; float32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    freqs = 1.0 / theta**exponent
    if scaling is None:
        return freqs
    s, wavelength = scaling, 2 * math.pi / freqs
    # Between the two wavelengths, interpolate linearly between the scaled and the unscaled frequency.
    smooth = (s.original_max_seq_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * freqs / s.factor + smooth * freqs


def rope_table(seq_len: int, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Return the cosines and sines of every position; float32 [2, seq_len, head_dim]."""
    freqs = rope_frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device="cpu"), freqs)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate ``x`` [batch, seq_len, heads, head_dim] by ``rope`` [2, seq_len, head_dim], computed in float32."""
    cos, sin = rope[:, None, :, None].unbind()
    xf = x.float()
    x1, x2 = xf.chunk(2, dim=-1)
    return (xf * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)
