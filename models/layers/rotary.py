"""Rotary position embeddings (Su et al., "RoFormer", 2021).

Element i is paired with i + rotary_dim/2, as in Hugging Face's checkpoints, so that weights move to and from them
without a permutation. (Meta's own files pair 2i with 2i+1; the two differ by a permutation of the rows of wq and wk.)
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

    def scaled(self, freqs: Tensor, theta: float) -> Tensor:
        """Return the scaled frequencies."""
        wavelength = 2 * math.pi / freqs
        # Between the two wavelengths, interpolate linearly between the scaled and the unscaled frequency.
        smooth = self.original_max_seq_len / wavelength - self.low_freq_factor
        smooth = (smooth / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - smooth) * freqs / self.factor + smooth * freqs

    def amplitude(self) -> float:
        """Return the factor of cosines and sines."""
        return 1.0

    def score_factor(self) -> float:
        """Return the factor of the scores of latent attention."""
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's stretch of the rotary frequencies (Peng et al., "YaRN: Efficient Context Window Extension of Large
    Language Models", 2023).

    Attributes:
        beta_fast, beta_slow: pairs that make more rotations than ``beta_fast`` within ``original_max_seq_len`` keep
            their frequency, those that make fewer than ``beta_slow`` have it divided by ``factor``.
        attention_factor: the factor of cosines and sines; None: 0.1 ln(factor) + 1, as in the paper, or with both of
            the following the quotient of the two.
        mscale, mscale_all_dim: DeepSeek's factors in place of the paper's 1: of rotated features,
            0.1 mscale ln(factor) + 1, and of all features of queries and keys, 0.1 mscale_all_dim ln(factor) + 1.
    """

    factor: float = 4.0
    original_max_seq_len: int = 32768
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def scaled(self, freqs: Tensor, theta: float) -> Tensor:
        """Return the scaled frequencies."""
        pairs = len(freqs)
        first, last = self._pair(self.beta_fast, pairs, theta), self._pair(self.beta_slow, pairs, theta)
        low, high = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
        width = high - low or 0.001  # no division by 0
        ramp = ((torch.arange(pairs, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
        return freqs / self.factor * ramp + freqs * (1 - ramp)

    def _pair(self, rotations: float, pairs: int, theta: float) -> float:
        """Return the number of the pair that makes so many rotations within the original sequence length."""
        return pairs * math.log(self.original_max_seq_len / (rotations * 2 * math.pi)) / math.log(theta)

    def amplitude(self) -> float:
        """Return the factor of cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    def score_factor(self) -> float:
        """Return the factor of the scores of latent attention (DeepSeek-V2, 2024)."""
        return self._grown(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _grown(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def rope_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | YarnScaling | None) -> Tensor:
    """Return the rotation per position of each pair, in radians; float32 [rotary_dim / 2]."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    freqs = 1.0 / theta**exponent
    return freqs if scaling is None else scaling.scaled(freqs, theta)


def rope_table(seq_len: int, rotary_dim: int, theta: float, scaling: RopeScaling | YarnScaling | None = None) -> Tensor:
    """Return the cosines and sines of every position; float32 [2, seq_len, rotary_dim]."""
    freqs = rope_frequencies(rotary_dim, theta, scaling)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device="cpu"), freqs)
    angles = torch.cat((angles, angles), dim=-1)
    table = torch.stack((angles.cos(), angles.sin()))
    return table if scaling is None else table * scaling.amplitude()


def apply_rope(x: Tensor, rope: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate ``x`` [batch, seq_len, heads, head_dim] by ``rope`` [2, seq_len, rotary_dim] or [2, batch, seq_len,
    rotary_dim], computed in float32. The features of a head from ``rotary_dim`` on stay as they are.

    Args:
        interleaved: element 2i is paired with 2i + 1, as in the files of DeepSeek.
    """
    rotary_dim = rope.shape[-1]
    half = rotary_dim // 2
    cos, sin = rope[..., None, :half].unbind()  # the two features of a pair have the same angle
    paired = x[..., :rotary_dim].unflatten(-1, (half, 2) if interleaved else (2, half))
    pair = -1 if interleaved else -2
    x1, x2 = (part.float() for part in paired.unbind(pair))
    # No rotate_half(x): with it, a compiled kernel reads x twice.
    pairs = ((x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype))
    rotated = torch.stack(pairs, dim=pair).flatten(-2)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
