"""Streamed sources: parquet and local copies of hub sets through `datasets`, and the hub out of reach."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from titanlite.data import START, DataLoader, Source, build_source, load_tokenizer, merge_states
from titanlite.errors import ConfigError


def write_parquet(file: Path, texts: list[str | None]) -> None:
    Dataset.from_dict({"url": ["u"] * len(texts), "text": texts}).to_parquet(str(file), batch_size=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in range(3):
        write_parquet(tmp_path / f"{file}.parquet", [f"document {file}.{row}" for row in range(17)])
    return tmp_path


def shards(source: Source, count: int) -> list[list[str]]:
    return [[text for _, text in source.documents(shard, count, 0, START)] for shard in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_document_is_in_one_shard_and_files_are_read_in_order(folder: Path, count: int) -> None:
    source = build_source("parquet", path=str(folder), seed=0)
    dealt = shards(source, count)
    everything = [f"document {file}.{row}" for file in range(3) for row in range(17)]
    assert sorted(itertools.chain(*dealt)) == sorted(everything)
    for part in dealt:
        files = [text.split(".")[0] for text in part]
        assert len([file for file, _ in itertools.groupby(files)]) == len(set(files))
        for file in set(files):
            of_file = [text for text in part if text.startswith(f"{file}.")]
            assert of_file == sorted(of_file, key=everything.index)
    assert min(len(part) for part in dealt) > 0


def test_the_seed_decides_the_order_of_the_files(folder: Path) -> None:
    orders = {tuple(shards(build_source("parquet", path=str(folder), seed=seed), 1)[0]) for seed in range(10)}
    assert len(orders) > 1
    again = [shards(build_source("parquet", path=str(folder), seed=3), 1) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_documents_continue_from_a_position(folder: Path, count: int) -> None:
    source = build_source("parquet", path=str(folder), seed=0)
    everything = list(source.documents(0, count, 0, START))
    for number in (1, len(everything) // 2, len(everything) - 1):
        assert list(source.documents(0, count, 0, everything[number][0])) == everything[number:]


def test_loader_on_a_stream_resumes_over_epochs(folder: Path) -> None:
    tokenizer = load_tokenizer()

    def world(degree: int) -> list[DataLoader]:
        source = build_source("parquet", path=str(folder), seed=0)
        return [
            DataLoader(
                source,
                tokenizer,
                seq_len=16,
                global_batch_size=4,
                local_batch_size=2,
                dp_rank=r,
                dp_degree=degree,
            )
            for r in range(degree)
        ]

    def steps(loaders: list[DataLoader], count: int) -> torch.Tensor:
        return torch.stack([torch.cat([next(loader).inputs.flatten(0, 1) for loader in loaders]) for _ in range(count)])

    one, two, resumed = world(1), world(2), world(1)
    expected = steps(one, 30)
    assert torch.equal(steps(two, 11), expected[:11])
    resumed[0].load_state_dict(merge_states([loader.state_dict() for loader in two]))
    assert torch.equal(steps(resumed, 19), expected[11:])
    assert resumed[0].state_dict() == one[0].state_dict()
    assert min(place[0] for place in one[0].state_dict()["shards"].values()) >= 1
    for loader in (*one, *two, *resumed):
        loader.close()


def test_corrupt_rows(folder: Path) -> None:
    write_parquet(folder / "1.parquet", ["fine", None, "good"])
    with pytest.raises(ConfigError, match=r'1\.parquet, row 2: the field "text" is not a string'):
        shards(build_source("parquet", path=str(folder), seed=0), 1)
    source = build_source("parquet", path=str(folder), on_corrupt="skip", seed=0)
    assert len(shards(source, 1)[0]) == 17 * 2 + 2
    assert source.skipped == 1


def test_missing_text_field(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r'\d\.parquet, row 1: no field "body" \(it has: url, text\)'):
        shards(build_source("parquet", path=str(folder), text_field="body", seed=0), 1)


def test_damaged_parquet_files(folder: Path) -> None:
    data = (folder / "2.parquet").read_bytes()
    (folder / "2.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"2\.parquet: reading failed .*; replace the file"):
        shards(build_source("parquet", path=str(folder), seed=0), 1)
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"(\d\.parquet: reading failed|cannot be read as parquet)"):
        shards(build_source("parquet", path=str(folder), seed=0), 1)


def test_local_copies_of_hub_sets(tmp_path: Path, folder: Path) -> None:
    assert len(shards(build_source("fineweb_edu", path=str(folder), seed=0), 1)[0]) == 51
    copy = tmp_path / "en"
    copy.mkdir()
    for number in range(2):
        lines = [json.dumps({"text": f"{number}.{row}", "url": "u"}) for row in range(4)]
        with gzip.open(copy / f"c4-train.{number}.json.gz", "wt") as file:
            file.write("\n".join(lines))
    assert sorted(shards(build_source("c4", path=str(copy), seed=0), 2)) == [
        [f"{number}.{row}" for row in range(4)] for number in range(2)
    ]
    with pytest.raises(ConfigError, match=r"must be either parquet or JSON lines, not JSON and parquet"):
        build_source("c4", path=str(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("name", "repo"),
    [("c4", "allenai/c4"), ("fineweb_edu", "HuggingFaceFW/fineweb-edu"), ("hub:some.one/a-set", "some.one/a-set")],
)
def test_hub_out_of_reach(name: str, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real failure: the hub's client is told that there is no network."""
    import datasets  # noqa: F401  (its import is not what is timed)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    message = rf'training.dataset = "{name}": {repo} cannot be read from .*\(\w+: .+\); check the network, or set '
    with pytest.raises(ConfigError, match=message + r'training.dataset_path .* training.dataset = "pystdlib"'):
        build_source(name, seed=0)
    assert time.monotonic() - begin < 5


def test_hub_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def load(*args: Any, **options: Any) -> Any:
        asked.append((*args, options))
        return Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()

    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repo, timeout: asked.append(repo))
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert shards(build_source("c4", seed=0), 1) == [["a", "b"]]
    assert shards(build_source("hub:some.one/a-set:v2", seed=0), 1) == [["a", "b"]]
    assert shards(build_source("hub:some.one/a-set", seed=0), 1) == [["a", "b"]]
    streamed = {"split": "train", "streaming": True}
    expected = [("allenai/c4", "en"), ("some.one/a-set", "v2"), ("some.one/a-set", None)]
    assert asked == [request for repo, subset in expected for request in (repo, (repo, subset, streamed))]


@pytest.mark.parametrize("name", ["hub:", "hub:name", "hub:a/b/c", "hub:a/b:c:d", "hub:../etc/passwd:x", "hub:/a"])
def test_an_address_of_the_hub_has_an_owner_and_a_name(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_source(name, seed=0)
    assert (error.value.key, error.value.value) == ("training.dataset", name)


@pytest.mark.parametrize(
    ("rows", "batch", "shards"),
    [
        ([17, 17, 17], 3, 3),
        ([17, 17, 17], 8, 2),
        ([5], 8, 1),
        ([20], 32, 1),
        ([16 * 8], 8, 8),
        ([0, 16 * 8], 8, 8),
        ([1, 1000], 4, 1),
        ([40, 1000], 4, 4),
        ([10] * 40, 8, 8),
    ],
)
def test_every_shard_has_documents(tmp_path: Path, rows: list[int], batch: int, shards: int) -> None:
    """The rule of the sources with an index, 16 documents in a shard, for files of any sizes."""
    for number, count in enumerate(rows):
        write_parquet(tmp_path / f"{number}.parquet", [f"{number}.{row}" for row in range(count)])
    source = build_source("parquet", path=str(tmp_path), seed=0)
    assert source.num_shards(batch) == shards
    dealt = [list(source.documents(shard, shards, 0, START)) for shard in range(shards)]
    assert sum(map(len, dealt)) == sum(rows)
    assert shards == 1 or min(map(len, dealt)) >= 16
