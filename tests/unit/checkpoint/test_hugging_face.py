"""Weights to and from Hugging Face folders, against what transformers itself reads, writes and computes."""

from __future__ import annotations

import json
import resource
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from titanlite.checkpoint import hugging_face_export
from titanlite.checkpoint.hugging_face import HuggingFaceFolder, is_hugging_face
from titanlite.checkpoint.hugging_face_export import Unit, group, write_hugging_face
from titanlite.config.schema import Optimizer
from titanlite.data import load_tokenizer
from titanlite.distributed.init import WeightInit
from titanlite.errors import ConfigError
from titanlite.models.layers import Decoder, DecoderArgs, RopeScaling
from titanlite.models.llama3.spec import FLAVORS, HUGGING_FACE
from titanlite.models.spec import get_model_spec
from titanlite.models.weight_map import Place, Rows, Stack
from titanlite.optim import build_optimizer, cross_entropy_loss
from titanlite.untrusted.files import read_json

GQA = DecoderArgs(
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    ffn_dim=96,
    vocab_size=2048,
    max_seq_len=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
)
# The scaling's blend needs wavelengths on both sides of original_max_seq_len: a short one brings them within 64.
SCALED = replace(GQA, rope_theta=500000.0, rope_scaling=RopeScaling(factor=8.0, original_max_seq_len=32))
TIED = replace(SCALED, tie_embeddings=True)
WIDE = replace(GQA, head_dim=16)
CASES = {"gqa": GQA, "rope_scaling": SCALED, "tied": TIED, "head_dim": WIDE}


def their_model(args: DecoderArgs) -> Any:
    """transformers' model of this shape, configured in its own words, with random weights in every tensor."""
    transformers = pytest.importorskip("transformers")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling is not None:
        low_high = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, **low_high}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.dim,
            intermediate_size=args.ffn_dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.n_kv_heads,
            head_dim=args.head_size,
            max_position_embeddings=args.max_seq_len,
            rms_norm_eps=args.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=args.tie_embeddings,
        )
    )
    with torch.no_grad():
        for param in model.parameters():
            param += 0.05 * torch.randn_like(param)
    return model.eval()


def from_theirs(folder: Path) -> Decoder:
    """Our model of what a folder holds, in float32."""
    stored = HuggingFaceFolder(folder)
    args = HUGGING_FACE.from_config(stored.config)
    model = Decoder(args)
    model.init_weights(WeightInit(model, 1))
    stored.load_into(dict(model.named_parameters()), HUGGING_FACE.weights(args), HUGGING_FACE.ignored)
    return model


def export(model: Decoder, folder: Path, **options: Any) -> None:
    params = {name: param.detach() for name, param in model.named_parameters()}
    write_hugging_face(
        folder,
        HUGGING_FACE.to_config(model.args),
        {name: param.shape for name, param in params.items()},
        HUGGING_FACE.weights(model.args),
        lambda names: {name: params[name] for name in names},
        load_tokenizer(),
        **options,
    )


def some_tokens(seed: int = 0) -> Tensor:
    return torch.randint(2048, (2, 64), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same_logits(ours: Decoder, theirs: Any) -> None:
    reference = theirs(some_tokens()).logits
    assert (ours(some_tokens()) - reference).abs().max() < 1e-5
    assert reference.abs().max() > 0.1  # the comparison is of something


def stored_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (stored.shape, stored.dtype) for name, stored in HuggingFaceFolder(folder).tensors.items()}


# ---- there and back


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("gqa", torch.float32, "100KB"),
        ("rope_scaling", torch.bfloat16, "100KB"),
        ("tied", torch.float32, "5GB"),
        ("tied", torch.bfloat16, "100KB"),
        ("head_dim", torch.bfloat16, "5GB"),
    ],
)
def test_their_model_here_and_back(tmp_path: Path, name: str, dtype: torch.dtype, size: str) -> None:
    transformers = pytest.importorskip("transformers")
    their_model(CASES[name]).to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert is_hugging_face(tmp_path / "theirs")
    count = len([*(tmp_path / "theirs").glob("*.safetensors")])
    assert count > 2 if size == "100KB" else count == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    ours = from_theirs(tmp_path / "theirs")
    assert ours.args == CASES[name]
    assert_same_logits(ours, theirs)

    export(ours, tmp_path / "ours", dtype=dtype, max_shard_bytes=100_000 if size == "100KB" else 5_000_000_000)
    count = len([*(tmp_path / "ours").glob("*.safetensors")])
    assert count > 2 if size == "100KB" else count == 1
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (count > 1)
    assert stored_tensors(tmp_path / "ours") == stored_tensors(tmp_path / "theirs")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert back.dtype == dtype
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.encode("a b") == [2046, *load_tokenizer().encode("a b")]
    assert back.config.bos_token_id == back.generation_config.bos_token_id == 2046
    assert back.config.eos_token_id == back.generation_config.eos_token_id == 2047
    assert_same_logits(ours, back.float())
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key


def test_the_index_says_what_theirs_says(tmp_path: Path) -> None:
    model = their_model(GQA)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    export(from_theirs(tmp_path / "theirs"), tmp_path / "ours", dtype=torch.float32, max_shard_bytes=100_000)
    mine, reference = (read_json(tmp_path / who / "model.safetensors.index.json") for who in ("ours", "theirs"))
    assert mine["metadata"]["total_size"] == reference["metadata"]["total_size"]
    assert mine["weight_map"].keys() == reference["weight_map"].keys()
    files = sorted({*mine["weight_map"].values()})
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]


@pytest.mark.parametrize("name", ["tied"])
def test_one_step_of_training_is_theirs(tmp_path: Path, name: str) -> None:
    theirs = their_model(CASES[name])
    theirs.save_pretrained(tmp_path / "before")
    ours = from_theirs(tmp_path / "before")
    # Adam's first update is lr * g / (|g| + eps): under the usual eps, 1e-8, it shows the rounding of gradients near 0.
    options = Optimizer(lr=1e-3, eps=1e-5, implementation="for-loop")
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    tokens = some_tokens(1)
    expected = theirs(input_ids=tokens, labels=tokens).loss
    expected.backward()
    optimizer.step()
    mine = build_optimizer(ours.named_parameters(), options)
    loss = cross_entropy_loss(ours(tokens[:, :-1]), tokens[:, 1:]) / tokens[:, 1:].numel()
    loss.backward()
    mine.step()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert loss.item() > 1
    trained, before = dict(theirs.named_parameters()), HuggingFaceFolder(tmp_path / "before").tensors
    names = HUGGING_FACE.weights(ours.args)
    for key, param in ours.named_parameters():
        assert (param - trained[names[key]]).abs().max() < 1e-5, key
        assert names[key] in before
    export(ours, tmp_path / "after", dtype=torch.float32)
    again = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert_same_logits(ours, theirs)
    assert_same_logits(ours, again)
    assert (again(tokens).logits - from_theirs(tmp_path / "before")(tokens)).abs().max() > 1e-3  # it did train


# ---- configurations


@pytest.mark.parametrize("flavor", FLAVORS)
def test_configurations_survive(flavor: str) -> None:
    args = FLAVORS[flavor].configured(2048, 4096)
    written = json.loads(json.dumps(HUGGING_FACE.to_config(args)))
    assert HUGGING_FACE.from_config(written) == args
    assert len(HUGGING_FACE.weights(args)) == 3 + 9 * args.n_layers
    theirs = pytest.importorskip("transformers").LlamaConfig(**written)
    assert HUGGING_FACE.from_config(theirs.to_dict()) == args  # in the spelling of the version that is installed
    assert get_model_spec("llama3").hugging_face is HUGGING_FACE


SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "vocab_size": 128,
}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "factor": 8.0}


def test_what_a_configuration_leaves_out_is_what_transformers_takes() -> None:
    args = HUGGING_FACE.from_config(SIZES)
    theirs = pytest.importorskip("transformers").LlamaConfig(**SIZES)
    assert args == HUGGING_FACE.from_config(theirs.to_dict())
    assert (args.n_kv_heads, args.rope_theta, args.norm_eps, args.max_seq_len) == (8, 10000.0, 1e-6, 2048)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}},
    ],
)
def test_both_spellings_of_scaled_frequencies(rope: dict[str, Any]) -> None:
    args = HUGGING_FACE.from_config({**SIZES, **rope})
    assert (args.rope_theta, args.rope_scaling) == (5e5, RopeScaling(8.0, 1.0, 4.0, 32))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "mistral", 'model_type = "mistral": must be "llama"'),
        ("architectures", ["LlamaModel"], r"architectures = \['LlamaModel'\]: must be \['LlamaForCausalLM'\]"),
        ("hidden_act", "gelu", 'hidden_act = "gelu": must be "silu"'),
        ("attention_bias", True, "attention_bias = True: must be False"),
        ("mlp_bias", True, "mlp_bias = True: must be False"),
        ("attention_dropout", 0.1, "attention_dropout = 0.1: must be 0.0"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5: must be 1.0"),
        ("head_dim", "16", 'head_dim = "16": must be a whole number from 1 to 65536'),
        ("tie_word_embeddings", "false", 'tie_word_embeddings = "false": must be true or false'),
        ("rope_scaling", "llama3", 'rope_scaling = "llama3": must be an object'),
        ("head_dim", 7, "head_dim = 7: must be even"),
        ("hidden_size", 65, "hidden_size = 65: must be a multiple of num_attention_heads = 8"),
        ("num_key_value_heads", 3, "num_key_value_heads = 3: must divide num_attention_heads = 8"),
        ("vocab_size", None, "vocab_size = None: must be a whole number from 1 to 16777216"),
        ("rms_norm_eps", "x", 'rms_norm_eps = "x": must be a number'),
        (
            "rope_scaling",
            {"type": "dynamic"},
            r'rope_scaling.rope_type = "dynamic": must be "llama3" or "yarn" or "default"',
        ),
        ("rope_parameters", {"rope_type": "linear"}, r'rope_parameters.rope_type = "linear": must be'),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, r"rope_parameters.partial_rotary_factor = 0.5"),
        ("rope_scaling", {"rope_type": "llama3"}, "rope_scaling.factor = None: must be a number"),
    ],
)
def test_what_is_not_computed_is_refused(key: str, value: Any, message: str) -> None:
    HUGGING_FACE.from_config(SIZES)
    with pytest.raises(ConfigError, match=rf"^config\.json: {message}.*does not compute" if value else message):
        HUGGING_FACE.from_config({**SIZES, key: value})


def test_quantized_weights_are_not_trained() -> None:
    with pytest.raises(ConfigError, match="quantized weights are for inference; take the weights in high precision"):
        HUGGING_FACE.from_config({**SIZES, "quantization_config": {"bits": 4}})


def test_another_flavor_is_named_by_what_differs() -> None:
    config = HUGGING_FACE.to_config(replace(TIED, max_seq_len=32))
    HUGGING_FACE.check(TIED, config)
    message = r"rope_theta is 500000.0 there and 10000.0 here; rope_scaling is \{'factor': 8.0, .* and None here; "
    with pytest.raises(ConfigError, match=message + "tie_word_embeddings is True there and False here; choose"):
        HUGGING_FACE.check(GQA, config)


# ---- reading what is not right


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Our own export of a small model, in several files."""
    model = Decoder(GQA)
    model.init_weights(WeightInit(model, 0))
    export(model, tmp_path / "model", max_shard_bytes=100_000)
    assert len([*(tmp_path / "model").glob("*.safetensors")]) > 3
    return tmp_path / "model"


def reopen_with(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> HuggingFaceFolder:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content)
    index.write_text(json.dumps(content))
    return HuggingFaceFolder(folder)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder of Hugging Face weights: there is no such folder"):
        HuggingFaceFolder(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"it has no checkpoint\.json, and no config\.json beside \*\.safe"):
        HuggingFaceFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_hugging_face(tmp_path)


@pytest.mark.parametrize("text", ["{", "\xff", "[]"])
def test_damaged_json(folder: Path, text: str) -> None:
    for name in ("model.safetensors.index.json", "config.json"):
        (folder / name).write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=rf"{name}: (is not JSON|holds no JSON object).*again"):
            HuggingFaceFolder(folder)


def test_missing_files(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    for file in (files[0], files[-1]):
        file.unlink()
    gone = f"2 of {len(files)} files that .* names are missing: {files[0].name}, {files[-1].name}; download them"
    with pytest.raises(ConfigError, match=gone):
        HuggingFaceFolder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"damaged or cut short \(.+\)"),
        (lambda data: data[:100], r"damaged or cut short \(.+\)"),
        (lambda data: b"", r"damaged or cut short \(.+\)"),
        (lambda data: data[:20] + b"\xff" + data[21:], r"damaged or cut short \(.+\)"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer in place of the file"),
    ],
    ids=["cut", "header_cut", "empty", "header_damaged", "lfs"],
)
def test_damaged_files(folder: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=rf"{file.name}: {message}; download it again"):
        HuggingFaceFolder(folder)


def test_an_unreadable_file(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    opened = HuggingFaceFolder(folder)
    file.unlink()
    state = {name: torch.empty(opened.tensors[theirs].shape) for name, theirs in HUGGING_FACE.weights(GQA).items()}
    with pytest.raises(ConfigError, match=rf"{file.name}: cannot be read"):
        opened.load_into(state, HUGGING_FACE.weights(GQA))


def test_index_and_files_disagree(folder: Path) -> None:
    norm = "model.norm.weight"
    with pytest.raises(ConfigError, match=r"1 is not in the file that .*index\.json names: model\.norm\.weight; the"):
        reopen_with(
            folder, lambda c: c["weight_map"].update({norm: c["weight_map"]["model.embed_tokens.weight"]})
        ).check({}, HUGGING_FACE.weights(GQA))
    with pytest.raises(ConfigError, match=r"has no weight_map of names; download it again"):
        reopen_with(folder, lambda c: c.pop("weight_map"))


def test_files_without_an_index(folder: Path) -> None:
    before = HuggingFaceFolder(folder).tensors
    (folder / "model.safetensors.index.json").unlink()
    assert HuggingFaceFolder(folder).tensors == before
    first = sorted(folder.glob("*.safetensors"))[0]
    (folder / "other.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match=rf"other.safetensors: .* is in {first.name} too, and no .*index.json says"):
        HuggingFaceFolder(folder)


def test_weights_that_come_with_scales(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"a is of dtype F8_E4M3, and weights are read from F64, F32, F16, BF16; "):
        HuggingFaceFolder(tmp_path)


def test_tensors_of_another_model_are_named(folder: Path) -> None:
    stored = HuggingFaceFolder(folder)
    smaller = replace(GQA, n_layers=1, dim=32, tie_embeddings=True)
    with pytest.raises(ConfigError) as raised:
        stored.load_into(dict(Decoder(smaller).named_parameters()), HUGGING_FACE.weights(smaller))
    message = str(raised.value)
    assert "weights of another model, flavor or vocabulary: 10 are in its files and not in the model: " in message
    assert "model.layers.1.self_attn.q_proj.weight" in message
    assert "lm_head.weight" in message
    assert "11 have another shape: model.embed_tokens.weight [2048, 64], in the model [2048, 32], " in message
    assert " and 1 more; choose the flavor that they belong to" in message
    larger = replace(GQA, n_layers=4)
    with pytest.raises(ConfigError, match=r": 18 are not in its files: model.layers.2.* and 8 more; choose"):
        stored.check({}, HUGGING_FACE.weights(larger))
    with pytest.raises(ConfigError, match=r"1 of the model has no name in Hugging Face files: fp8_scale"):
        stored.load_into({"fp8_scale": torch.ones(1)}, HUGGING_FACE.weights(GQA))


def test_buffers_of_old_files_are_left_alone(folder: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "old.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    stored, names = HuggingFaceFolder(folder), HUGGING_FACE.weights(GQA)
    stored.check({}, names, HUGGING_FACE.ignored)
    with pytest.raises(ConfigError, match=r"1 is in its files and not in the model: .*inv_freq"):
        stored.check({}, names)


def test_a_part_of_the_model(folder: Path) -> None:
    whole = from_theirs(folder)
    state = {name: torch.zeros_like(p) for name, p in whole.named_parameters() if name.startswith("layers.1.")}
    HuggingFaceFolder(folder).load_into(state, HUGGING_FACE.weights(GQA))
    for name, tensor in state.items():
        assert torch.equal(tensor, whole.get_parameter(name)), name


# ---- writing


def test_shards_are_filled_in_order() -> None:
    shapes = {"a": (10,), "b": (10,), "c": (30,), "d": (1,), "e": (19, 1)}
    units = [Unit([name], {name: shape}) for name, shape in shapes.items()]

    def names(itemsize: int, limit: int) -> list[list[str]]:
        return [[name for unit in part for name in unit.parameters] for part in group(units, itemsize, limit)]

    assert names(2, 40) == [["a", "b"], ["c"], ["d", "e"]]
    assert names(2, 1) == [[name] for name in shapes]
    assert names(4, 1000) == [[*shapes]]


FUSED: dict[str, Place] = {
    "up": Rows("gate_up", 6, 12),  # not in the order of its rows
    "gate": Rows("gate_up", 0, 6),
    "experts": Stack(("expert.0", "expert.1", "expert.2")),
    "norm": "norm.weight",
}


def test_parameters_that_are_one_tensor_there_and_tensors_that_are_one_parameter_here(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"up": (6, 4), "gate": (6, 4), "experts": (3, 2, 5), "norm": (4,)}
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    asked: list[str] = []

    def get(names: list[str]) -> dict[str, Tensor]:
        asked.extend(names)
        return {name: params[name] for name in names}

    write_hugging_face(tmp_path / "out", {}, shapes, FUSED, get, load_tokenizer(), dtype=torch.float32)
    assert sorted(asked) == sorted(shapes)
    there = pytest.importorskip("safetensors.torch").load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(there["gate_up"], torch.cat([params["gate"], params["up"]]))
    assert all(torch.equal(there[f"expert.{i}"], params["experts"][i]) for i in range(3))
    folder = HuggingFaceFolder(tmp_path / "out")
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    folder.load_into(state, FUSED)
    with folder.opened() as opened:
        for name, tensor in params.items():
            assert torch.equal(state[name], tensor)
            assert torch.equal(opened(FUSED[name]), tensor)
    with pytest.raises(ConfigError, match=r"gate_up \[12, 4\], in the model \[12, 5\].*expert.0 \[2, 5\]"):
        folder.check({"gate": (6, 5), "experts": (3, 3, 5)}, FUSED)


class Source:
    """Hands out tensors that it makes when asked, and knows how many bytes of them were alive at once."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.asked: list[list[str]] = []
        self.alive = self.most = 0

    def get(self, names: list[str]) -> dict[str, Tensor]:
        self.asked.append(names)
        tensors = {}
        for name in names:
            tensors[name] = torch.full(self.shapes[name], float(len(name)))
            size = tensors[name].nbytes
            self.alive += size
            weakref.finalize(tensors[name], self.freed, size)
        self.most = max(self.most, self.alive)
        return tensors

    def freed(self, size: int) -> None:
        self.alive -= size


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(hugging_face_export, "_BATCH", 10_000)
    return 10_000


def test_few_tensors_are_in_memory_at_once(tmp_path: Path, small_batches: int) -> None:
    shapes = {f"w{i:03}": (100, 20) for i in range(100)}
    source, names = Source(shapes), {name: f"model.{name}" for name in shapes}
    write_hugging_face(tmp_path / "out", {}, shapes, names, source.get, load_tokenizer(), max_shard_bytes=70_000)
    assert source.most == 4 * small_batches
    assert source.alive == 0
    assert [name for batch in source.asked for name in batch] == [*shapes]
    # 17 tensors of 4,000 bytes fit in a file; of each, 5 at a time.
    assert [len(batch) for batch in source.asked] == [5, 5, 5, 2] * 5 + [5, 5, 5]
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) == 6
    assert max(sizes) < 72_000
    assert stored_tensors(tmp_path / "out") == {f"model.{n}": ((100, 20), torch.bfloat16) for n in shapes}


def write_one(folder: Path, value: Tensor, **options: Any) -> None:
    write_hugging_face(folder, {}, {"w": value.shape}, {"w": "w"}, lambda _: {"w": value}, load_tokenizer(), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    write_one(tmp_path / "out", value.T, dtype=dtype)
    load_file = pytest.importorskip("safetensors.torch").load_file
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], value.T.to(dtype))
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == str(dtype).removeprefix("torch.")
    into = torch.zeros(5, 3)
    HuggingFaceFolder(tmp_path / "out").load_into({"w": into}, {"w": "w"})
    assert torch.equal(into, value.T.to(dtype).float())


def test_numbers_beyond_float16(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float16: w has values beyond its largest, 65504; write bfloat16 or float32"):
        write_one(tmp_path / "out", torch.full((2,), 70000.0), dtype=torch.float16)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    write_one(taken, torch.ones(2))  # an empty one will do
    before = {path: path.read_bytes() for path in taken.iterdir()}
    with pytest.raises(ConfigError, match="taken: is there and not empty; choose another folder, or delete it first"):
        write_one(taken, torch.zeros(2))
    with pytest.raises(ConfigError, match=r"config\.json: is there and not empty"):
        write_one(taken / "config.json", torch.zeros(2))
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another folder"):
        write_one(taken / "config.json" / "inner", torch.zeros(2))
    assert {path: path.read_bytes() for path in taken.iterdir()} == before
    (tmp_path / ".new.partial").mkdir()
    with pytest.raises(ConfigError, match=r"\.new\.partial: another process is writing .*new, or one that was killed"):
        write_one(tmp_path / "new", torch.zeros(2))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def get(names: list[str]) -> dict[str, Tensor]:
        assert [*tmp_path.iterdir()] == [tmp_path / ".out.partial"]  # not there until it is whole
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_hugging_face(tmp_path / "out", {}, {"w": (2,)}, {"w": "w"}, get, load_tokenizer())
    assert [*tmp_path.iterdir()] == []


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"out: cannot be written \(.*File too large.*\); choose another folder"):
            write_one(tmp_path / "out", torch.zeros(2_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [*tmp_path.iterdir()] == []
