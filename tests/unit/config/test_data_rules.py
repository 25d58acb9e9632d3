"""Fields of [data] that no data set of the run reads."""

from __future__ import annotations

import pytest

from titanlite.config import check_config, load_config
from titanlite.errors import ConfigError

INSTRUCT, CHAT = "--training.dataset=instruct", "--training.dataset=chat"


@pytest.mark.parametrize(
    ("key", "argv"),
    [
        ("data.prompt_field", ["--data.prompt_field=q"]),
        ("data.answer_field", ["--data.answer_field=a", CHAT]),
        ("data.label_field", ["--data.label_field=n", "--training.dataset=hellaswag"]),
        ("data.messages_field", ["--data.messages_field=m", INSTRUCT]),
        ("data.messages_field", ["--data.messages_field=m", "--validation.dataset=chat", "--validation.enable=false"]),
        ("data.too_long", ["--data.too_long=drop"]),
        ("data.too_long", [INSTRUCT, "--data.too_long=drop", "--data.packing=stream"]),
        ("data.text_field", ["--data.text_field=t", INSTRUCT]),
        ("data.text_field", ["--data.text_field=t", "--training.dataset=hellaswag"]),
        ("data.prompt_field", [INSTRUCT, "--data.prompt_field=answer"]),
        ("data.answer_field", [INSTRUCT, "--data.answer_field=label"]),
    ],
)
def test_a_field_without_effect_is_refused(key: str, argv: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(load_config(argv), 1)
    assert error.value.key == key
    assert error.value.origin == f"the argument --{key}"


@pytest.mark.parametrize(
    "argv",
    [
        [INSTRUCT, "--data.prompt_field=q", "--data.answer_field=a", "--data.label_field=n"],
        [CHAT, "--data.messages_field=m", "--data.too_long=error"],
        ["--data.too_long=drop", "--data.packing=none"],
        ["--data.messages_field=m", "--validation.dataset=chat", "--validation.enable"],
        [INSTRUCT, "--data.text_field=t", "--validation.dataset=json", "--validation.enable"],
        ["--data.text_field=t"],
    ],
)
def test_fields_that_are_read(argv: list[str]) -> None:
    check_config(load_config(argv), 1)
