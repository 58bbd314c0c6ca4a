"""Every text file of the user's is read by one reader: encodings, line ends, and what is refused."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

import infer
from dreambooth.io import reader
from dreambooth.io.errors import UserError
from dreambooth.options import adapter_sets
from dreambooth.options.command_line import config_words
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions, TrainOptions

TEXT = "ein Foto, \N{LATIN SMALL LETTER E WITH ACUTE}\nzwei\n"
# Characters at which str.splitlines splits, and a line of a file does not end.
WITHIN_LINES = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def written(folder: Path, content: bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_read(encoding, tmp_path):
    assert reader.read_text(written(tmp_path, TEXT.encode(encoding)), "text") == TEXT


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_both_byte_orders_are_read(mark, tmp_path):
    assert reader.read_text(written(tmp_path, ("\ufeff" + TEXT).encode(mark)), "text") == TEXT


def test_a_mark_where_two_files_were_joined_is_removed_and_a_word_joiner_is_not(tmp_path):
    content = "\ufeffone\r\n\ufeffa\ufeffb\n".encode()
    assert reader.read_text(written(tmp_path, content), "text") == "one\r\na\ufeffb\n"


def test_lines_end_at_line_feed_and_carriage_return_only():
    text = "".join(f"a{character}b" for character in WITHIN_LINES)
    assert reader.lines(f"{text}\n1\r2\r\n\n3") == [text, "1", "2", "", "3"]
    assert reader.lines("") == []
    assert reader.lines("1\n") == ["1"]


@pytest.mark.parametrize(
    ("content", "fault"),
    {
        "Latin-1": (b"one\r\ntwo\rcaf\xe9", "not UTF-8 text (byte 12, in line 3: e9); save it as UTF-8"),
        "a surrogate": (b"\xed\xa0\x80", "not UTF-8 text (byte 0, in line 1: ed a0 80)"),
        "cut": ("\u20ac".encode()[:2], "not UTF-8 text (byte 0, in line 1: e2 82)"),
        "half of UTF-16": (b"\xff\xfea\0\0\xd8", "not UTF-16 text (byte 4, in line 1"),
        "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "not UTF-8 text"),
        "English in UTF-16 without a mark": (
            "a\nb".encode("utf-16-le"),
            "not a text file, line 1 has a NUL character",
        ),
        "NUL": (b"one\ntwo\0", "not a text file, line 2 has a NUL character"),
        "NUL in UTF-16": ("a\0".encode("utf-16"), "not a text file, line 1 has a NUL character"),
    }.values(),
)
def test_what_is_not_text_is_refused_with_its_place(content, fault, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"--flag: {fault}")):
        reader.read_text(written(tmp_path, content), "--flag")


def test_only_regular_files_of_a_limited_size_are_read(tmp_path):
    for name, make in {"pipe": os.mkfifo, "link": lambda path: path.symlink_to("/dev/zero")}.items():
        make(tmp_path / name)
        with pytest.raises(UserError, match=r"^where: not a regular file$"):
            reader.read_text(tmp_path / name, "where")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(UserError, match=r"^where: not a regular file$"):
            reader.read_text(tmp_path / "socket", "where")
    for name, fault in {
        ".": "Is a directory",
        "none": "No such file",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(UserError, match=rf"^where: {fault}"):
            reader.read_text(tmp_path / name, "where")
    path = written(tmp_path, b"12345")
    assert reader.read_text(path, "where", 5) == "12345"
    with pytest.raises(UserError, match="where: over 4 bytes"):
        reader.read_text(path, "where", 4)


# ---- the files of flags


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_of_prompts_gives_the_same_prompts_in_every_form(encoding, end, tmp_path):
    inner = f"a{WITHIN_LINES}b"
    content = end.join(["# comment", " a photo of sks dog ", "", inner, "last"]).encode(encoding)
    options = InferOptions(BaseOptions("base"), prompts_file=str(written(tmp_path, content)))
    assert infer.read_prompts(options) == ["a photo of sks dog", inner, "last"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_flags_are_read_from_yaml_in_every_encoding(encoding, tmp_path):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = written(tmp_path, f"{mark}rank: 4\r\ninstance_prompt: caf\u00e9\r\n".encode(encoding))
    assert config_words(TrainOptions, path) == ["--rank=4", "--instance_prompt=caf\u00e9"]


@pytest.mark.parametrize("character", "\x85\u2028\u2029")
@pytest.mark.parametrize(
    "form", ["dog: {{prompts: ['a{}b']}}", 'dog: {{prompts: ["a{}b"]}}', "dog:\n prompts:\n - a{}b"]
)
def test_a_prompt_in_yaml_keeps_the_characters_that_end_no_line(character, form, tmp_path):
    path = written(tmp_path, form.format(character).encode())
    (adapter_set,) = adapter_sets.of((), (), str(path))
    assert adapter_set.prompts == (f"a{character}b",)


def test_yaml_with_anchors_and_cycles_is_read_or_refused(tmp_path):
    path = written(tmp_path, "a: &a [x\u2028y]\nb: *a\n".encode())
    assert reader.read_yaml(path, "where") == {"a": ["x\u2028y"], "b": ["x\u2028y"]}
    with pytest.raises(UserError, match="where: line 1: the value holds itself"):
        reader.read_yaml(written(tmp_path, b"a: &a [*a, x]\n"), "where")


def test_yaml_keeps_private_characters_of_its_own(tmp_path):
    path = written(tmp_path, "a: '\U000f0000\u2028\U000f0001'\n".encode())
    assert reader.read_yaml(path, "where") == {"a": "\U000f0000\u2028\U000f0001"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "1.txt"])
def test_captions_are_read_in_every_encoding(encoding, name, tmp_path):
    from dreambooth.data import captions
    from dreambooth.options.photos import InstanceOptions

    text = {
        "metadata.jsonl": json.dumps({"file_name": "1.png", "text": "a\u2028dog"}, ensure_ascii=False) + "\r",
        "metadata.csv": "file_name,text\r\n1.png,a\u2028dog\r\n",
        "1.txt": "a\u2028dog\r\n",
    }[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    instance = InstanceOptions("dog", instance_data_dir=str(tmp_path), caption_column="text")
    assert captions.read(tmp_path, "--instance_data_dir", ["1.png"], instance)[0] == {"1.png": "a dog"}
