"""Every text file of the user's is read by one reader: encodings, line ends, and what is refused."""

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import infer
from dreambooth.data import picture_files
from dreambooth.files import digests, pictures
from dreambooth.files.ownership import WrittenFiles
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


# ---- odd things in place of files


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_links_to_each_other(path: Path) -> None:
    path.symlink_to("b")
    path.with_name("b").symlink_to(path.name)


def make_link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("b"))
    path.symlink_to("b")


def make_a_terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


ODD: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "two links to each other": make_links_to_each_other,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a pipe": make_link_to_a_pipe,
    "a link to its folder": lambda path: path.symlink_to("."),
    "a terabyte of zeros": make_a_terabyte,
}
ODD_TEXTS = {
    "nothing": b"",
    "half of a table": b'{"step": 1, "file": "a',
    "a list": b"[1, 2]",
    "a text": b'"step"',
    "a number": b"1",
    "lists without end": b"[" * 200_000,
    "tables without end": b'{"a":' * 200_000,
    "65 levels": b'{"a":' * 65 + b"1" + b"}" * 65,
    "levels of both kinds": b'{"a":[' * 300 + b"1" + b"]}" * 300,
    "a number of 400 digits": b'{"step": ' + b"9" * 400 + b"}",
    "a negative number of 33 digits": b'{"step": [-' + b"9" * 33 + b"]}",
    "no UTF-8": b'{"step": "\xff\xfe"}',
    "zeros": bytes(100),
    "two tables": b"{}{}",
    "a comma too many": b'{"step": 1,}',
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("read", [reader.read_text, reader.read_json_table, reader.read_yaml])
def test_what_lies_in_place_of_a_file_is_refused_at_once(read, odd, tmp_path):
    ODD[odd](tmp_path / "a")
    with pytest.raises(UserError, match=r"^where: "):
        read(tmp_path / "a", "where")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 256, "b/c", ""])
def test_a_name_that_no_file_can_have_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^where: "):
        reader.read_bytes(Path(name), "where")


@pytest.mark.parametrize("content", ODD_TEXTS.values(), ids=list(ODD_TEXTS))
def test_a_text_that_is_no_table_is_refused(content, tmp_path):
    with pytest.raises(UserError, match=r"^where: "):
        reader.read_json_table(written(tmp_path, content), "where")
    with pytest.raises(UserError, match=r"^where: "):
        reader.parsed_json_table(content, "where")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_large_tables_of_real_bases_are_read(encoding, tmp_path):
    index = {
        "weight_map": {f"down_blocks.{number}.weight": "model-00001.safetensors" for number in range(9000)}
    }
    path = written(tmp_path, json.dumps(index, indent=2).encode(encoding))
    assert reader.read_json_table(path, "where") == index
    deep = '{"a":' * 63 + "{}" + "}" * 63
    assert reader.parsed_json_table(deep, "where") == json.loads(deep)


def test_a_link_is_followed_only_where_that_is_allowed(tmp_path):
    written(tmp_path, b"1")
    (tmp_path / "link").symlink_to("text.txt")
    assert reader.read_bytes(tmp_path / "link", "where") == b"1"
    with pytest.raises(UserError, match="where: a symbolic link"):
        reader.read_bytes(tmp_path / "link", "where", follow_links=False)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": {"a": 1, "c": 2, "a": 3}}', '{"": 1, "": 2}'])
def test_a_key_of_json_may_be_given_once_where_that_matters(text):
    assert reader.parsed_json_table(text, "where")
    with pytest.raises(UserError, match=r"where: not JSON: .*appears twice"):
        reader.parsed_json_table(text, "where", unique_keys=True)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rank: 4\nseed: 1\nrank: 8\n", "line 3: rank is given twice"),
        ("rank: 4\n'rank': 4\n", "line 2: rank is given twice"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5: c is given twice"),
        ("{a: 1, b: 2, a: 3}\n", "line 1: a is given twice"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", "line 3: tables are not merged"),
        ("a: &a {b: 1}\nc:\n  <<: [*a, *a]\n", "line 3: tables are not merged"),
        ("a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1},*a{n - 1}]\n" for n in range(1, 40)), "values"),
        ("[" * 2000, "over 64 levels"),
        (f"- {'[' * 500}{']' * 500}\n" * 200, "over 64 levels"),
        ("- a\n" * 80_000, "over 262,144 bytes"),
        ("a: 1\n---\nb: 2\n", "not a YAML file"),
        ("? [a]\n: 1\n", "not a YAML file"),
        ("a: !!python/object:os.system x\n", "not a YAML file"),
        ("a: " + "9" * 5000, "line 1: a number of 5000 characters"),
        ("- 1\n- 0x" + "f" * 5000, "line 2: a number of 5002 characters"),
        ("a: " + ":".join(["59"] * 4000) + ".5", "line 1: a number of 12001 characters"),
        *((f"a: !!{tag}", "not a YAML file") for tag in ("bool x", "int ''", "float ''", "timestamp x")),
    ],
)
def test_odd_yaml_is_refused_with_its_line(text, fault, tmp_path):
    with pytest.raises(UserError, match=f"^where: .*{fault}"):
        reader.read_yaml(written(tmp_path, text.encode()), "where")


@pytest.mark.parametrize(
    "line",
    [
        '{"file": 5, "size": 1, "sha256": "x"}',
        '{"file": "a\\u0000", "size": 1, "sha256": "x"}',
        '{"file": "\\ud800", "size": 1, "sha256": "x"}',
        '{"file": "a", "size": Infinity, "sha256": "x"}',
        '{"file": "a", "size": -1, "sha256": ""}',
        '{"file": ["a"], "size": 1, "sha256": "x"}',
        '{"file": "a", "size": ' + "9" * 400 + ', "sha256": "x"}',
        '{"file": "' + "a" * 5000 + '", "size": 1, "sha256": "x"}',
        '{"file": {"a": 1}}',
        "[" * 10_000,
    ],
)
def test_an_odd_line_in_the_record_of_written_files_is_passed_over(line, tmp_path):
    files = WrittenFiles(tmp_path)
    files.write("mine", b"1")
    with files.path.open("a") as record:
        record.write(f"{line}\n")
    again = WrittenFiles(tmp_path)
    assert again.written() == ["mine"]
    assert again.foreign(["mine", "a"]) == []


@pytest.mark.parametrize("odd", ODD)
def test_marks_digests_and_kinds_of_odd_things_are_told_at_once(odd, tmp_path):
    path = tmp_path / "a.png"
    ODD[odd](path)
    assert not pictures.is_marked(path)
    assert picture_files.list_folder(tmp_path, "--flag").pictures == ["a.png"]
    if odd != "a terabyte of zeros":
        with pytest.raises(OSError, match=r"."):
            digests.of(path)


def test_a_picture_of_zeros_behind_a_header_is_not_searched_to_its_end(tmp_path):
    path = written(tmp_path, b"\x89PNG\r\n\x1a\n")
    os.truncate(path, 2**40)
    assert not pictures.is_marked(path)


@pytest.mark.parametrize("odd", [name for name in ODD if name != "a link to its folder"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt", "spiece.model"])
def test_an_odd_file_of_a_tokenizer_is_not_passed_over(name, odd, tiny_base, tmp_path):
    from dreambooth.bases import families, loading

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for path in (tiny_base / "tokenizer").iterdir():
        (tokenizer / path.name).symlink_to(path)
    (tokenizer / name).unlink(missing_ok=True)
    ODD[odd](tokenizer / name)
    base = families.find(BaseOptions(str(tiny_base), tokenizer_name=str(tokenizer)))
    with pytest.raises(UserError, match=f"^--tokenizer_name: it of .* cannot be loaded: {name}: "):
        loading.load_tokenizers(base)


def test_a_tokenizer_without_words_is_refused(tiny_base, tmp_path):
    from dreambooth.bases import families, loading

    (tmp_path / "tokenizer_config.json").write_bytes(
        (tiny_base / "tokenizer/tokenizer_config.json").read_bytes()
    )
    base = families.find(BaseOptions(str(tiny_base), tokenizer_name=str(tmp_path)))
    with pytest.raises(UserError, match=r"it has none of tokenizer\.json"):
        loading.load_tokenizers(base)
