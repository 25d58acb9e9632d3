"""Files of tokenizers from anybody: what is damaged or absurd is refused by name; and identity by content."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from tests.support.forks import on_ranks
from tests.unit.data.test_document_tokens import NEW, folder_of
from titanlite.data import load_tokenizer
from titanlite.data.tokenizer import SHIPPED
from titanlite.data.tokenizer_identity import differences
from titanlite.errors import ConfigError

SMALL = {"version": "1.0", "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3}, "merges": []}}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def changed(**parts: Any) -> bytes:
    return json.dumps({**SMALL, **parts}).encode()


def model(**parts: Any) -> bytes:
    return changed(model={**SMALL["model"], **parts})  # type: ignore[dict-item]


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "binary": bytes(range(256)) * 20,
    "cut": SHIPPED.read_bytes()[:20_000],
    "no JSON": b"version https://git-lfs.github.com/spec/v1\n",
    "null": b"null",
    "a list": b"[]",
    "nothing in it": b"{}",
    "no model": json.dumps({"version": "1.0"}).encode(),
    "an empty model": changed(model={}),
    "another type of model": model(type="Neural"),
    "a list for a vocabulary": model(vocab=["a"]),
    "text for an id": model(vocab={"a": "b"}),
    "a negative id": model(vocab={"a": -1}),
    "no vocabulary": model(vocab={}),
    "an absurd id": model(vocab={"<s>": 0, "</s>": 1, "a": 4_294_967_295}),
    "an id of no machine": model(vocab={"<s>": 0, "</s>": 1, "a": 10**40}),
    "a merge of unknown tokens": model(merges=[["a", "x"]]),
    "a merge without its result": model(merges=[["a", "b"]]),
    "an absurd added token": changed(added_tokens=[{"id": 4_000_000_000, "content": "<x>", **ADDED}]),
    "an added token of another type": changed(added_tokens=[{"id": 4, "content": 7, **ADDED}]),
    "added tokens of another type": changed(added_tokens="none"),
    "a damaged normalizer": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "an unknown normalizer": changed(normalizer={"type": "Translate"}),
    "a damaged pattern": changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                                "invert": False}),
    "nested": b'{"version":"1.0","normalizer":' + b'{"type":"Sequence","normalizers":[' * 50_000,
    "brackets": b"[" * 1_000_000,
    "too large": b" " * 100_000_001,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_vocabulary_is_refused_by_name(
    damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(DAMAGED[damage])
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path))
    assert (error.value.key, error.value.value) == ("model.tokenizer_path", str(file))
    assert len(error.value.why) < 600
    assert capfd.readouterr().err == ""  # no stack trace of the library either


def test_places_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder" / "tokenizer.json").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "tokenizer.json").symlink_to("nowhere.json")
    os.mkfifo(tmp_path / "pipe")
    names = ["folder", "link", "pipe", "x" * 5000, "a\0b", "~nobody-of-this-name/x"]
    for name in names:
        with pytest.raises(ConfigError) as error:
            load_tokenizer(name if name.startswith(("~", "a")) else str(tmp_path / name))
        assert error.value.key == "model.tokenizer_path"


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "original/tokenizer.model", "original", "tokenizer_config.json",
     "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
     "tokenizer_identity.json"],
)  # fmt: skip
def test_no_file_of_a_tokenizer_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    folder, outside = folder_of(tmp_path / "folder", {}), tmp_path / "secret"
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(NEW))
    if name.endswith(".model") or name == "original":
        (folder / "tokenizer.json").unlink()
    outside.mkdir()
    (outside / "tokenizer.model").write_text("a password")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(outside if name == "original" else outside / "tokenizer.model")
    with pytest.raises(ConfigError, match=rf"{folder / name}.*is a link to {outside}.*, outside of {folder}") as error:
        load_tokenizer(str(folder))
    assert error.value.key == "model.tokenizer_path"


def test_links_within_the_folder_and_the_users_own_are_followed(tmp_path: Path) -> None:
    for name in ("blobs", "snapshots"):
        (tmp_path / "models--a--b" / name).mkdir(parents=True)
    folder = folder_of(tmp_path / "models--a--b" / "snapshots" / "1", {"tokenizer_config": NEW})
    for file in list(folder.iterdir()):
        blob = tmp_path / "models--a--b" / "blobs" / file.name
        file.rename(blob)
        file.symlink_to(f"../../blobs/{file.name}")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(NEW))
    (tmp_path / "other" / "named.json").symlink_to(folder / "tokenizer.json")
    for path in (folder, folder / "tokenizer.json", tmp_path / "link", tmp_path / "other" / "named.json"):
        assert load_tokenizer(str(path)).eos_id == 4


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = folder_of(tmp_path / name, {"tokenizer_config": NEW})
        (folder / name).chmod(0)
        if os.access(folder / name, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_tokenizer(str(folder))


TIKTOKEN: dict[str, bytes] = {
    "an absurd rank": b"YQ== 99999999999999999999\n",
    "digits without end": b"YQ== " + b"9" * 100_000 + b"\n",
    "a negative rank": b"YQ== -1\n",
    "an absurd token": b"QUFB" * 1_000_000 + b" 256\n",
    "empty": b"",
    "binary": bytes(range(1, 256)),
    "a line of three": b"YQ== 0 0\n",
    "too large": b"\n" * 100_000_001,
}


@pytest.mark.parametrize("damage", TIKTOKEN)
def test_a_damaged_tiktoken_file_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    import base64

    file = tmp_path / "tokenizer.model"
    singles = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    file.write_bytes(
        singles + TIKTOKEN[damage] if damage in ("an absurd token", "a line of three") else TIKTOKEN[damage]
    )
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(file))
    assert (error.value.key, error.value.value) == ("model.tokenizer_path", str(file))


def load_within(gib: float, files: list[str]) -> list[str]:
    """The errors of loading ``files`` with so much more memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return [refused_as(file) for file in files]


def refused_as(file: str) -> str:
    try:
        load_tokenizer(file)
    except ConfigError as e:
        return e.why
    return ""


def test_absurd_files_take_no_memory(tmp_path: Path) -> None:
    """Absurd ids and sizes are refused before anything of their size is allocated."""
    folders = {
        "id": DAMAGED["an absurd id"],
        "added": DAMAGED["an absurd added token"],
        "brackets": DAMAGED["brackets"],
    }
    for name, content in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes(content)
    (tmp_path / "sparse.json").touch()
    os.truncate(tmp_path / "sparse.json", 1 << 40)
    files = [*(str(tmp_path / name) for name in folders), str(tmp_path / "sparse.json")]
    (errors,) = on_ranks(1, tmp_path / "process", dict(os.environ), load_within, 1.0, files)
    for error, word in zip(errors, ["4,294,967,295", "4000000000", "is not a Hugging Face", "100,000,000 bytes"]):
        assert word in error


def test_a_text_on_which_the_library_fails(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(((((a+)+)+)+)+)$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_bytes(changed(pre_tokenizer=split))
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path)).encode_batch(["a" * 60 + "b"])
    assert (error.value.key, error.value.value) == ("model.tokenizer_path", str(tmp_path / "tokenizer.json"))


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
ANY = {"Regex": ""}


@pytest.mark.parametrize(
    ("part", "kind", "inner"),
    [
        ("normalizer", "normalizers", [REPLACE] * 20_000),
        ("normalizer", "normalizers", [{**REPLACE, "content": "a" * 20_000}]),
        ("normalizer", "normalizers", [{**REPLACE, "pattern": ANY, "content": "a" * 200}] * 2),
        ("normalizer", "normalizers", [{"type": "Prepend", "prepend": "a" * 200}] * 2),
        ("normalizer", "normalizers", [{"type": "Sequence", "normalizers": [REPLACE] * 30}] * 2),
        ("decoder", "decoders", [REPLACE] * 60),
    ],
)
def test_parts_that_make_a_text_longer_without_end(part: str, kind: str, inner: list[Any], tmp_path: Path) -> None:
    content = {"type": "Sequence", kind: inner}
    (tmp_path / "tokenizer.json").write_bytes(changed(**{part: content}))
    with pytest.raises(ConfigError, match="times as long, and at most 10,000"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(changed(**{part: {**content, kind: [REPLACE] * 3}}))
    assert load_tokenizer(str(tmp_path)).vocab_size == 4


def test_dropout_is_off(tmp_path: Path) -> None:
    """It would give a text other ids each time."""
    content = json.loads(SHIPPED.read_text())
    content["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path)).encode("import os") == load_tokenizer().encode("import os")


VALUES = [None, True, -1, 10**12, "", "x" * 1000, "\ud800", [], {}, [[]], {"type": "BPE"}]


def mutated(content: Any, random: Random) -> bytes:
    """JSON with one value dropped or of another type, or with some bytes changed."""
    if random.random() < 0.6:
        content = json.loads(json.dumps(content))
        holder, key = random.choice(list(places(content, random)))
        if random.random() < 0.4:
            del holder[key]
        else:
            holder[key] = random.choice(VALUES)
        return json.dumps(content).encode()
    data = bytearray(json.dumps(content).encode())
    for _ in range(random.choice([1, 3, 30])):
        at = random.randrange(len(data))
        data[at : at + random.randrange(2)] = random.choices(b'{}[]",:0 \x00\xff', k=random.randrange(1, 20))
    return bytes(data)


def places(content: Any, random: Random) -> Iterator[tuple[Any, Any]]:
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else []
    for key in random.sample(keys, 3) if len(keys) > 40 else keys:
        yield content, key
        yield from places(content[key], random)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 10))], ids=lambda s: f"seed {s}"
)
def test_mutated_folders(seed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each loads and gives ids of its vocabulary, or is refused in one message."""
    listed = {"content": "<|begin_of_text|>", **ADDED}
    contents = {
        "tokenizer.json": json.loads(SHIPPED.read_text()),
        "tokenizer_config.json": {"bos_token": listed, "added_tokens_decoder": {"2046": listed}},
        "special_tokens_map.json": {"bos_token": "<|begin_of_text|>", "eos_token": listed},
        "added_tokens.json": {"<|begin_of_text|>": 2046},
        "config.json": {"bos_token_id": 2046, "eos_token_id": [2047]},
        "tokenizer_identity.json": load_tokenizer().identity,
    }
    random = Random(seed)
    for _ in range(60):
        names = ["tokenizer.json", *(name for name in contents if random.random() < 0.6)]
        victim = random.choice(names)
        for name, content in contents.items():
            (tmp_path / name).unlink(missing_ok=True)
            if name in names:
                text = mutated(content, random) if name == victim else json.dumps(content).encode()
                (tmp_path / name).write_bytes(text)
        try:
            tokenizer = load_tokenizer(str(tmp_path))
            ids, refusal = tokenizer.encode("import os\n  x = 'é'"), None
        except ConfigError as error:
            refusal = error
        if refusal is None:
            assert max([*ids, tokenizer.bos_id, tokenizer.eos_id]) < tokenizer.vocab_size
            assert tokenizer.files()
        else:
            assert refusal.key == "model.tokenizer_path"
            assert len(str(refusal).encode()) < 1000
    assert "panicked" not in capfd.readouterr().err


# ---- identity


def change_nothing(backend: tokenizers.Tokenizer) -> None: ...


def change_other_parts(backend: tokenizers.Tokenizer) -> None:
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.decoder = None
    backend.post_processor = None


def change_vocabulary(backend: tokenizers.Tokenizer) -> None:
    names = ["<unk>", "<s>", "</s>", "[BOS]", "[EOS]", "<|endoftext|>", "<bos>", "<eos>", "b", "a"]
    backend.model = models.BPE({name: n for n, name in enumerate(names)}, [], unk_token="<unk>")


def change_normalizer(backend: tokenizers.Tokenizer) -> None:
    backend.normalizer = normalizers.Lowercase()


def change_pre_tokenizer(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def add_token(backend: tokenizers.Tokenizer) -> None:
    backend.add_tokens(["new"])


@pytest.mark.parametrize(
    ("change", "config", "expected"),
    [
        (change_nothing, NEW, ""),
        (change_other_parts, NEW, ""),
        (change_vocabulary, NEW, "vocabulary"),
        (change_normalizer, NEW, "normalizer"),
        (change_pre_tokenizer, NEW, "pre-tokenizer"),
        (add_token, NEW, "added tokens"),
        (change_nothing, {**NEW, "eos_token": "</s>"}, "EOS ([EOS] (4) and </s> (2))"),
        (change_nothing, {"bos_token": None, "eos_token": "[EOS]"}, "BOS ([BOS] (3) and [EOS] (4))"),
    ],
)
def test_the_identity_is_what_decides_the_ids(
    change: Callable[[tokenizers.Tokenizer], None], config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    one = load_tokenizer(str(folder_of(tmp_path / "one", {"tokenizer_config": NEW})))
    folder = folder_of(tmp_path / "other", {"tokenizer_config": config})
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(backend)
    backend.save(str(folder / "tokenizer.json"))
    other = load_tokenizer(str(folder))
    assert differences(one.identity, other.identity) == expected
    assert (one.identity["sha256"] == other.identity["sha256"]) == (expected == "")


def test_the_identity_survives_rounding(tmp_path: Path) -> None:
    """The library rounds the scores of a vocabulary when it reads them, and so a copy has others in the last place."""
    scores = [("<s>", 0.0), ("</s>", 0.0), *((f"t{i}", -1e3 * (i * 0.618034 % 1)) for i in range(2000))]
    backend = tokenizers.Tokenizer(models.Unigram(scores, 0))
    (tmp_path / "one").mkdir()
    backend.save(str(tmp_path / "one" / "tokenizer.json"))
    one = load_tokenizer(str(tmp_path / "one"))
    one.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).identity == one.identity


def test_a_copy_that_was_changed_is_refused(tmp_path: Path) -> None:
    load_tokenizer().save(tmp_path)
    assert load_tokenizer(str(tmp_path)).identity == load_tokenizer().identity
    note = tmp_path / "tokenizer_identity.json"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|begin_of_text|>"}))
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path))
    assert (error.value.key, error.value.value) == ("model.tokenizer_path", str(tmp_path / "tokenizer.json"))
    assert f"EOS (<|end_of_text|> (2047) and <|begin_of_text|> (2046)); restore it, or, if you changed it on purpose, "\
           f"delete {note}" in error.value.why  # fmt: skip
    note.write_text(json.dumps({**json.loads(note.read_text()), "tokenizers": "0.1"}))
    load_tokenizer(str(tmp_path))  # another version of the library may write the same in another form
    note.write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object"):
        load_tokenizer(str(tmp_path))
    note.write_text('{"sha256": 3}')
    with pytest.raises(ConfigError, match="holds no identity"):
        load_tokenizer(str(tmp_path))
    note.unlink()
    assert load_tokenizer(str(tmp_path)).eos_id == 2046
