"""Reading Hugging Face folders on four gloo processes: each reads its own slices, and together they have the whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import hugging_face_shards
from tests.distributed.hugging_face_shards import CASES, FOLDERS, SEED
from tests.support.forks import on_ranks
from tests.support.runs import environment
from titanlite.checkpoint.hugging_face_export import write_hugging_face
from titanlite.data import load_tokenizer
from titanlite.distributed.init import WeightInit
from titanlite.models.layers import Decoder
from titanlite.models.llama3.spec import HUGGING_FACE

PROCESSES = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hugging_face")


@pytest.fixture(scope="module")
def ranks(folders: Path) -> list[dict[str, Any]]:
    """What was wrong on each process, by case."""
    for name, args in FOLDERS.items():
        model = Decoder(args)
        model.init_weights(WeightInit(model, SEED))
        params = {key: param.detach() for key, param in model.named_parameters()}
        write_hugging_face(
            folders / name,
            hugging_face_shards.FORMATS.get(name, HUGGING_FACE).to_config(args),
            {key: param.shape for key, param in params.items()},
            hugging_face_shards.weights_of(name),
            lambda keys, params=params: {key: params[key] for key in keys},
            load_tokenizer(),
            dtype=torch.float32,
            max_shard_bytes=50_000,
        )
    return on_ranks(PROCESSES, folders / "ranks", environment(), hugging_face_shards.report, folders)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_each_process_reads_its_own_slices(ranks: list[dict[str, Any]], name: str) -> None:
    assert [rank[name] for rank in ranks] == [[]] * PROCESSES


@pytest.mark.slow
def test_the_disk_delivers_each_file_once_to_all_processes(ranks: list[dict[str, Any]], folders: Path) -> None:
    """Where a file system is in memory, it delivers nothing."""
    page = os.sysconf("SC_PAGE_SIZE")
    pages = sum(-(-file.stat().st_size // page) for file in (folders / "plain").iterdir())
    assert sum(rank["bytes of disk"] for rank in ranks) <= pages * page
