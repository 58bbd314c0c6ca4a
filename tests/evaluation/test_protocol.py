"""The prompts and subjects of the DreamBooth paper, and prompts of the user."""

import pytest

from dreambooth.evaluation import protocol
from dreambooth.io.errors import UserError


def test_the_paper_has_25_prompts_for_objects_and_25_for_live_subjects():
    objects, live = protocol.OBJECT_PROMPTS, protocol.LIVE_PROMPTS
    assert len(objects) == len(live) == 25
    assert len({*objects, *live}) == 35
    assert (live[:10], live[20:]) == (objects[:10], objects[20:])
    for template in (*objects, *live):
        assert template.startswith("a ")
        assert template.count("{0} {1}") == 1, template
    assert protocol.filled(live[13], "sks", "cat") == "a sks cat wearing a black top hat and a monocle"


def test_the_data_set_has_30_subjects_of_15_classes_9_of_them_live():
    assert len(protocol.CLASSES) == 30
    assert len(set(protocol.CLASSES.values())) == 15
    assert sum(noun in protocol.LIVE_CLASSES for noun in protocol.CLASSES.values()) == 9


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {0} {1} in the snow", "a dog in the snow"),
        ("{0} {1} asleep", "dog asleep"),
        ("a {1}, {0}", "a dog,"),
        ("the red {0}  {1}", "the red dog"),
    ],
)
def test_the_text_for_clip_lacks_the_rare_word(template, text):
    assert protocol.without_rare_word(template, "dog") == text


def test_words_are_put_in_as_they_are():
    assert protocol.filled("a {0} {1} {x}", "s%s", "teddy bear") == "a s%s teddy bear {x}"


def test_a_prompts_file_has_a_template_on_each_line(tmp_path):
    (tmp_path / "p.txt").write_text("# mine\n\n a {0} {1} \r\na {1} that is {0}\n")
    assert protocol.read_prompts(tmp_path / "p.txt") == ("a {0} {1}", "a {1} that is {0}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"p\.txt: no prompt in it"),
        ("# only this\n", "no prompt in it"),
        ("a {0} {1}\n\na dog in the snow\n", r"line 3 must have \{0\}, where the rare word goes"),
        ("a sks {1}\n", r"line 1 must have .*; got 'a sks \{1\}'"),
        ("a {0}\n", "line 1 must have"),
        ("a {0} {1}\na {0} {1}\n", "line 2 is line 1 again"),
    ],
)
def test_a_wrong_prompts_file_is_refused_with_the_line(content, message, tmp_path):
    (tmp_path / "p.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        protocol.read_prompts(tmp_path / "p.txt")
