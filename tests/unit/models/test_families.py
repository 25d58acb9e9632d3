"""Every family against transformers: logits, a step's loss and gradients, weights there and back, greedy text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

pytest.importorskip("transformers")

from safetensors.torch import load_file

from tests.support.families import CASES, SEQ_LEN, VOCABULARY, in_files, part_of, their_model
from titanlite.checkpoint.hugging_face import HuggingFaceFolder
from titanlite.checkpoint.hugging_face_export import write_hugging_face
from titanlite.data import load_tokenizer
from titanlite.distributed.init import WeightInit
from titanlite.errors import ConfigError
from titanlite.inference.generate import generate
from titanlite.inference.sampling import Sampling, TokenSampler
from titanlite.models.layers import Decoder, RopeScaling
from titanlite.models.layers.attention import causal_attention
from titanlite.models.spec import ModelSpec, get_model_spec, model_spec_of
from titanlite.models.weight_map import buffers_of
from titanlite.optim import cross_entropy_loss


def ours_of(folder: Path) -> tuple[ModelSpec, Decoder]:
    """The family and our model of what a folder holds, in float32."""
    stored = HuggingFaceFolder(folder)
    spec, args = model_spec_of(stored.config)
    assert spec.hugging_face is not None
    model = Decoder(args)
    model.init_weights(WeightInit(model, 1))
    weights = spec.hugging_face.weights(args)
    stored.load_into(
        {**dict(model.named_parameters()), **buffers_of(model, weights)}, weights, spec.hugging_face.ignored
    )
    return spec, model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (2, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))


def export(spec: ModelSpec, model: Decoder, folder: Path, dtype: torch.dtype) -> None:
    family: Any = spec.hugging_face
    weights = family.weights(model.args)
    buffers = buffers_of(model, weights)
    params = {name: param.detach() for name, param in model.named_parameters()} | buffers
    shapes = {name: param.shape for name, param in params.items()}
    write_hugging_face(
        folder,
        family.to_config(model.args),
        shapes,
        weights,
        lambda names: {name: params[name] for name in names},
        load_tokenizer(),
        dtype=dtype,
        in_float32=buffers,
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_gradients_and_text_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    spec, ours = ours_of(tmp_path / "theirs")
    assert spec.name == case.partition(",")[0]
    batch = tokens()
    reference = theirs(batch[:, :-1]).logits
    mine = ours(batch[:, :-1])
    assert (mine - reference).abs().max() < 1e-5
    assert reference.abs().max() > 0.5  # the comparison is of something

    expected = torch.nn.functional.cross_entropy(reference.flatten(0, 1), batch[:, 1:].flatten())
    expected.backward()
    loss = cross_entropy_loss(mine, batch[:, 1:]) / batch[:, 1:].numel()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = in_files(theirs, {name: param.grad for name, param in theirs.named_parameters()})
    assert spec.hugging_face is not None
    places = spec.hugging_face.weights(ours.args)
    largest = 0.0
    for name, param in ours.named_parameters():
        assert param.grad is not None
        assert (param.grad - part_of(gradients, places[name])).abs().max() < 1e-5, name
        largest = max(largest, param.grad.abs().max().item())
    assert largest > 1e-2

    prompt, new = batch[0, :9].tolist(), 30
    text = theirs.generate(batch[:1, :9], max_new_tokens=new, do_sample=False)[0, 9:].tolist()
    decoder = TokenSampler(ours, torch.device("cpu"), ours.args.max_seq_len, VOCABULARY)
    assert generate(decoder, prompt, new, Sampling(temperature=0)).ids == text
    assert generate(decoder, prompt, new, Sampling(temperature=0), cached=False).ids == text
    assert len(set(text)) > 1  # it is not one word over and over


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_weights_there_and_back_are_the_same_bytes(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    import transformers

    theirs = their_model(case).to(dtype)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):  # float32, as in the published files
            buffer.data = buffer.data.float()
    theirs.save_pretrained(tmp_path / "theirs")
    spec, ours = ours_of(tmp_path / "theirs")
    export(spec, ours, tmp_path / "ours", dtype)
    there, back = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name].view(torch.uint8), back[name].view(torch.uint8)) for name in there)
    options: Any = {"output_loading_info": True, "attn_implementation": "eager", "dtype": torch.float32}
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f, **options) for f in ("theirs", "ours")
    )
    assert not any(after[1].values()), after[1]
    with torch.no_grad():
        assert torch.equal(after[0](tokens()).logits, before[0](tokens()).logits)
    assert model_spec_of(after[0].config.to_dict())[1] == ours.args  # in the spelling of the version that is installed


# ---- flavors, by the parameter counts that their publishers state

PUBLISHED = {
    "llama": {
        "2-7B": 6_738_415_616,
        "2-13B": 13_015_864_320,
        "2-70B": 68_976_648_192,
        "3.1-8B": 8_030_261_248,
        "3.1-70B": 70_553_706_496,
        "3.1-405B": 405_853_388_800,
        "3.2-1B": 1_235_814_400,
        "3.2-3B": 3_212_749_824,
    },
    "mistral": {"7B-v0.1": 7_241_732_096, "7B-v0.3": 7_248_023_552, "Nemo-2407": 12_247_782_400},
    "qwen2": {
        "0.5B": 494_032_768,
        "1.5B": 1_543_714_304,
        "3B": 3_085_938_688,
        "7B": 7_615_616_512,
        "14B": 14_770_033_664,
        "32B": 32_763_876_352,
        "72B": 72_706_203_648,
    },
    "qwen3": {
        "0.6B": 596_049_920,
        "1.7B": 1_720_574_976,
        "4B": 4_022_468_096,
        "8B": 8_190_735_360,
        "14B": 14_768_307_200,
        "32B": 32_762_123_264,
    },
    "qwen3_moe": {"30B-A3B": 30_532_122_624, "235B-A22B": 235_093_634_560},
    "mixtral": {"8x7B": 46_702_792_704},
    "deepseek_v3": {"Moonlight-16B-A3B": 15_960_108_544, "671B": 671_026_404_352},
    "phi3": {"phi-3-mini-4k": 3_821_079_552, "phi-3-medium-4k": 13_960_238_080, "phi-4": 14_659_507_200},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_flavors_have_the_published_sizes_and_a_config_json(family: str) -> None:
    import transformers

    spec = get_model_spec(family)
    assert spec.hugging_face is not None
    for name, args in spec.flavors.items():
        with torch.device("meta"):
            size = Decoder(args.configured(0, 64) if args.vocab_size else args.configured(2048, 64)).size()
        assert size.params == PUBLISHED[family].get(name, size.params), name
        configured = args.configured(1, 4096)
        written = spec.hugging_face.to_config(configured)
        assert spec.hugging_face.from_config(written) == configured
        spec.hugging_face.check(configured, written)
        theirs = transformers.AutoConfig.for_model(**written)
        assert spec.hugging_face.from_config(theirs.to_dict()) == configured, name
    laptop = {name: get_model_spec("llama3").flavor(name).configured(2048, 64) for name in ("20M", "100M")}
    assert all(args.head_size == 64 for args in laptop.values())


# As their publishers state them, without what says nothing about the network.
def stated(**values: Any) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_dropout": 0.0, **values}


FILES: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "3.1-8B"): stated(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rms_norm_eps=1e-05,
        rope_theta=500000.0,
        mlp_bias=False,
        max_position_embeddings=131072,
        pretraining_tp=1,
        eos_token_id=[128001, 128008],
        attention_bias=False,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    ),
    ("mistral", "7B-v0.1"): stated(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
        sliding_window=4096,
        max_position_embeddings=32768,
    ),
    ("mistral", "Nemo-2407"): stated(
        hidden_size=5120,
        intermediate_size=14336,
        num_hidden_layers=40,
        num_attention_heads=32,
        head_dim=128,
        num_key_value_heads=8,
        vocab_size=131072,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        max_position_embeddings=131072,
    ),
    ("qwen2", "7B"): stated(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        use_mrope=False,
        use_sliding_window=False,
        sliding_window=131072,
        max_window_layers=28,
        max_position_embeddings=131072,
    ),
    ("qwen3", "0.6B"): stated(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        head_dim=128,
        num_key_value_heads=8,
        vocab_size=151936,
        rms_norm_eps=1e-06,
        rope_theta=1000000,
        rope_scaling=None,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=28,
        attention_bias=False,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    ("qwen3_moe", "30B-A3B"): stated(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        output_router_logits=False,
        router_aux_loss_coef=0.001,
        num_hidden_layers=48,
        num_attention_heads=32,
        head_dim=128,
        num_key_value_heads=4,
        vocab_size=151936,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        rope_scaling=None,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=48,
        attention_bias=False,
        max_position_embeddings=40960,
    ),
    ("mixtral", "8x7B"): stated(
        hidden_size=4096,
        intermediate_size=14336,
        num_local_experts=8,
        num_experts_per_tok=2,
        output_router_logits=False,
        router_aux_loss_coef=0.02,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        max_position_embeddings=32768,
    ),
    ("deepseek_v3", "Moonlight-16B-A3B"): stated(
        hidden_size=2048,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        ep_size=1,
        routed_scaling_factor=2.446,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        v_head_dim=128,
        qk_nope_head_dim=128,
        topk_method="noaux_tc",
        n_group=1,
        topk_group=1,
        num_experts_per_tok=6,
        moe_layer_freq=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        aux_loss_alpha=0.001,
        seq_aux=True,
        vocab_size=163840,
        max_position_embeddings=8192,
        rms_norm_eps=1e-05,
        rope_theta=50000.0,
        rope_scaling=None,
        attention_bias=False,
        tie_word_embeddings=False,
        num_nextn_predict_layers=0,
    ),
    ("deepseek_v3", "671B"): stated(
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_shared_experts=1,
        n_routed_experts=256,
        ep_size=1,
        routed_scaling_factor=2.5,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_rope_head_dim=64,
        v_head_dim=128,
        qk_nope_head_dim=128,
        topk_method="noaux_tc",
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        moe_layer_freq=1,
        first_k_dense_replace=3,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        vocab_size=129280,
        max_position_embeddings=163840,
        rms_norm_eps=1e-06,
        rope_theta=10000,
        rope_scaling={
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        attention_bias=False,
        tie_word_embeddings=False,
        num_nextn_predict_layers=1,
    ),
    ("phi3", "phi-4"): stated(
        hidden_size=5120,
        intermediate_size=17920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
        vocab_size=100352,
        rms_norm_eps=1e-05,
        rope_theta=250000,
        rope_scaling=None,
        sliding_window=None,
        max_position_embeddings=16384,
        original_max_position_embeddings=16384,
        attention_bias=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        pad_token_id=100349,
    ),
}


@pytest.mark.parametrize(("family", "flavor"), FILES)
def test_flavors_are_what_the_published_files_describe(family: str, flavor: str) -> None:
    spec, args = model_spec_of({"model_type": family, **FILES[family, flavor]})
    assert (spec.name, args) == (family, spec.flavor(flavor))


# Folders of the Llama family that have no flavor, and the parameters that their publishers or transformers count.
LLAMA_SHAPED: dict[str, tuple[dict[str, Any], int]] = {
    "TinyLlama 1.1B": (
        stated(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, vocab_size=32000, rms_norm_eps=1e-05, rope_theta=10000.0, rope_scaling=None,
            max_position_embeddings=2048, pretraining_tp=1, attention_bias=False, tie_word_embeddings=False,
        ),
        1_100_048_384,
    ),
    "SmolLM2 360M": (
        stated(
            hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
            num_key_value_heads=5, vocab_size=49152, rms_norm_eps=1e-05, rope_theta=100000, rope_scaling=None,
            max_position_embeddings=8192, is_llama_config=True, rope_interleaved=False, mlp_bias=False,
            attention_bias=False, tie_word_embeddings=True,
        ),
        361_821_120,
    ),
    "Falcon3 7B": (
        stated(
            hidden_size=3072, intermediate_size=23040, num_hidden_layers=28, num_attention_heads=12, head_dim=256,
            num_key_value_heads=4, vocab_size=131072, rms_norm_eps=1e-06, rope_theta=1000042, rope_scaling=None,
            max_position_embeddings=32768, mlp_bias=False, attention_bias=False, tie_word_embeddings=False,
        ),
        7_455_550_464,
    ),
    "Seed-Coder 8B": (
        stated(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128,
            num_key_value_heads=8, vocab_size=155136, rms_norm_eps=1e-06, rope_theta=500000.0, rope_scaling=None,
            max_position_embeddings=32768, pretraining_tp=1, mlp_bias=False, attention_bias=False,
            tie_word_embeddings=False,
        ),
        8_250_462_208,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMA_SHAPED)
def test_a_folder_that_is_shaped_like_llama_is_a_llama(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config, count = LLAMA_SHAPED[name]
    spec, args = model_spec_of({"model_type": "llama", **config})
    assert spec.name == "llama"
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        size = Decoder(args.configured(config["vocab_size"], 64)).size()
    assert size.params == sum(p.numel() for p in theirs.parameters()) == count


# ---- what config.json says and a family does not compute

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}
OWN_SIZES = {"deepseek_v3": {"num_key_value_heads": 8}}
LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    ("kind", "key", "value", "named"),
    [
        ("mistral", "sliding_window", 0, "sliding_window = 0: must be a whole number from 1"),
        ("mistral", "layer_types", ["full_attention", "sliding_attention"], "attention for all layers"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window = True: must be False"),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"], "attention for all layers"),
        ("qwen2", "layer_types", 3, "layer_types = 3"),
        ("qwen3", "attention_bias", True, "attention_bias = True: must be False"),
        ("phi3", "rope_scaling", LONG, 'rope_scaling.rope_type = "longrope": must be "default"'),
        ("phi3", "rope_scaling", {"type": "yarn", "factor": 4.0}, 'rope_type = "yarn": must be "default"'),
        ("phi3", "partial_rotary_factor", 1.5, "partial_rotary_factor = 1.5: must be a number above 0, at most 1"),
        ("phi3", "partial_rotary_factor", 0.4, "partial_rotary_factor = 0.4: must make an even part of 8 features"),
        ("phi3", "resid_pdrop", 0.1, "resid_pdrop = 0.1: must be 0.0"),
        ("qwen2", "partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5: must be 1.0"),
        ("llama", "rope_scaling", {"type": "yarn", "factor": 4.0, "mscale": 1.0}, "rope_scaling.mscale = 1.0: is not"),
        ("llama", "rope_scaling", {"type": "yarn", "factor": 4.0, "truncate": False}, "rope_scaling.truncate = False"),
        ("deepseek_v3", "num_key_value_heads", 4, "num_key_value_heads = 4: must be num_attention_heads = 8"),
        ("deepseek_v3", "topk_method", "greedy", 'topk_method = "greedy": must be "noaux_tc"'),
        ("deepseek_v3", "scoring_func", "softmax", 'scoring_func = "softmax": must be "sigmoid"'),
        ("deepseek_v3", "moe_layer_freq", 2, "moe_layer_freq = 2: must be 1"),
        ("deepseek_v3", "rope_interleave", False, "rope_interleave = False: must be True"),
        ("deepseek_v3", "kv_lora_rank", 0, "kv_lora_rank = 0: must be a whole number from 1"),
        ("deepseek_v3", "qk_rope_head_dim", 7, "qk_rope_head_dim = 7: must be even"),
        ("deepseek_v3", "head_dim", 8, "head_dim = 8: must be 64"),
        (
            "deepseek_v3",
            "rope_scaling",
            {"type": "linear", "factor": 4.0},
            'type = "linear": must be "yarn" or "default"',
        ),
        ("llama", "rope_scaling", {"type": "yarn", "factor": 0}, "rope_scaling.factor = 0: must be a number above 0"),
        ("llama", "rope_scaling", {"type": ["yarn"]}, "rope_scaling.rope_type = "),
        (
            "gemma2",
            "hidden_size",
            64,
            'model_type = "gemma2": no family of models here is of this type; it must be one',
        ),
        (["llama"], "hidden_size", 64, "model_type = "),
    ],
)
def test_what_no_family_computes_is_refused_by_its_key(kind: Any, key: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        model_spec_of({"model_type": kind, **SIZES, **OWN_SIZES.get(str(kind), {}), key: value})
    assert named in str(refusal.value)
    assert "config.json" in str(refusal.value)


def test_the_original_length_is_that_of_the_scaling() -> None:
    import transformers

    yarn = {"rope_type": "yarn", "factor": 4.0, "truncate": True, "original_max_position_embeddings": 64}
    config = {**SIZES, "max_position_embeddings": 256, "original_max_position_embeddings": 32, "rope_scaling": yarn}
    _, args = model_spec_of({"model_type": "llama", **config})
    assert args.rope_scaling.original_max_seq_len == 64
    theirs = transformers.LlamaConfig(**config).rope_parameters
    assert theirs["original_max_position_embeddings"] == 64


def test_layers_that_all_have_the_window_may_say_so() -> None:
    kinds = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}
    assert model_spec_of({"model_type": "mistral", **SIZES, **kinds})[1].sliding_window == 8


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("llama", "sliding_window", 16),
        ("llama", "qk_norm", True),
        ("qwen2", "qkv_bias", False),
        ("mistral", "partial_rotary_factor", 0.5),
        ("phi3", "rope_scaling", RopeScaling(8)),
    ],
)
def test_what_a_config_json_cannot_say_is_not_written(family: str, option: str, value: Any) -> None:
    spec = get_model_spec(family)
    assert spec.hugging_face is not None
    args = spec.flavor("debugmodel").configured(128, 64)
    spec.hugging_face.to_config(args)
    with pytest.raises(ConfigError) as refusal:
        spec.hugging_face.to_config(replace(args, **{option: value}))
    assert option in str(refusal.value) or "rope_type" in str(refusal.value)


def test_missing_keys_mean_what_transformers_takes_them_for() -> None:
    import transformers

    for family in PUBLISHED:
        config = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
        config |= {"model_type": family, "num_attention_heads": 128, "hidden_size": 1024}
        format = get_model_spec(family).hugging_face
        assert format is not None
        theirs = transformers.AutoConfig.for_model(**config, pad_token_id=None)
        assert format.from_config(config) == format.from_config(theirs.to_dict()), family


def test_heads_of_two_sizes_take_the_kernel_that_stores_no_scores() -> None:
    q, k = (torch.randn(1, 2, 16, 24, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, 16, 16, requires_grad=True)
    with profile() as profiled:
        out = causal_attention(q, k, v)
        out.sum().backward()
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.key for event in profiled.key_averages()}
    scores = (q @ k.transpose(-2, -1) / math.sqrt(24)).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
