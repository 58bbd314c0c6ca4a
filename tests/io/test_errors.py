"""The parts of messages: names and texts from files, on one line."""

import pytest

from dreambooth.io.errors import (
    few,
    is_memory_error,
    printable,
    reason_of,
    shortened,
    shown,
    type_and_reason,
)

ESCAPE = "\x1b[31m"


def test_a_name_that_prints_is_unchanged_and_another_is_quoted():
    assert shown("a photo.png") == "a photo.png"
    assert shown(f"{ESCAPE}a\n") == r"'\x1b[31ma\n'"


def test_a_long_value_is_cut():
    assert shortened("a" * 80) == "a" * 80
    assert shortened("a" * 81) == "a" * 80 + "..."
    assert shortened(["a", 1]) == "['a', 1]"
    assert shortened("狗" * 3) == "狗" * 3


def test_of_many_names_some_are_listed_and_the_others_counted():
    assert few([]) == ""
    assert few(["a", "b"]) == "a, b"
    assert few(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert few(["a\n"]) == r"'a\n'"


def test_a_reason_is_one_line_and_never_empty():
    assert reason_of(ValueError("bad\n  value")) == "bad value"
    assert reason_of(KeyError()) == "KeyError"
    assert len(reason_of(ValueError("a" * 1000))) == 300
    assert type_and_reason(KeyError("unet")) == "KeyError: 'unet'"
    assert type_and_reason(KeyError()) == "KeyError"


def test_a_message_keeps_its_lines_and_loses_its_escapes():
    assert printable(f"one\n{ESCAPE}two") == "one\n\\x1b[31mtwo"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")]
)
def test_memory_errors_are_recognized(error):
    assert is_memory_error(error)
    assert not is_memory_error(RuntimeError("Connection closed by peer"))
