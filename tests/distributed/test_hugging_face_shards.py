"""Reading Hugging Face folders on four gloo processes: each reads its own slices, and together they have the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.llama3.hugging_face import HUGGING_FACE
from models.llama3.model import Llama3
from tests.conftest import environment
from tests.distributed.hugging_face_shards import CASES, FOLDERS, SEED
from titanlite.checkpoint.hugging_face_export import write_hugging_face
from titanlite.data import load_tokenizer
from titanlite.distributed.init import WeightInit

PROCESSES = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """What was wrong on each process, by case."""
    out = tmp_path_factory.mktemp("hugging_face")
    for name, args in FOLDERS.items():
        model = Llama3(args)
        model.init_weights(WeightInit(model, SEED))
        params = {key: param.detach() for key, param in model.named_parameters()}
        write_hugging_face(
            out / name,
            HUGGING_FACE.to_config(args),
            {key: param.shape for key, param in params.items()},
            HUGGING_FACE.names(args),
            lambda keys, params=params: {key: params[key] for key in keys},
            load_tokenizer(),
            dtype=torch.float32,
            max_shard_bytes=50_000,
        )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"),
            *(Path(__file__).with_name("hugging_face_shards.py"), out),
        ],
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CASES)
def test_each_process_reads_its_own_slices(ranks: list[dict[str, list[str]]], name: str) -> None:
    assert [rank[name] for rank in ranks] == [[]] * PROCESSES
