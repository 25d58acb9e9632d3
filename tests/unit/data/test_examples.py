"""Instructions and HellaSwag as examples, the fields that readers hand on, and every fault of a record."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.support.chats import QWEN25, byte_level, folder, plain, sentencepiece
from titanlite.config.data_sections import Data
from titanlite.data import Tokenizer, load_tokenizer
from titanlite.data.encode_chat import ChatEncoder
from titanlite.data.encode_hellaswag import HellaSwagEncoder
from titanlite.data.encode_instruct import InstructEncoder
from titanlite.data.examples import Encoder
from titanlite.data.readers import LinesReader, ParquetReader, Reader
from titanlite.data.records import Corrupt

# Made in the shape of Rowan/hellaswag.
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof [substeps].  ",
    "ctx_b": "he [title] Then BENDS",
    "ctx": "A man is sitting on a roof [substeps].  he [title] Then BENDS",
    "endings": ["is using wrap.", " rips [step] level tiles off.", "holds a cube.", "pulls up roofing [title] Ends."],
    "label": "3",
}


def both(tmp_path: Path) -> list[Tokenizer]:
    backends = {"bytes": byte_level(), "sentences": sentencepiece()}
    return [load_tokenizer(str(folder(tmp_path / name, backend, None))) for name, backend in backends.items()]


@pytest.mark.parametrize("answer", ["4", " 4", "It  is 4.\n", "\n\n4", "", "é 👩‍🚀", "<|im_end|></s>"])
def test_prompt_and_answer_are_encoded_apart(answer: str, tmp_path: Path) -> None:
    """The prompt has the ids that it has alone, as in inference, and the whole decodes to the text."""
    prompt = "What is 2 + 2? It"
    for tokenizer in both(tmp_path):
        example = InstructEncoder(tokenizer, Data()).encode({"prompt": prompt, "answer": answer})
        alone = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        assert example.tokens[: len(alone)].tolist() == alone
        assert example.tokens[-1] == tokenizer.eos_id
        assert example.scored.tolist() == [False] * len(alone) + [True] * (len(example.tokens) - len(alone))
        assert tokenizer.decode(example.tokens[1:-1]) == prompt + answer
        assert (example.tokens.dtype, example.scored.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("label", [1, "1", " 1 "])
def test_the_label_chooses_of_several_answers(label: object) -> None:
    tokenizer = load_tokenizer()
    data = Data(prompt_field="q", answer_field="as", label_field="n")
    encoder = InstructEncoder(tokenizer, data)
    several = encoder.encode({"q": "a b", "as": ["no", "yes", "no"], "n": label, "prompt": 3})
    one = encoder.encode({"q": "a b", "as": "yes", "n": "any"})
    assert several.tokens.tolist() == one.tokens.tolist()
    assert encoder.identity != InstructEncoder(tokenizer, Data()).identity


def test_hellaswag_trains_on_the_context_as_it_is() -> None:
    tokenizer = load_tokenizer()
    tokens, scored = HellaSwagEncoder(tokenizer).encode(HELLASWAG)
    assert tokenizer.decode(tokens[~scored]) == f"<|begin_of_text|>{HELLASWAG['ctx']}"
    assert tokenizer.decode(tokens[scored]) == " pulls up roofing [title] Ends.<|end_of_text|>"


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"answer": "a"}, r'no field "prompt" \(it has: answer\); .*data\.prompt_field'),
    "no answer": ({"prompt": "a"}, r'no field "answer" \(it has: prompt\); .*data\.answer_field'),
    "null": ({"prompt": "a", "answer": None}, r'"answer" is not a string \(null\); data\.answer_field'),
    "a number": ({"prompt": 1, "answer": "a"}, r'"prompt" is not a string \(int\); data\.prompt_field'),
    "half a character": ({"prompt": "a", "answer": "\udc00"}, '"answer" has half of a surrogate pair'),
    "an empty list": ({"prompt": "a", "answer": [], "label": 0}, '"answer" is not a list of texts'),
    "a list of others": ({"prompt": "a", "answer": ["a", 1], "label": 0}, r'"answer" is not a string \(int\)'),
    "no label": ({"prompt": "a", "answer": ["a", "b"]}, r'no field "label" .*data\.label_field'),
    "an empty label": ({"prompt": "a", "answer": ["a", "b"], "label": ""}, r'"label" is no whole number \(\'\'\)'),
    "a long number": ({"prompt": "a", "answer": ["a", "b"], "label": "1" * 9000}, '"label" is no whole number'),
    "below the range, as text": ({"prompt": "a", "answer": ["a"], "label": "-1"}, '"label" is -1, out of range'),
    "a fraction": ({"prompt": "a", "answer": ["a", "b"], "label": 0.0}, '"label" is no whole number'),
    "a truth": ({"prompt": "a", "answer": ["a", "b"], "label": True}, '"label" is no whole number'),
    "out of range": ({"prompt": "a", "answer": ["a", "b"], "label": 2}, '"label" is 2, out of range: .* 2 texts'),
    "below the range": ({"prompt": "a", "answer": ["a", "b"], "label": -1}, '"label" is -1, out of range'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_that_cannot_be_used(fault: str) -> None:
    record, words = FAULTS[fault]
    with pytest.raises(Corrupt) as error:
        InstructEncoder(load_tokenizer(), Data()).encode(record)
    assert re.search(words, str(error.value)), str(error.value)


@pytest.mark.parametrize("field", HellaSwagEncoder.fields)
def test_what_hellaswag_lacks_is_named(field: str) -> None:
    record = {key: value for key, value in HELLASWAG.items() if key != field}
    with pytest.raises(Corrupt, match=f'no field "{field}" \\(it has: ind') as error:
        HellaSwagEncoder(load_tokenizer()).encode(record)
    assert "data." not in str(error.value)  # no option names these fields


# ---- the fields that readers hand on


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "name": "b"}]}
INSTRUCT = {"prompt": "a", "answer": ["b", "c"], "label": 1}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "gz"])
@pytest.mark.parametrize("name", ["instruct", "chat", "hellaswag"])
def test_readers_hand_on_what_an_encoder_reads(name: str, kind: str, tmp_path: Path) -> None:
    records = [{"a": 1, **{"instruct": INSTRUCT, "chat": CHAT, "hellaswag": HELLASWAG}[name]}] * 5
    tokenizer = load_tokenizer(str(folder(tmp_path, byte_level(), plain(QWEN25))))
    encoders = {"instruct": InstructEncoder, "chat": ChatEncoder}
    encoder: Encoder = encoders[name](tokenizer, Data()) if name in encoders else HellaSwagEncoder(tokenizer)
    file, reader = tmp_path / f"data.{kind}", LinesReader()
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    if kind == "parquet":
        reader = ParquetReader(*encoder.fields)
        parquet.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=2)
    else:
        content = json.dumps(records) if kind == "json" else lines
        file.write_bytes(gzip.compress(content.encode()) if kind == "gz" else content.encode())
    expected = encoder.encode(records[0])
    for first in (0, 3):
        rows = list(reader.records(file, first))
        assert len(rows) == 5 - first
        for row in rows:
            for mine, theirs in zip(encoder.encode(reader.fields(row)), expected):
                assert mine.tolist() == theirs.tolist()


def test_parquet_reads_no_other_column_and_names_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["p"], "wide": ["w"], "answer": ["a"]}), file)
    reader = ParquetReader("prompt", "completion", "label")
    (row,) = reader.records(file, 0)
    assert reader.fields(row) == {"prompt": "p", "wide": None, "answer": None}
    encoder = InstructEncoder(load_tokenizer(), Data(answer_field="completion"))
    with pytest.raises(Corrupt, match=r'no field "completion" \(it has: prompt, wide, answer\); .*data\.answer_field'):
        encoder.encode(reader.fields(row))
    none: Reader = ParquetReader("messages", "conversations")
    (row,) = none.records(file, 0)
    assert none.fields(row) == {"prompt": None, "wide": None, "answer": None}


def test_two_columns_of_a_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, ["prompt", "answer", "answer"])
    parquet.write_table(table, file)
    reader = ParquetReader("prompt", "answer")
    with pytest.raises(Corrupt, match='two columns "answer"'):
        reader.fields(next(iter(reader.records(file, 0))))
