"""The registry, and that everything that can be named says what is known when a name is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from titanlite.config import load_config
from titanlite.converters import build_converters
from titanlite.errors import ConfigError
from titanlite.models.spec import get_model_spec
from titanlite.registry import Registry, nearest


def build_unheard_of_converter(name: str) -> None:
    mesh: Any = None
    build_converters(load_config([f"--model.converters={name}"]), mesh)


@pytest.fixture
def fruits() -> Registry[int]:
    registry: Registry[int] = Registry("fruit", "basket.fruit")
    registry.add("pear", 1)
    registry.add("apple", 2)
    return registry


def test_entries(fruits: Registry[int]) -> None:
    assert (fruits.get("pear"), fruits.get("apple")) == (1, 2)
    assert fruits.names() == ["apple", "pear"]


def test_register_gives_back_what_it_registers() -> None:
    registry: Registry[Callable[[], str]] = Registry("function", "a.b")

    @registry.register("hello")
    def hello() -> str:
        return "hello"

    assert registry.get("hello") is hello
    assert hello() == "hello"


def test_a_name_is_taken_once(fruits: Registry[int]) -> None:
    with pytest.raises(ValueError, match='the fruit "pear" is registered already'):
        fruits.add("pear", 3)
    assert fruits.get("pear") == 1


def test_unknown_name(fruits: Registry[int]) -> None:
    with pytest.raises(ConfigError) as error:
        fruits.get("aple")
    assert str(error.value) == (
        'basket.fruit = "aple": there is no such fruit (did you mean "apple"?); known: apple, pear'
    )
    with pytest.raises(ConfigError) as error:
        fruits.get("xyzzy")
    assert "did you mean" not in str(error.value)


def test_nearest() -> None:
    assert nearest("seq_length", ["seq_len", "steps"]) == ' (did you mean "seq_len"?)'
    assert nearest("zzz", ["seq_len", "steps"]) == ""
    assert nearest("a", []) == ""


@pytest.mark.parametrize(
    ("ask", "name", "key", "known"),
    [
        (get_model_spec, "llama33", "model.name", ['did you mean "llama3"']),
        (
            lambda name: get_model_spec("llama3").flavor(name),
            "80B",
            "model.flavor",
            ["debugmodel", "8B", "70B", "405B"],
        ),
        (build_unheard_of_converter, "fused_rmsnrm", "model.converters", ['did you mean "fused_rmsnorm"']),
        (build_unheard_of_converter, "fused_rmsnorm,fused_rmsnorm", "model.converters", ["twice"]),
    ],
)
def test_unknown_names_in_the_real_registries(ask: Callable[[str], Any], name: str, key: str, known: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ask(name)
    assert str(error.value).startswith(f'{key} = "{name}": ')
    for part in known:
        assert part in str(error.value)


def test_known_models_are_found_by_name() -> None:
    assert set(get_model_spec("llama3").flavors) >= {"debugmodel", "1B", "3B", "8B", "70B", "405B"}
