"""Captions beside the photos: read as they are meant, or refused in one message before anything slow."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from dreambooth.data import captions
from dreambooth.io.errors import UserError
from tests.data.captioned import jsonl, lines, wanted

FLAG = "--instance_data_dir"


NAMES = ["a.png", "b.png", "c.jpg"]


TEXTS = {"a.png": "a sks dog on grass", "b.png": "a sks dog, asleep", "c.jpg": "ein sks Hund im Gebüsch"}


@pytest.fixture(autouse=True)
def _no_waiting():
    """A test that would wait for ever, on a pipe, fails instead."""

    def stop(*_: object) -> None:
        pytest.fail("waited for 30 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(folder: Path, names: list[str] = NAMES, **flags: Any) -> tuple[dict[str, str], list[str]]:
    return captions.read(folder, FLAG, names, wanted(**({"caption_column": "text"} | flags)))


def refusal(folder: Path, names: list[str] = NAMES, **flags: Any) -> str:
    with pytest.raises(UserError) as refused:
        read(folder, names, **flags)
    return str(refused.value)


def rows_of(texts: dict[str, Any], column: str = "text") -> list[dict[str, Any]]:
    return [{"file_name": name, column: text} for name, text in texts.items()]


# Metadata files


def test_metadata_jsonl_gives_each_picture_its_caption(folder):
    jsonl(folder, *rows_of(TEXTS))
    assert read(folder) == (TEXTS, [])


def test_metadata_csv_gives_each_picture_its_caption(folder):
    body = (
        'file_name,label,text\r\na.png,1,a sks dog on grass\r\n\r\nb.png,2,"a sks dog, '
        'asleep"\r\nc.jpg,3,ein sks Hund im Gebüsch\r\n'
    )
    (folder / "metadata.csv").write_text(body, encoding="utf-8", newline="")
    assert read(folder) == (TEXTS, [])


def test_captions_come_from_the_column_that_the_flag_names(folder):
    jsonl(folder, *({"file_name": name, "text": "no", "short": text} for name, text in TEXTS.items()))
    assert read(folder, caption_column="short")[0] == TEXTS


def test_image_column_names_the_column_with_the_pictures_names(folder):
    jsonl(folder, *({"photo": name, "file_name": "no", "text": text} for name, text in TEXTS.items()))
    assert read(folder, image_column="photo")[0] == TEXTS


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing(folder):
    body = lines(*rows_of(TEXTS)).replace(b"\n", b"\r\n\r\n")
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + body)
    assert read(folder) == (TEXTS, [])


def test_jsonl_is_read_before_csv_and_txt_and_that_is_said(folder):
    jsonl(folder, *rows_of(TEXTS))
    (folder / "metadata.csv").write_text("file_name,text\na.png,no\n")
    (folder / "a.txt").write_text("no")
    assert read(folder) == (
        TEXTS,
        ["captions are read from metadata.jsonl; not from the metadata.csv and .txt files beside it"],
    )


def test_an_empty_or_missing_caption_leaves_the_picture_to_the_instance_prompt(folder):
    jsonl(
        folder,
        {"file_name": "a.png", "text": " \n "},
        {"file_name": "b.png", "text": None},
        {"file_name": "c.jpg"},
        {"file_name": "d.png", "text": "x"},
    )
    found, notes = read(folder, [*NAMES, "d.png"])
    assert found == {"d.png": "x"}
    assert notes == [
        "3 of 4 photos have an empty caption and are trained with --instance_prompt: a.png, b.png, c.jpg"
    ]


def test_line_breaks_and_control_characters_of_captions_become_spaces(folder):
    jsonl(folder, *rows_of({"a.png": " one\r\ntwo\u2028three\x1b[2Jfour\t", "b.png": "x", "c.jpg": "y"}))
    assert read(folder)[0]["a.png"] == "one two three [2Jfour"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"file_name": "a.png", "text": "x"}, "{broken"],
            f"{FLAG}: metadata.jsonl line 2 is no JSON object",
        ),
        (['["a.png", "x"]'], "line 1 is no JSON object"),
        (["[" * 200_000], "line 1 is no JSON object"),
        (["", {"text": "x"}, {"file_name": "a.png"}], "metadata.jsonl line 2: file_name is missing"),
        ([{"file_name": 7, "text": "x"}], "line 1: file_name is 7, which is not text"),
        (
            [{"file_name": "images/a.png", "text": "x"}],
            "file_name is images/a.png; only pictures directly in the folder are taken",
        ),
        ([{"file_name": "/etc/a.png", "text": "x"}], "only pictures directly in the folder are taken"),
        ([{"file_name": "..", "text": "x"}], "only pictures directly in the folder are taken"),
        ([{"file_name": "images\\a.png", "text": "x"}], "only pictures directly in the folder are taken"),
        ([{"file_name": "a.png", "text": ["x"]}], "line 1: the caption is ['x'], which is not text"),
        ([{"file_name": "a.png", "text": 0}], "line 1: the caption is 0, which is not text"),
        (
            ['{"file_name": "a.png", "text": "\\ud800"}'],
            "line 1: the caption holds a code that is no character: '\\ud800'",
        ),
        (
            ['{"file_name": "a.png", "text": "x\\u0000"}'],
            "line 1: the caption holds a code that is no character: 'x\\x00'",
        ),
        (
            [{"file_name": "a.png", "text": "x"}, {"file_name": "a.png", "text": "x"}],
            "line 2 names a.png again, after line 1",
        ),
        ([{"file_name": "a.png", "text": "x"}], "metadata.jsonl does not name b.png, c.jpg"),
        (
            [{"file_name": "a.png", "caption": "x", "size": 3}],
            "has no column text (--caption_column); its columns are file_name, caption, size",
        ),
        (
            [{"image": "a.png", "text": "x"}],
            "has no column file_name with the names of the pictures; its columns are image, text",
        ),
        ([], "metadata.jsonl is empty"),
    ],
)
def test_a_fault_of_metadata_is_named_with_its_line(folder, rows, message):
    jsonl(folder, *rows)
    assert message in refusal(folder)


def test_all_faults_come_in_one_message_a_line_each(folder):
    jsonl(folder, "{", {"text": "x"}, {"file_name": "a.png", "text": 1}, {"file_name": "z.png", "text": "x"})
    said = refusal(folder).split("\n")
    assert len(said) == 5
    assert all(line.startswith(f"{FLAG}: metadata.jsonl") for line in said)
    assert "names pictures that are not in" in said[3]
    assert said[3].endswith(": z.png")
    assert "does not name b.png, c.jpg" in said[4]


def test_a_file_of_nothing_but_faults_does_not_flood_the_terminal(folder):
    jsonl(folder, *["{"] * 5000)
    said = refusal(folder)
    assert len(said.split("\n")) == 21
    assert "more problems of the captions" in said


def test_pictures_that_are_not_there_or_not_named_are_listed_up_to_five(folder):
    jsonl(folder, *rows_of({f"z{k}.png": "x" for k in range(7)}))
    said = refusal(folder, [f"a{k}.png" for k in range(6)])
    assert said.count("z") == 5
    assert "z4.png and 2 more" in said
    assert "a4.png and 1 more" in said
    assert "a5.png" not in said


def test_a_missing_image_column_names_its_flag(folder):
    jsonl(folder, *rows_of(TEXTS))
    assert (
        "no column photo (--image_column) with the names of the pictures; its columns are file_name, text"
        in refusal(folder, image_column="photo")
    )


def test_captions_cannot_come_from_the_column_of_names(folder):
    jsonl(folder, *rows_of(TEXTS))
    assert refusal(folder, caption_column="file_name").startswith(
        "--caption_column: file_name is the column that names the pictures"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "file_name,text\na.png,a dog, asleep\n",
            "metadata.csv line 2 has 3 cells for 2 columns; a caption with a comma needs quotes",
        ),
        ('file_name,text\na.png,"a dog\n', "is no line of a CSV file"),
        (
            "file_name,text,text\na.png,x,y\n",
            "metadata.csv has several columns of one name: file_name, text, text",
        ),
        (
            "file_name;text\na.png;x\n",
            "has no column file_name with the names of the pictures; its columns are file_name;text",
        ),
        ("", "metadata.csv is empty"),
        (f"file_name,text\na.png,{'x' * 200_000}\n", "field larger than field limit"),
    ],
)
def test_a_fault_of_a_csv_file_is_named(folder, body, message):
    (folder / "metadata.csv").write_text(body)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt"])
def test_captions_that_are_not_utf_8_or_too_large_are_refused(folder, name):
    (folder / name).write_bytes("file_name\n\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"))
    assert f"{FLAG}: {name}: not UTF-8 text (byte 10, in line 2: e9); save it as UTF-8" in refusal(folder)
    with (folder / name).open("wb") as file:
        file.truncate(16 * 2**20 + 1)
    assert f"{FLAG}: {name}: over " in refusal(folder)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt"])
def test_pipes_folders_and_links_outside_are_not_followed(folder, name):
    os.mkfifo(folder / name)
    assert f"{FLAG}: {name}: not a regular file" in refusal(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{FLAG}: {name}: Is a directory" in refusal(folder)
    (folder / name).rmdir()
    (folder / name).symlink_to("/dev/zero")
    assert f"{FLAG}: {name}: not a regular file" in refusal(folder, follow_symlinks=True)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "nowhere")
    assert f"{FLAG}: {name}: No such file" in refusal(folder)
    (folder / name).unlink()
    body = {
        "metadata.jsonl": lines(*rows_of({"a.png": "x"})),
        "metadata.csv": b"file_name,text\na.png,x\n",
        "a.txt": b"x",
    }[name]
    (folder.parent / "elsewhere").write_bytes(body)
    (folder / name).symlink_to(folder.parent / "elsewhere")
    assert "outside the folder; copy the file, or give --follow_symlinks" in refusal(folder, ["a.png"])
    assert read(folder, ["a.png"], follow_symlinks=True)[0] == {"a.png": "x"}


def test_names_that_would_clear_the_screen_are_spelled_out(folder):
    jsonl(folder, {"file_name": "\x1b[2J.png", "text": "x"}, {"file_name": "a.png", "text": "x"})
    said = refusal(folder, ["a.png"])
    assert "\x1b" not in said
    assert "\\x1b[2J.png" in said


def test_damaged_metadata_gives_captions_or_one_message_and_never_another_error(folder):
    rng = random.Random(0)
    pieces = [
        b"\0",
        b'"',
        b"\n",
        b"{",
        b"null",
        b"\\u0000",
        b"\\ud83d",
        b"1e999",
        b"/../",
        b"\xff",
        b"[" * 5000,
    ]
    whole = lines(*rows_of(TEXTS | {"d.png": "", "e.png": 'quoted "words"'}))
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randrange(1, 30)]
                case 2:
                    data[place:place] = rng.choice(pieces)
                case 3:
                    data[place:place] = data[: rng.randrange(len(data))]
        (folder / "metadata.jsonl").write_bytes(data)
        try:
            found, notes = read(folder, [*NAMES, "d.png", "e.png"])
        except UserError as error:
            refused += 1
            said = str(error).split("\n")
        else:
            said = [f"{FLAG}: {note}" for note in notes]
            assert set(found) <= {*NAMES, "d.png", "e.png"}
            assert all(text and text.isprintable() for text in found.values())
        assert all(line.startswith(f"{FLAG}: ") and line.isprintable() for line in said)
        captions.read(folder, FLAG, NAMES, wanted())  # only a note, whatever the file holds
    assert 50 < refused < 100


# .txt files


def test_a_txt_file_beside_each_picture_is_its_caption(folder):
    for name, text in TEXTS.items():
        (folder / name).with_suffix(".txt").write_text(f"\ufeff{text}\r\n", encoding="utf-8")
    assert read(folder, caption_column="anything") == (TEXTS, [])


def test_pictures_without_a_txt_file_are_named_and_get_the_instance_prompt(folder):
    (folder / "a.txt").write_text("first line\nsecond line\n\n")
    (folder / "c.txt").write_text("\n")
    (folder / "notes.txt").write_text("of no picture")
    found, notes = read(folder)
    assert found == {"a.png": "first line second line"}
    assert notes == [
        "no .txt file lies beside b.png: trained with --instance_prompt",
        "1 of 3 photos have an empty caption and are trained with --instance_prompt: c.jpg",
    ]


def test_a_txt_file_of_bytes_is_refused(folder):
    (folder / "a.txt").write_bytes(b"a\0d\0o\0g\0")
    assert f"{FLAG}: a.txt: not a text file, line 1 has a NUL character" in refusal(folder)


def test_a_caption_column_without_captions_says_what_was_looked_for(folder):
    said = refusal(folder)
    assert said.startswith("--caption_column: there are no captions in")
    assert "looked for metadata.jsonl or metadata.csv or a .txt file beside each photo, as in a.txt" in said


def test_caption_files_are_read_and_the_flag_picks_the_ending(folder):
    for name, text in TEXTS.items():
        (folder / name).with_suffix(".caption").write_text(text, encoding="utf-8")
    assert read(folder) == (TEXTS, [])
    (folder / "a.txt").write_text("tags, of a")
    assert read(folder, caption_column=None, caption_extension=".caption") == (TEXTS, [])
    assert read(folder, caption_column=None, caption_extension=".txt") == (
        {"a.png": "tags, of a"},
        ["no .txt file lies beside b.png, c.jpg: trained with --instance_prompt"],
    )
    assert "captions are read from the .txt files; not from the .caption files" in read(folder)[1]


def test_an_ending_without_files_says_what_was_looked_for(folder):
    (folder / "a.txt").write_text("x")
    said = refusal(folder, caption_column=None, caption_extension=".caption")
    assert said.startswith("--caption_extension: there are no captions in")
    assert said.endswith("looked for a .caption file beside each photo, as in a.caption")


def test_a_trigger_word_is_in_front_of_every_caption(folder):
    jsonl(folder, *rows_of(TEXTS | {"a.png": ""}))
    assert read(folder, trigger_word="sks dog")[0] == {
        "b.png": TEXTS["b.png"],
        "c.jpg": f"sks dog, {TEXTS['c.jpg']}",
    }


def test_a_caption_of_commas_is_an_empty_one(folder):
    jsonl(folder, *rows_of(TEXTS | {"a.png": ",, ,", "b.png": ", a dog,"}))
    captions, notes = read(folder)
    assert captions == {"b.png": ", a dog,", "c.jpg": TEXTS["c.jpg"]}
    assert notes == ["1 of 3 photos have an empty caption and are trained with --instance_prompt: a.png"]


# kohya's metadata


def kohya(folder: Path, content: Any) -> dict[str, Any]:
    file = folder.parent / "meta_lat.json"
    file.write_text(json.dumps(content))
    return {"caption_column": None, "in_json": str(file)}


def test_metadata_of_kohya_s_scripts_gives_captions_with_their_tags(folder):
    """Its keys are names without ending, or full paths, also of Windows."""
    flags = kohya(
        folder,
        {
            "a": {"caption": "a dog", "tags": "grass, sunny", "train_resolution": [512, 640]},
            "D:\\old\\b.png": {"tags": "indoors"},
            "/mnt/c.jpg": {"caption": "a cat", "tags": ""},
            "/mnt/other.png": {"caption": "x"},
        },
    )
    assert read(folder, **flags) == (
        {"a.png": "a dog, grass, sunny", "b.png": "indoors", "c.jpg": "a cat"},
        [],
    )


def test_photos_that_kohya_s_metadata_lacks_get_the_instance_prompt(folder):
    found, notes = read(folder, **kohya(folder, {"a": {"caption": "x"}, "b": {}}))
    assert found == {"a.png": "x"}
    assert notes[0].endswith("meta_lat.json does not name c.jpg: trained with --instance_prompt")
    assert notes[1].startswith("1 of 3 photos have an empty caption")


def test_metadata_of_kohya_s_scripts_that_is_of_other_photos_or_no_text_is_refused(folder):
    said = refusal(folder, **kohya(folder, {"x": {"caption": "y"}}))
    assert "names none of the photos; it names x, and the photos are a.png, b.png, c.jpg" in said
    assert "the caption of a.png is 5, which is not text" in refusal(
        folder, **kohya(folder, {"a": {"tags": 5}})
    )
    assert "--in_json" in refusal(folder, **kohya(folder, ["a"]))
    said = refusal(folder, **kohya(folder, {"one/a.png": {"tags": "x"}, "two/a.png": {"tags": "y"}}))
    assert "names a.png several times, one/a.png, two/a.png: keep one of them" in said


def test_a_key_that_kohya_s_metadata_has_twice_is_refused(folder):
    flags = kohya(folder, {})
    Path(flags["in_json"]).write_text('{"a": {"caption": "x"}, "a": {"caption": "y"}}')
    assert refusal(folder, **flags).endswith("a appears twice")


# Without --caption_column


def test_captions_that_are_not_asked_for_are_not_read_and_a_note_says_how_to(folder):
    assert read(folder, caption_column=None) == ({}, [])
    (folder / "a.txt").write_text("x")
    assert read(folder, caption_column=None)[1] == [
        ("captions lie beside the photos (.txt files); --caption_extension .txt reads them")
    ]
    (folder / "metadata.csv").write_text("file_name,caption\na.png,x\n")
    assert read(folder, caption_column=None)[1] == [
        "captions lie beside the photos (metadata.csv); --caption_column caption reads them"
    ]
    jsonl(folder, {"file_name": "a.png", "label": 3, "short": "x", "long": "x y"})
    assert read(folder, caption_column=None) == (
        {},
        ["captions lie beside the photos (metadata.jsonl); --caption_column short reads them"],
    )


def test_metadata_without_text_is_not_spoken_of(folder):
    jsonl(folder, {"file_name": "a.png", "label": 3})
    assert read(folder, caption_column=None) == ({}, [])


def test_unreadable_captions_that_are_not_asked_for_stop_nothing(folder):
    os.mkfifo(folder / "metadata.jsonl")
    found, notes = read(folder, caption_column=None)
    assert found == {}
    assert notes == [
        (
            "captions may lie beside the photos (metadata.jsonl: not a regular file); they are not "
            "read without --caption_column"
        )
    ]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("a.txt", "x" * 10_001, "a.txt has 10,001 characters; the most are 10,000"),
        ("a.txt", "x" * 15_000_000, "a.txt: over 40,004 bytes"),
        ("a.txt", "x\n" * 100_000, "a.txt: over 40,004 bytes"),
        ("metadata.jsonl", "\n" * 1_000_000, "metadata.jsonl: over 200,000 lines"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "' + "x" * 1_000_000 + '"}',
            "metadata.jsonl line 1: the caption has 1,000,000 characters",
        ),
        ("metadata.jsonl", "[" * 1_000_000, "metadata.jsonl line 1 is no JSON object"),
        ("metadata.csv", 'file_name,text\na.png,"' + "x" * 11_000 + '"', "the caption has 11,000 characters"),
        ("metadata.csv", 'file_name,text\na.png,"' + "x" * 1_000_000 + '"', "field larger than field limit"),
    ],
    ids=lambda text: text[:20],
)
def test_a_caption_that_is_far_too_long_is_refused_at_once(folder, file, text, said):
    (folder / file).write_text(text)
    assert said in refusal(folder)


def test_the_longest_caption_is_taken(folder):
    """In UTF-32, with the longest characters."""
    (folder / "a.txt").write_bytes(("\U0001f600" * 10_000).encode("utf-32"))
    assert len(read(folder)[0]["a.png"]) == 10_000
