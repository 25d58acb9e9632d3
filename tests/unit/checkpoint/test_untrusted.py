"""Files with wrong sizes, types and places: each is refused by name, before memory is taken for what it claims."""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, MetadataIndex

from tests.support.hostile import EMBEDDING, edit_metadata, place_of, point_to, reseal
from tests.unit.commands.test_generate_command import ARGS, write
from titanlite.checkpoint.metadata import read_metadata
from titanlite.checkpoint.storage import load, read_info, saved_shapes, verify
from titanlite.commands import generate
from titanlite.errors import ConfigError
from titanlite.untrusted.files import MOST_JSON, read_json
from titanlite.untrusted.pickles import Record, read_pickle


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest") / "step-1"
    write(folder, ARGS["gqa"])
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    shutil.copytree(honest, tmp_path / "step-1")
    return tmp_path / "step-1"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What takes 1 GiB more than there is fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def embedding(folder: Path) -> torch.Tensor:
    state = {EMBEDDING: torch.empty(saved_shapes(folder)[EMBEDDING])}
    load(folder, state)
    return state[EMBEDDING]


# ---- .metadata


def chunks_in(folder: Path) -> dict[str, Any]:
    return {name: (tensor.shape, [*tensor.chunks], tensor.scale) for name, tensor in read_metadata(folder).items()}


def chunk_of(metadata: Any) -> Any:
    return metadata.state_dict_metadata[EMBEDDING].chunks[0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: setattr(place_of(m), "relative_path", "../step-1/__0_0.distcp"), "is not in SHA256SUMS"),
        (lambda m: setattr(place_of(m), "relative_path", "/etc/passwd"), "'/etc/passwd' .* is not in SHA256SUMS"),
        (lambda m: setattr(place_of(m), "relative_path", 3), "model.tok_embeddings.weight has a place that is none"),
        (lambda m: m.storage_data.update({MetadataIndex(("a", "b")): place_of(m)}), "a place has no name"),
        (lambda m: setattr(place_of(m), "offset", 1 << 40), "__0_0.distcp is cut short"),
        (lambda m: setattr(place_of(m), "length", 1 << 61), "__0_0.distcp is cut short"),
        (lambda m: setattr(place_of(m), "offset", -1), "has a place that is none"),
        (lambda m: setattr(place_of(m), "length", 10), "elements in 10 bytes"),
        (lambda m: setattr(place_of(m), "transform_descriptors", ["zstd"]), "was compressed"),
        (lambda m: setattr(chunk_of(m), "sizes", torch.Size([1 << 40, 64])), "lies outside of it"),
        (lambda m: setattr(chunk_of(m), "sizes", torch.Size([5, 64])), "are not the whole tensor"),
        (lambda m: setattr(chunk_of(m), "offsets", torch.Size([5, 0])), "lies outside of it"),
        (lambda m: m.state_dict_metadata[EMBEDDING].chunks.clear(), "are not the whole tensor"),
        (lambda m: setattr(m.state_dict_metadata[EMBEDDING], "chunks", None), "has no chunks"),
        (lambda m: setattr(m.state_dict_metadata[EMBEDDING], "size", (2, 3)), "a shape is none"),
        (lambda m: m.state_dict_metadata.update({EMBEDDING: 7}), "is none"),
        (
            lambda m: m.storage_data.update(dict.fromkeys(m.storage_data, place_of(m))),
            "shares its bytes of __0_0.distcp",
        ),
        (lambda m: m.storage_data.clear(), "is in no file"),
        (lambda m: setattr(m, "storage_data", None), "it has no entries"),
        (lambda m: m.state_dict_metadata, "in the place of Metadata"),
        (lambda m: [m], "in the place of Metadata"),
        (lambda m: {1.5: m}, "cannot be read"),
    ],
)
def test_metadata_that_claims_what_is_not_there(folder: Path, edit: Callable[[Any], Any], message: str) -> None:
    edit_metadata(folder, edit)
    verify(folder)
    with pytest.raises(ConfigError, match=message):
        read_metadata(folder)


def test_a_path_that_leaves_a_folder_without_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    shutil.copy(folder / "__0_0.distcp", folder.parent)
    (folder / "link.distcp").symlink_to("../__0_0.distcp")
    for name in ("../__0_0.distcp", str(folder.parent / "__0_0.distcp"), "link.distcp"):
        edit_metadata(folder, lambda m, name=name: setattr(place_of(m), "relative_path", name))
        with pytest.raises(ConfigError, match=r"is not in that folder|link to .*, outside of"):
            read_metadata(folder)


def test_a_checkpoint_of_an_early_python_3_11(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pickles name the members of an Enum by getattr; what getattr would give is never called."""
    before = chunks_in(folder)

    def reduced(self: Any, protocol: int) -> Any:
        return getattr, (type(self), self.name)

    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduced)
    edit_metadata(folder, lambda metadata: None)
    verify(folder)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert chunks_in(folder) == before
    data = b"\x80\x02cbuiltins\ngetattr\nN\x86R)R."  # a call of what it gives
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pickle(data, {"builtins.getattr"}, folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", None),  # a place in the memo: Python's reader in C takes 64 GiB for it
        (b"\x80\x04X\xff\xff\xff\xff.", "cannot be read"),  # a text of 4 GiB
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),  # a frame
        (b"\x80\x04\x8e\xff\xff\xff\xff\x00\x00\x00\x00.", "cannot be read"),  # BINBYTES8
        (b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s.", "cannot be read"),  # the hash of a tuple of tuples of ...
        (b"\x80\x02ctorch\nSize\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "cannot be read"),  # attributes of a class
        (b"\x80\x02cbuiltins\neval\n.", "asks for 'builtins.eval'"),
        (b"cos\nsystem\n(S'true'\ntR.", "asks for 'os.system'"),
        (b"(S'true'\nios\nsystem\n.", "cannot be read"),
        (b"\x80\x04\x8c\x05torch\x8c\x0bhub.listdir\x93.", "asks for 'torch.hub.listdir'"),
        (b"\x80\x02\x82\x01.", "cannot be read"),  # EXT1
        (b"", "cannot be read"),
        (b"\x80\x02N", "cannot be read"),
        (b"\xff" * 50, "cannot be read"),
    ],
)
def test_pickles_that_want_more(tmp_path: Path, data: bytes, message: str | None) -> None:
    if message is None:
        assert read_pickle(data, {"torch.Size"}, tmp_path) == []
    else:
        with pytest.raises(ConfigError, match=message) as raised:
            read_pickle(data, {"torch.Size"}, tmp_path)
        assert str(tmp_path) in str(raised.value)


def test_an_object_is_read_as_data() -> None:
    record = read_pickle(pickle.dumps(torch.Size([2, 3])), {"torch.Size"}, Path())
    assert isinstance(record, Record)
    assert (record.kind, record.args) == ("torch.Size", ((2, 3),))


# ---- tensors


def archive(
    values: torch.Tensor,
    description: Callable[[bytes], bytes] = lambda text: text,
    compression: int = zipfile.ZIP_STORED,
    **members: bytes,
) -> bytes:
    """``torch.save``'s archive of ``values``, written anew with changes."""
    saved, changed = io.BytesIO(), io.BytesIO()
    torch.save(values, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(changed, "w", compression) as target:
        for member in source.infolist():
            name = member.filename.partition("/")[2]
            content = members.get(name.replace("/", "_").replace(".", "_"), source.read(member))
            target.writestr(member.filename, description(content) if name == "data.pkl" else content, compression)
    return changed.getvalue()


def test_an_archive_that_is_written_anew_is_read(folder: Path) -> None:
    values = torch.randn(2176, 64)
    for saved in (values, values.t().contiguous().t(), torch.cat((values, values))[2176:], values.double()):
        point_to(folder, archive(saved))
        assert torch.equal(embedding(folder), values)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "int64", "bool", "uint16"])
def test_every_dtype_is_read(folder: Path, name: str) -> None:
    values = torch.randint(2, (2176, 64)).to(getattr(torch, name))
    point_to(folder, archive(values))
    assert torch.equal(embedding(folder), values.float())


ROWS = b"M" + struct.pack("<H", 2176)  # as the pickle of a tensor has them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
        ({"data_0": b"1" * 200_000}, "larger than the archive"),
        ({"byteorder": b"big"}, "in another order"),
        ({"description": lambda text: text.replace(ROWS, b"J" + struct.pack("<i", 1 << 30), 1)}, "has the shape"),
        ({"description": lambda text: text.replace(b"K@K\x01", b"J\xff\xff\xff\x7fK\x01")}, "larger than"),
        ({"description": lambda text: text.replace(b"K@K\x01", b"J\xff\xff\xff\xffK\x01")}, "its strides are none"),
        ({"description": lambda text: text.replace(b"FloatStorage", b"HalfStorage")}, None),
        ({"description": lambda text: text.replace(b"FloatStorage", b"DoubleStorage")}, "larger than the archive"),
        ({"description": lambda text: b"\x80\x02N."}, "it is no tensor"),
        ({"description": lambda text: text[:40]}, "cannot be read"),
    ],
)
def test_archives_that_claim_what_is_not_there(folder: Path, changes: dict[str, Any], message: str | None) -> None:
    values = torch.randn(2176, 64)
    content = archive(values, **changes)
    assert content != archive(values)
    point_to(folder, content)
    if message is None:
        embedding(folder)  # another dtype within the bytes: other values, as any file could have
    else:
        with pytest.raises(ConfigError, match=message) as raised:
            embedding(folder)
        assert "own.distcp" in str(raised.value)


SIZES, KEY = ROWS + b"K@\x86", b"X\x01\x00\x00\x000"
DEEP = b")" + b"q\x20h\x20\x86" * 60  # a pair of a pair of ...: its hash, and its text, take forever


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((SIZES, value) for value in (b"N", b"K\x02", b"](" + ROWS + b"K@e", SIZES + b"\x85", ROWS + b"\x85", DEEP)),
        *(
            (SIZES, ROWS + value + b"\x86")
            for value in (b"N", b"\x88", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\x7f" * 9)
        ),
        (SIZES, b"(" + b"K\x01" * 100 + b"t"),
        *((KEY, value) for value in (b"N", b"K\x00", b"]", DEEP, b"ctorch\nFloatStorage\n")),
        *((KEY, b"X" + len(name).to_bytes(4, "little") + name) for name in (b"1", b"../data/0", b"", b"0" * 300)),
    ],
)
def test_tensors_of_another_size_or_name(folder: Path, place: bytes, value: bytes) -> None:
    content = archive(torch.randn(2176, 64), lambda text: text.replace(place, value, 1))
    point_to(folder, content)
    with pytest.raises(
        ConfigError, match=r"own\.distcp: cannot be read at byte 0 \((Value|Key)Error: .{,250}\); restore"
    ):
        embedding(folder)


@pytest.mark.parametrize("claimed", [1 << 31, (1 << 32) - 2])
def test_a_member_that_claims_to_be_larger_than_its_archive(folder: Path, claimed: int) -> None:
    content = bytearray(archive(torch.randn(2176, 64)))
    for place in range(content.index(b"PK\x01\x02"), len(content)):
        if content[place : place + 4] == b"PK\x01\x02":
            content[place + 20 : place + 28] = struct.pack("<II", claimed, claimed)
    point_to(folder, bytes(content))
    with pytest.raises(ConfigError, match="larger than the archive"):
        embedding(folder)


# ---- checkpoint.json, SHA256SUMS and other JSON


@pytest.mark.parametrize(
    "values",
    [
        {"step": "3"},
        {"step": -1},
        {"step": 1 << 80},
        {"step": 1.5},
        {"step": True},
        {"step": None},
        {"seed": float("inf")},
        {"world_size": []},
        {"weights_only": "no"},
        {"model": []},
        {"model": {"name": ["llama3"], "flavor": "", "args": {}}},
        {"model": {"name": "llama3", "flavor": "", "args": []}},
        {"model": {"name": "llama3"}},
        {"buffers": [3]},
        {"buffers": {"a": 1}},
        {"data": []},
        {"step_guard": "none"},
        {"other": 1},
    ],
)
def test_descriptions_of_other_types(folder: Path, values: dict[str, Any]) -> None:
    file = folder / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    reseal(folder)
    with pytest.raises(ConfigError, match=rf"checkpoint.json: {next(iter(values))}: missing, unknown, or of another"):
        read_info(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 1 << 40}, "layers, more than there are tensors"),
        ({"n_layers": "two"}, "n_layers = 'two'"),
        ({"n_layers": 1}, "are in its files and not in the model: layers.1"),
        ({"vocab_size": 1 << 50}, "2 have another shape|no model can be built"),
        ({"dim": 1 << 62}, "no model can be built|have another shape"),
        ({"ffn_dim": 1 << 63}, r"no model can be built of its sizes, .*\)$"),
        ({"n_heads": 0}, "no model can be built"),
        ({"rope_scaling": {"factor": "x"}}, "factor = 'x'"),
        ({"rope_scaling": 3}, "rope_scaling = 3"),
        ({"n_layers": 10_001}, "layers, more than there are tensors"),
        ({"max_seq_len": 1 << 45}, "tables of .* GiB for"),
        ({"max_seq_len": 1 << 24}, "tables of 1.0 GiB for 16,777,216 positions"),
        ({"tie_embeddings": True}, "are one weight in the model, and differ in the checkpoint"),
    ],
)
def test_sizes_that_are_not_those_of_the_weights(
    folder: Path, values: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = folder / "checkpoint.json"
    content = json.loads(file.read_text())
    content["model"]["args"] |= values
    file.write_text(json.dumps(content))
    reseal(folder)
    assert generate.main(["--checkpoint", str(folder), "--prompt", "x", "--max_new_tokens", "1"]) == 2
    assert re.search(message, capfd.readouterr().err.strip())


def test_a_message_does_not_write_to_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = folder / "checkpoint.json"
    content = json.loads(file.read_text())
    content["model"]["name"] = "\x1b]0;title\x07\r\u202e" + "x" * 10**6
    file.write_text(json.dumps(content))
    reseal(folder)
    assert generate.main(["--checkpoint", str(folder), "--prompt", "x"]) == 2
    error = capfd.readouterr().err
    assert r"\x1b]0;title\x07\r\u202ex" in error
    assert error.replace("\n", "").isprintable()
    assert len(error) < 21_000


@pytest.mark.parametrize("name", ["../elsewhere", "/dev/zero", "..", "a/b", "a\x07"])
def test_sums_name_files_of_their_folder(folder: Path, name: str) -> None:
    (folder.parent / "elsewhere").write_text("x")
    reseal(folder, f"{'0' * 64}  {name}\n")
    for read in (read_info, verify):
        with pytest.raises(ConfigError, match=r"SHA256SUMS names .*, which is no file of this folder"):
            read(folder)


def test_metadata_without_a_sum_is_not_verified(folder: Path) -> None:
    (folder / ".metadata").rename(folder.parent / ".metadata")
    reseal(folder)
    (folder.parent / ".metadata").rename(folder / ".metadata")
    with pytest.raises(ConfigError, match=r"\.metadata is not in SHA256SUMS"):
        verify(folder)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{", b"\xff", b"[]", b"3", b"9" * 10_000, b" " * (MOST_JSON + 1), b'{"a": ' * 100_000]
)
def test_json_that_is_none(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"config.json: (is not JSON|holds no JSON object|has more than)"):
        read_json(file)
