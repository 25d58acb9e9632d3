"""Shards that read one file: each gets the rows that it would get alone, and the file is decoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from titanlite.data import build_source, shared_records
from titanlite.data.shared_records import SharedRecords
from titanlite.data.sources import START, Position

ROWS = 100


class File:
    """A file of rows, and how often each was decoded."""

    def __init__(self, size: int = 10, fails_at: int | None = None) -> None:
        self.size, self.fails_at = size, fails_at
        self.decoded: Counter[int] = Counter()

    def records(self, file: int, first: int) -> Iterator[str]:
        for row in range(first, ROWS):
            if row == self.fails_at:
                raise OSError("the disk is gone")
            self.decoded[row] += 1
            yield f"{row}".ljust(self.size)


def rows_of(reader: Iterator[tuple[int, Any]], count: int | None = None) -> list[int]:
    rows = []
    for row, record in reader:
        assert record.strip() == f"{row}"
        rows.append(row)
        if len(rows) == count:
            break
    return rows


@pytest.mark.parametrize("members", [2, 7, 130])
def test_a_file_is_decoded_once_for_all_its_shards(members: int) -> None:
    file = File()
    shared = SharedRecords(file.records)
    readers = [shared.every(0, 0, member, members) for member in range(members)]
    rows: dict[int, list[int]] = {member: [] for member in range(members)}
    for _ in range(ROWS):  # a few at a time, some faster than others
        for member, reader in enumerate(readers):
            rows[member] += rows_of(reader, 1 + member % 3)
    assert rows == {member: [*range(member, ROWS, members)] for member in range(members)}
    assert file.decoded == Counter(range(ROWS))


def test_shards_that_continue_join_each_other() -> None:
    file = File()
    shared = SharedRecords(file.records)
    firsts = [50, 57, 47, 53]  # each after its last row, in rounds that are near
    readers = [shared.every(0, first, member, 4) for member, first in enumerate(firsts)]
    rows = [rows_of(reader, 5) for reader in readers]
    for member, (first, of_member) in enumerate(zip(firsts, rows, strict=True)):
        expected = [row for row in range(first, ROWS) if row % 4 == member]
        assert of_member == expected[:5]
    assert set(file.decoded.values()) == {1}
    assert min(file.decoded) >= 50 - 5 * 4


def test_a_shard_that_falls_behind_reads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_records, "KEPT_BYTES", 10_000)
    file = File(size=1_000)
    shared = SharedRecords(file.records)
    fast, slow = shared.every(0, 0, 0, 2), shared.every(0, 0, 1, 2)
    assert rows_of(slow, 1) == [1]
    assert rows_of(fast) == [*range(0, ROWS, 2)]
    assert rows_of(slow) == [*range(3, ROWS, 2)]
    assert max(file.decoded.values()) == 2


def test_the_next_epoch_begins_while_others_read_on() -> None:
    file = File()
    shared = SharedRecords(file.records)
    first, second = shared.every(0, 0, 0, 2), shared.every(0, 0, 1, 2)
    assert rows_of(first) == [*range(0, ROWS, 2)]
    again = shared.every(0, 0, 0, 2)
    assert rows_of(again, 3) == [0, 2, 4]
    assert rows_of(second) == [*range(1, ROWS, 2)]
    assert rows_of(again) == [*range(6, ROWS, 2)]


def test_a_failure_is_one_of_all_shards_and_no_end() -> None:
    shared = SharedRecords(File(fails_at=40).records)
    readers = [shared.every(0, 0, member, 4) for member in range(4)]
    for reader in readers:
        with pytest.raises(OSError, match="the disk is gone"):
            rows_of(reader)


def test_a_window_is_gone_when_no_shard_reads_in_it() -> None:
    shared = SharedRecords(File().records)
    reader = shared.every(0, 0, 0, 2)
    rows_of(reader, 3)
    assert len(shared._windows[0]) == 1
    del reader
    assert len(shared._windows[0]) == 0


def test_the_shards_of_a_source_have_the_documents_that_they_had(tmp_path: Path) -> None:
    import gzip

    for i in range(2):
        lines = "".join(f'{{"text": "{i} {row}"}}\n' for row in range(200))
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    source = build_source("json", path=str(tmp_path), seed=0)
    by_shard: dict[int, list[Any]] = {shard: [*source.documents(shard, 6, 0, START)] for shard in range(6)}
    for shard, documents in by_shard.items():
        assert [position for position, _ in documents] == [
            Position(shard % 2, row) for row in range(shard // 2, 200, 3)
        ]
        assert len({text.split()[0] for _, text in documents}) == 1
        later = documents[10][0]
        assert [*source.documents(shard, 6, 0, later)] == documents[10:]
