"""The shared decoder and Llama 3's sizes; test_families.py compares the decoder with transformers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from titanlite.distributed.init import WeightInit
from titanlite.errors import ConfigError
from titanlite.models.layers import Decoder, DecoderArgs, RopeScaling, causal_attention
from titanlite.models.llama3.spec import FLAVORS
from titanlite.models.spec import get_model_spec

SMALL = DecoderArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=8, ffn_dim=96, vocab_size=128, max_seq_len=64)
GQA = replace(SMALL, n_kv_heads=2)
# The scaling's blend needs wavelengths on both sides of original_max_seq_len: a short one brings them within 64.
SCALED = replace(GQA, rope_scaling=RopeScaling(factor=8.0, original_max_seq_len=32))
TIED = replace(SCALED, tie_embeddings=True)


def build(args: DecoderArgs, seed: int = 0) -> Decoder:
    model = Decoder(args)
    model.init_weights(WeightInit(model, seed))
    return model


def test_a_token_sees_only_what_came_before_it() -> None:
    model = build(GQA)
    tokens = torch.randint(GQA.vocab_size, (1, 32), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % GQA.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


# The parameter counts that Meta and Hugging Face publish.
@pytest.mark.parametrize(
    ("flavor", "params"),
    [
        ("1B", 1_235_814_400),
        ("3B", 3_212_749_824),
        ("8B", 8_030_261_248),
        ("70B", 70_553_706_496),
        ("405B", 405_853_388_800),
    ],
)
def test_flavors_have_the_published_sizes(flavor: str, params: int) -> None:
    with torch.device("meta"):
        model = Decoder(FLAVORS[flavor])
    size = model.size()
    assert size.params == params
    assert size.heads * size.head_dim == FLAVORS[flavor].dim


def test_attention_compiles_for_any_number_of_heads() -> None:
    attend = torch.compile(causal_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for heads, kv_heads in ((4, 2), (8, 8), (6, 3)):
        q, k, v = (torch.randn(2, n, 16, 8) for n in (heads, kv_heads, kv_heads))
        torch.testing.assert_close(attend(q, k, v), causal_attention(q, k, v))


def test_debugmodel_takes_the_tokenizers_vocabulary() -> None:
    assert FLAVORS["debugmodel"].configured(2049, 16).vocab_size == 2176
    assert FLAVORS["8B"].configured(2049, 16).vocab_size == 128256
    with pytest.raises(ConfigError, match="128257 tokens, more than the 128256"):
        get_model_spec("llama3").configure(FLAVORS["8B"], 128257, 16)


def test_a_tied_model_begins_near_the_loss_of_a_guess() -> None:
    args = replace(SMALL, dim=256, n_heads=4, n_kv_heads=4, ffn_dim=768, vocab_size=4096, tie_embeddings=True)
    tokens = torch.randint(4096, (1, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(build(args)(tokens[:, :-1])[0], tokens[0, 1:])
    assert loss < 1.03 * math.log(4096)


def test_initial_weights_have_the_published_spread() -> None:
    args = replace(SMALL, dim=256, n_layers=2, ffn_dim=768, vocab_size=1024)
    model = build(args)
    depth = 2
    expected = {
        "tok_embeddings.weight": 1.0,
        "layers.1.attention.wq.weight": 0.02,
        "layers.1.attention.wo.weight": 0.02 / (2 * depth) ** 0.5,
        "layers.1.feed_forward.w1.weight": 0.02,
        "layers.1.feed_forward.w2.weight": 0.02 / (2 * depth) ** 0.5,
        "output.weight": 256**-0.5,
    }
    for name, std in expected.items():
        weight = model.get_parameter(name)
        cut = 1.0 if name.startswith("tok") else 0.9866  # a normal cut off at 3 standard deviations
        assert weight.std().item() == pytest.approx(std * cut, rel=0.02), name
        assert abs(weight.mean().item()) < 3 * std / weight.numel() ** 0.5, name
        assert cut == 1.0 or weight.abs().max() <= 3 * std
    assert all((p == 1).all() for n, p in model.named_parameters() if "norm" in n)
