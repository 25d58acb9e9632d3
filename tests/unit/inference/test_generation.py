"""Generation against forwards without a cache, and probabilities written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.unit.models.test_llama3 import GQA, SMALL, build
from titanlite.config.schema import Compile
from titanlite.distributed.compile import compile_blocks
from titanlite.errors import ConfigError, TrainingError
from titanlite.float8 import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
)
from titanlite.inference.generate import Sequel, generate, generate_together
from titanlite.inference.kv_cache import KVCache, forward
from titanlite.inference.sampling import Sampling, TokenSampler
from titanlite.models.layers import DecoderArgs, LatentArgs, LatentAttention, YarnScaling, causal_attention

WINDOW = replace(GQA, sliding_window=3, qk_norm=True, partial_rotary_factor=0.5)
ONE = replace(GQA, sliding_window=1)
LATENT = replace(
    SMALL,
    rope_scaling=YarnScaling(4.0, 6, mscale=1.0, mscale_all_dim=0.8),
    latent=LatentArgs(kv_rank=12, q_rank=20, nope_dim=10, rope_dim=4, value_dim=6),
)
KINDS = {"mha": SMALL, "gqa": GQA, "window": WINDOW, "window of one": ONE, "latent": LATENT}
GREEDY = Sampling(temperature=0)
PROMPT = [3, 14, 15, 92, 65]


def decoder(model: nn.Module, vocab_size: int = 128) -> TokenSampler:
    return TokenSampler(model, torch.device("cpu"), max_seq_len=64, vocab_size=vocab_size)


def tokens(batch: int, n: int) -> Tensor:
    return torch.randint(128, (batch, n), generator=torch.Generator().manual_seed(0))


# ---- the cache


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2], [1, 11]], ids=str)
@pytest.mark.parametrize("args", KINDS.values(), ids=KINDS)
def test_cached_logits_are_those_of_one_forward(args: DecoderArgs, chunks: list[int], multiple: int) -> None:
    model, x = build(args), tokens(3, 12)
    with torch.no_grad():
        expected = model(x)
    with KVCache(model, capacity=12, multiple=multiple) as cache:
        logits = torch.cat([cache(chunk) for chunk in x.split(chunks, 1)], 1)
    assert cache.length == 12
    assert (logits - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("args", KINDS.values(), ids=KINDS)
def test_rows_of_different_lengths_and_what_was_taken_back(args: DecoderArgs, multiple: int) -> None:
    """Chunks of other lengths for each row, also of none. What is truncated and computed again is the same."""
    model, x = build(args), tokens(3, 12)
    with torch.no_grad():
        expected = model(x)
    with KVCache(model, capacity=18, multiple=multiple) as cache:
        rows: list[list[Tensor]] = [[], [], []]
        for lengths in ([5, 1, 3], [0, 1, 1], [2, 4, 1], [5, 0, 7], [0, 6, 0]):
            begins = cache.lengths or [0, 0, 0]
            new = max(lengths)
            chunk = torch.stack(
                [torch.cat((row[b : b + n], row[:1].expand(new - n))) for row, b, n in zip(x, begins, lengths)]
            )
            for row, logits, n in zip(rows, cache(chunk, lengths), lengths):
                row.append(logits[:n])
        assert cache.lengths == [12, 12, 12]
        assert (torch.stack([torch.cat(row) for row in rows]) - expected).abs().max() < 1e-5
        for kept in (7, 2):
            cache.truncate(kept)
            cache(tokens(3, 3))
            cache.truncate(kept)
            assert (cache(x[:, kept:]) - expected[:, kept:]).abs().max() < 1e-5


def test_of_latent_attention_the_latents_are_cached() -> None:
    model, x = build(LATENT), tokens(2, 9)
    with KVCache(model, capacity=9) as cache:
        cache(x)
        kept = [tensor for tensors in cache._kept.values() for tensor in tensors]
        assert [tensor.shape for tensor in kept] == [(2, 1, 9, 12 + 4)] * LATENT.n_layers
    assert not any(module.latents for module in model.modules() if isinstance(module, LatentAttention))


def test_latents_become_keys_in_a_layer_that_has_a_number_format() -> None:
    """There the projection is not applied to the queries instead: each token is rounded as without the cache."""
    model = convert_to_float8_training(build(LATENT), config=Float8LinearConfig.from_recipe_name("rowwise"))
    x = tokens(1, 12)
    with torch.no_grad():
        expected = model(x)
    with KVCache(model, capacity=12) as cache:
        logits = torch.cat([cache(chunk) for chunk in x.split([7, 1, 4], 1)], 1)
    assert (logits - expected).abs().max() < 1e-5


def test_memory_is_allocated_as_it_is_needed() -> None:
    model = build(replace(GQA, max_seq_len=2000))
    x = tokens(1, 1200)
    with KVCache(model, capacity=100_000_000) as cache:
        logits = torch.cat([cache(chunk) for chunk in x.split([10, 250, 1, 600, 339], 1)], 1)
    with torch.no_grad():
        assert (logits - model(x)).abs().max() < 1e-5


def test_what_fills_up_a_sequence_is_the_last_token_again() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Embed(nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            seen.append((x, positions))
            return x[..., None].float()

    out = forward(Embed(), torch.tensor([[5, 6, 7]]), start=10, multiple=4)
    assert out.flatten().tolist() == [5, 6, 7]
    assert [part.flatten().tolist() for part in seen[0]] == [[5, 6, 7, 7], [10, 11, 12, 12]]


def test_filling_up_adds_no_activation() -> None:
    """Of float8's one scale per tensor, so that it does not depend on the number of processes."""
    model, x = build(GQA), tokens(1, 7)
    inputs: list[Tensor] = []
    model.layers["1"].attention.wo.register_forward_pre_hook(lambda m, args: inputs.append(args[0][0]))
    with KVCache(model, capacity=7, multiple=4) as cache:
        for chunk in x.split([5, 1, 1], 1):
            cache(chunk)
    assert [len(rows) for rows in inputs] == [8, 4, 4]
    assert torch.equal(inputs[0][5:], inputs[0][4:5].expand(3, -1))
    assert torch.equal(inputs[1], inputs[1][:1].expand(4, -1))


def test_the_model_is_left_as_it_was() -> None:
    model = build(SMALL)

    def own(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        return causal_attention(q, k, v, window)

    first, second = (model.layers[name].attention for name in "01")
    first.core = own
    with KVCache(model, capacity=8) as cache:
        cache(tokens(1, 3))
        assert second.core is not causal_attention
    assert first.core is own
    assert second.core is causal_attention


def test_a_cache_that_is_full_and_a_model_without_attention() -> None:
    with KVCache(build(SMALL), capacity=4) as cache:
        cache(tokens(1, 3))
        with pytest.raises(ConfigError, match=r"room for 4 tokens, and 3 \+ 2 are to go into it"):
            cache(tokens(1, 2))
    with pytest.raises(ConfigError, match="Linear has no AttentionSlot"):
        KVCache(nn.Linear(1, 1), capacity=4)


# ---- whole texts


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_is_the_argmax_of_each_forward(cached: bool) -> None:
    model = build(GQA)
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    generated = generate(decoder(model), PROMPT, 20, GREEDY, cached=cached)
    assert generated.ids == ids[len(PROMPT) :]
    assert (generated.prompt_tokens, generated.decoded_tokens) == (5, 19)
    assert len(set(generated.ids)) > 3  # it is not one word over and over


def test_the_seed_alone_decides() -> None:
    model = build(SMALL)
    before = torch.get_rng_state()
    texts = [generate(decoder(model), PROMPT, 30, Sampling(seed=seed)).ids for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == generate(decoder(model), PROMPT, 30, Sampling(), cached=False).ids
    assert torch.equal(torch.get_rng_state(), before)


def test_it_stops_at_the_end_token() -> None:
    model = build(SMALL)
    whole = generate(decoder(model), PROMPT, 30, Sampling()).ids
    generated = generate(decoder(model), PROMPT, 30, Sampling(), {whole[7], 1000})
    assert generated.ids == whole[: whole.index(whole[7])]
    assert generate(decoder(model), PROMPT, 1, Sampling(), {whole[0]}).ids == []


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3)], ids=["greedy", "drawn"])
def test_a_prompt_in_a_batch_gets_the_text_that_it_gets_alone(sampling: Sampling, cached: bool) -> None:
    model = build(WINDOW)
    prompts, limits = [PROMPT, [7], list(range(20)), PROMPT[:2]], [12, 30, 5, 20]
    ends = {generate(decoder(model), PROMPT, 12, sampling).ids[6]}
    alone = [generate(decoder(model), p, n, sampling, ends).ids for p, n in zip(prompts, limits)]
    assert len({*map(len, alone)}) > 1
    together = [Sequel(n, ends) for n in limits]
    done = generate_together(decoder(model), prompts, together, sampling, cached=cached)
    assert [sequel.ids for sequel in together] == alone
    assert done.prompt_tokens == 28
    assert done.decoded_tokens == sum(len(sequel.ids) + (sequel.ended == "end") - 1 for sequel in together)


def test_ids_that_the_tokenizer_has_not_are_never_drawn() -> None:
    model = build(SMALL)
    with torch.no_grad():
        model.output.weight[100:] *= 50.0
        assert model(torch.tensor([PROMPT]))[0, -1].argmax() >= 100
    for sampling in (GREEDY, Sampling(temperature=2.0), Sampling(top_k=3), Sampling(top_p=0.5)):
        assert max(generate(decoder(model, vocab_size=100), PROMPT, 30, sampling).ids) < 100


def test_the_model_goes_on_in_the_mode_it_was_in() -> None:
    model = build(SMALL).train()
    model.layers["1"].eval()
    generate(decoder(model), PROMPT, 2, GREEDY)
    assert model.training
    assert model.layers["0"].attention.training
    assert not model.layers["1"].feed_forward.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 3, "the prompt has no tokens: begin with the tokenizer's BOS"),
        ([1], 0, "max_new_tokens = 0: must be at least 1"),
        ([1] * 64, None, "the prompt has 64 tokens, and the model has 64 positions, which leaves no room for more"),
        (
            PROMPT,
            60,
            "max_new_tokens = 60: with the prompt's 5 these are 65 tokens, and the model has 64 positions",
        ),
    ],
)
def test_what_cannot_be_generated(prompt: list[int], new: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(decoder(build(SMALL)), prompt, new, GREEDY)


def test_a_model_that_takes_no_positions() -> None:
    with pytest.raises(ConfigError, match=r"Linear.forward must take tokens and their positions .*too many positional"):
        generate(decoder(nn.Linear(1, 1)), PROMPT, 1, GREEDY, cached=False)


def test_all_positions_can_be_used() -> None:
    for asked in (59, None):
        assert len(generate(decoder(build(SMALL)), PROMPT, asked, GREEDY).ids) == 59
    longer = replace(decoder(build(replace(SMALL, max_seq_len=300))), max_seq_len=300)
    assert len(generate(longer, PROMPT, None, GREEDY).ids) == 256


def test_logits_that_are_not_finite() -> None:
    model = build(SMALL)
    nn.init.constant_(model.norm.weight, math.nan)
    with pytest.raises(TrainingError, match="the model's logits are not finite"):
        generate(decoder(model), PROMPT, 3, GREEDY)
    assert "attend" not in vars(model.layers["0"].attention)


def test_speeds() -> None:
    generated = generate(decoder(build(SMALL)), PROMPT, 3, GREEDY)
    generated.prefill_s, generated.decode_s = 0.5, 0.25
    assert generated.speed() == "prefill 5 tokens, 10.0 tokens/s; decode 2 tokens, 8.0 tokens/s"
    generated.decoded_tokens = 0
    assert generated.speed() == "prefill 5 tokens, 10.0 tokens/s; decode 0 tokens"


def test_compiled_blocks_run_eagerly_and_are_not_compiled_again() -> None:
    model, expected = build(GQA), generate(decoder(build(GQA)), PROMPT, 10, Sampling()).ids
    torch._dynamo.reset()
    compile_blocks(model.layers, Compile(backend="eager"))
    model(tokens(2, 16)).sum().backward()
    compiled = counters["stats"]["unique_graphs"]
    assert compiled
    assert generate(decoder(model), PROMPT, 10, Sampling()).ids == expected
    model(tokens(2, 16)).sum().backward()
    assert counters["stats"]["unique_graphs"] == compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("scaling", [ScalingType.DYNAMIC, ScalingType.DELAYED])
def test_float8_layers_generate_and_note_nothing(scaling: ScalingType) -> None:
    args = replace(GQA, dim=64, ffn_dim=128)
    model = build(args)
    config = Float8LinearConfig(cast_config_input=CastConfig(scaling_type=scaling), emulate=True)
    convert_to_float8_training(model, module_filter_fn=lambda m, name: name != "output", config=config)
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 14
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = [generate(decoder(model), PROMPT, 10, Sampling(seed=seed)).ids for seed in (0, 0)]
    assert texts[0] == texts[1]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- drawing


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """As one would explain it."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        ranked = ranked[:top_k]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in ranked]
    probabilities = [weight / sum(weights) for weight in weights]
    kept, total = 0, 0.0
    while kept < len(ranked) and total < top_p:
        total += probabilities[kept]
        kept += 1
    distribution = [0.0] * len(logits)
    for i, p in zip(ranked[:kept], probabilities):
        distribution[i] = p / sum(probabilities[:kept])
    return distribution


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([0.25, 0.8, 1.0, 3.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.1, 0.37, 0.61, 0.93, 1.0]),
)
def test_probabilities_are_the_explained_ones(logits: list[int], temperature: float, top_k: int, top_p: float) -> None:
    given = [value / 10 for value in logits]
    probabilities = Sampling(temperature, top_k, top_p).probabilities(torch.tensor([given, given[::-1]]))
    assert probabilities.dtype == torch.float32
    assert probabilities[0].tolist() == pytest.approx(reference(given, temperature, top_k, top_p), abs=1e-5)
    assert probabilities[1].tolist() == pytest.approx(reference(given[::-1], temperature, top_k, top_p), abs=1e-5)


def test_the_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()
    for p, expected in {0.4: [1], 0.5: [1], 0.51: [1, 3], 0.75: [1, 3], 0.76: [0, 1, 3], 1.0: [0, 1, 2, 3]}.items():
        assert Sampling(top_p=p).probabilities(logits).nonzero().flatten().tolist() == expected, p


def test_extremes_of_temperature() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16)
    for cold in (0.0, 1e-40, 1e-3):
        assert Sampling(cold).probabilities(logits).tolist() == [0, 1, 0]
    assert Sampling(1e6).probabilities(logits).tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(1, x.shape[1], 4)

    fixed = TokenSampler(Fixed(), torch.device("cpu"), max_seq_len=5000, vocab_size=4)
    ids = generate(fixed, [0], 4000, Sampling(seed=1), cached=False).ids
    counts = [ids.count(i) / 4000 for i in range(4)]
    assert counts == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)  # 4 standard deviations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be 0 .* or more, and finite"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1: must be 0"),
        ({"top_p": 0.0}, "top_p = 0.0: must be more than 0, and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"seed": -1}, "seed = -1: must be 0 or more"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
