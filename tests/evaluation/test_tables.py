"""The table of an evaluation, from scores of subjects by hand."""

import pytest

from dreambooth.evaluation import tables

DINO = {"a": (0.5, 12), "b": (0.7, 4)}


def entry(base: float, adapter: float | None, real: float | None = 0.8) -> dict:
    """A subject with these DINO scores, each of 4 pairs."""
    methods = {"base": base, "adapter": adapter}
    return {
        "class_noun": "dog",
        "real": {
            "excluding_self": {} if real is None else {"DINO": (real, 2)},
            "including_self": {"DINO": (0.9, 4)},
        },
        "methods": {
            method: {"pictures": 2, "failed": 1, "values": {"DINO": (value, 4)}}
            for method, value in methods.items()
            if value is not None
        },
    }


def test_means_are_over_subjects_and_over_terms():
    summary = tables.summary({name: {"DINO": value} for name, value in DINO.items()})
    assert summary.keys() == {"DINO"}
    assert summary["DINO"]["macro"] == pytest.approx(0.6)
    assert summary["DINO"]["micro"] == pytest.approx((0.5 * 12 + 0.7 * 4) / 16)
    assert summary["DINO"]["interval"] == pytest.approx((0.5, 0.7))
    assert summary["DINO"]["subjects"] == 2


def test_a_subject_without_a_score_does_not_count_in_it():
    rows = tables.table({"one": entry(0.4, 0.6), "two": entry(0.2, None, None)}, ["adapter"])
    real, with_self, base, adapter = rows
    assert (real["scores"]["DINO"]["subjects"], with_self["scores"]["DINO"]["subjects"]) == (1, 2)
    assert (base["scores"]["DINO"]["macro"], base["pictures"], base["failed"]) == (pytest.approx(0.3), 4, 2)
    assert (adapter["subjects"], adapter["scores"]["DINO"]["macro"]) == (1, 0.6)
    # against the base of the same subjects, not of all
    assert adapter["over_base"]["DINO"]["macro"] == pytest.approx(0.2)
    assert "over_base" not in base


def test_both_real_rows_and_the_base_are_in_every_text():
    rows = tables.table({"one": entry(0.4, 0.6)}, ["adapter"])
    text = tables.terminal_text(rows)
    for start in ("Real photos, without self pairs", "Real photos, with self pairs", "base", "adapter"):
        assert any(line.startswith(start) for line in text.splitlines()), start
    assert text.splitlines()[1].split()[-1] == "0.800"


def test_the_reader_has_a_table_of_its_own():
    subject = entry(0.4, 0.6)
    subject["methods"]["base"]["values"]["reader ID"] = (0.25, 2)
    first, second = tables.terminal_text(tables.table({"one": subject}, ["adapter"])).split("\n\n")
    assert ("DINO" in first, "reader ID" in first) == (True, False)
    assert second.splitlines()[0].split() == ["reader", "subjects", "failed", "ID"]
    assert second.splitlines()[3].split() == ["base", "1", "1", "0.250"]


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_the_page_of_one_subject_has_no_table_twice(names):
    subjects = {
        name: {"class_noun": "dog", "real": {}, "methods": {"base": {"scores": {"DINO": 0.4}}}}
        for name in names
    }
    page = tables.markdown(
        {
            "table": tables.table({name: entry(0.4, 0.6) for name in names}, ["adapter"]),
            "subjects": subjects,
            "definitions": {"DINO": "a cosine"},
            "skipped": {},
            "failures": [],
        }
    )
    assert ("Means over all pairs" in page, "one (dog)" in page) == ((len(names) > 1,) * 2)


def test_reasons_are_said_once():
    skipped = {"CLIP-I": "no judge", "CLIP-T": "no judge", "PRES": "no pictures"}
    assert tables.not_computed(skipped) == [
        "not computed: CLIP-I, CLIP-T (no judge)",
        "not computed: PRES (no pictures)",
    ]
