"""The benchmark of claims: its verdicts, its tables, and that finished runs are not repeated."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks import (
    claims,
    claims_arms,
    claims_mask_arms,
    claims_masks,
    claims_pair_arms,
    claims_pairs,
    claims_runs,
    claims_tables,
)
from benchmarks.claims_arms import ARMS, BY_NAME, CLAIMS, SEEDS, SUBJECTS, Part, Term
from picturebook import subjects
from picturebook.draw import backdrop, draw
from picturebook.subjects import FOLDER
from tests.running import ROOT

LEAST = Part("more", "ID", (Term(1, "unet", 100), Term(-1, "text", 100)), True, 0.05)
MOST = dataclasses.replace(LEAST, is_least=False)
EMBEDDED = claims_runs.Protocol(base=ROOT / "picturebook" / "model")
TINY = claims_runs.Protocol(
    checkpointing=2, places=1, seeds=2, class_pictures=2, other_pictures=1, sampling_steps=1
)


def spread_over_subjects(values: list[float]) -> dict[str, list[float]]:
    return {str(number): [value] * 3 for number, value in enumerate(values)}


def word_of(part: Part, values: list[float]) -> str:
    verdict = claims_tables.verdict_of(part, spread_over_subjects(values))
    assert verdict
    return verdict.word


# ---- verdicts


def test_a_claim_is_held_only_if_the_complete_interval_is_within_the_limit():
    assert word_of(LEAST, [0.06, 0.07, 0.08, 0.09]) == "held"
    assert word_of(LEAST, [0.01, 0.02, 0.03, 0.04]) == "failed"
    assert word_of(LEAST, [0.01, 0.02, 0.08, 0.09]) == "not decided"
    assert word_of(MOST, [0.06, 0.07, 0.08, 0.09]) == "failed"
    assert word_of(MOST, [0.01, 0.02, 0.03, 0.04]) == "held"
    assert word_of(MOST, [0.01, 0.02, 0.08, 0.09]) == "not decided"


def test_a_difference_equal_to_the_limit_is_within_it():
    assert word_of(LEAST, [0.05] * 4) == word_of(MOST, [0.05] * 4) == "held"


def test_a_verdict_is_provisional_while_runs_are_missing():
    values = {"dog": [0.2], "cat": [0.2, 0.2], "car": [0.0]}
    verdict = claims_tables.verdict_of(LEAST, values)
    assert verdict
    assert (verdict.word, verdict.count, verdict.on_side) == ("not decided so far", 4, 3)
    del values["car"]
    verdict = claims_tables.verdict_of(LEAST, values)
    assert verdict
    assert (verdict.word, verdict.count, verdict.on_side) == ("unfinished", 3, 3)
    assert claims_tables.verdict_of(LEAST, {}) is None


def test_differences_are_paired_by_subject_and_seed():
    """A pair counts if both of its runs are there."""
    table = {
        ("unet", 100): {("dog", 0): {"ID": 0.9}, ("dog", 1): {"ID": 0.5}, ("cat", 0): {"ID": 0.4}},
        ("text", 100): {("dog", 0): {"ID": 0.6}, ("cat", 0): {"ID": 0.5}, ("cat", 1): {"ID": 0.0}},
    }
    values = claims_tables.values_of(LEAST, table)
    assert values == {"dog": [pytest.approx(0.3)], "cat": [pytest.approx(-0.1)]}


def test_every_claim_compares_arms_and_steps_that_are_scored():
    steps = {arm.name: arm.steps for arm in ARMS} | {"base": (0,)}
    for claim in CLAIMS:
        assert all(step in steps[arm] for arm, step in claim.rows), claim.letter
        assert all(term.step in steps[term.arm] for part in claim.parts for term in part.terms), claim.letter
    pairs = claims_pair_arms.PAIR_CLAIM
    named = {term.arm for part in pairs.parts for term in part.terms} | {arm for arm, _ in pairs.rows}
    assert named == set(claims_pair_arms.LABELS)
    drawn = [(name, steps) for arm in claims_pair_arms.PAIR_ARMS for name, steps, _ in arm.drawn]
    assert all(steps <= claims_pair_arms.SOURCES[name].steps for name, steps in drawn)
    masks = claims_mask_arms.MASK_CLAIM
    named = {term.arm for part in masks.parts for term in part.terms}
    assert named < {arm for arm, _ in masks.rows} == set(claims_mask_arms.LABELS)
    assert [claim.letter for claim in CLAIMS] == list("abcdefgh")
    assert len(SUBJECTS) * len(SEEDS) >= 12


# ---- tables


def stored(rise: float) -> claims_runs.Results:
    """Results of the base and of two arms; the first has `rise` more ID than the second."""
    results = claims_runs.Results(Path("no such file"))
    scores = dict.fromkeys((*claims_arms.COLUMNS, "ID_all"), 0.25)
    for subject in SUBJECTS:
        results.records[claims_runs.base_key(EMBEDDED, subject)] = {"scores": scores}
        for seed in SEEDS:
            for name, value in (("text+unet", 0.25 + rise), ("unet", 0.25)):
                training = claims_runs.training_of(BY_NAME[name], claims_arms.RATE, subject, seed)
                key = training.result_key(EMBEDDED, 200, claims_arms.WORD)
                results.records[key] = {"scores": scores | {"ID": value}}
    return results


@pytest.mark.parametrize(("rise", "word"), [(0.2, "held"), (0.0, "failed")])
def test_tables_say_what_held_what_failed_and_what_is_unfinished(rise, word, tmp_path, monkeypatch):
    plots: list[str] = []
    monkeypatch.setattr(claims_tables, "plot", lambda claim, table, path: plots.append(path.name))
    page = tmp_path / "evidence.md"
    page.write_text((ROOT / "docs" / "evidence.md").read_text())
    claims.write_tables(EMBEDDED, stored(rise), page)
    text = page.read_text()
    interval = f"{rise:+.3f} [{rise:+.3f}, {rise:+.3f}]"
    count = 12 if word == "held" else 0
    row = f"| more ID after 200 steps, at equal rank | ID | >= +0.05 | {interval} | {count}/12 | **{word}** |"
    assert row in text
    assert (
        "| more ID after 200 steps, at equal parameters | ID | >= +0.05 | no runs yet | 0/0 | unfinished |"
        in text
    )
    assert "| 0 of 12 (unfinished) |" in text
    assert plots == [f"evidence_{letter}.svg" for letter in "abefgh"]  # the claims with runs


def test_the_page_is_what_the_stored_results_give(tmp_path, monkeypatch):
    """`python -m benchmarks.claims --tables` wrote it; its tables are not edited by hand."""
    committed = (ROOT / "docs" / "evidence.md").read_text()
    page = tmp_path / "evidence.md"
    page.write_text(committed)
    monkeypatch.setattr(claims_tables, "plot", lambda claim, table, path: None)
    claims.write_tables(EMBEDDED, claims_runs.Results(claims.RESULTS), page)
    assert page.read_text() == committed


@pytest.mark.slow
@pytest.mark.parametrize("claim", [CLAIMS[0], CLAIMS[4]], ids=["curves", "points"])
def test_the_same_results_give_the_same_plot(claim, tmp_path):
    table = claims.table_of(EMBEDDED, stored(0.1))
    for name in ("one.svg", "two.svg"):
        claims_tables.plot(claim, table, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "JOINT" in (tmp_path / "one.svg").read_text()


# ---- jobs


def test_a_rate_is_chosen_when_all_runs_of_its_search_are_there():
    """Of three rates, the middle one has the most JOINT; while a run is missing there is no rate."""
    results = claims_runs.Results(Path("no such file"))
    for rate, joint in zip(claims_arms.SEARCH_RATES["loha"], (0.1, 0.6, 0.2), strict=True):
        for subject in claims_arms.SEARCH_SUBJECTS:
            assert claims.best_rate("loha", EMBEDDED, results) is None
            arm = claims.search_arm("loha", rate)
            training = claims_runs.training_of(arm, rate, subject, claims_arms.SEARCH_SEED)
            key = training.result_key(EMBEDDED, claims_arms.SEARCH_STEP, claims_arms.WORD)
            results.records[key] = {"scores": {"JOINT": joint, "ID": 0.5}}
    assert claims.best_rate("loha", EMBEDDED, results) == 3e-3


def test_arms_that_differ_in_prompts_only_share_a_training():
    trainings = {
        claims_runs.training_of(BY_NAME[name], 1e-3, "dog", 0).key(EMBEDDED)
        for name in ("text+unet", "other-word", "no-word")
    }
    assert len(trainings) == 1
    job = claims.Job(BY_NAME["no-word"], 1e-3, "dog", 0)
    assert {arm.name for arm in claims.sharing(job)} == {"text+unet", "other-word", "no-word", "averaged"}
    assert claims.sharing(claims.Job(BY_NAME["full"], 1e-3, "dog", 0)) == [BY_NAME["full"]]


def test_prompts_name_every_place_plain_and_with_an_accessory():
    prompts = claims_runs.subject_prompts("dog", "sks", EMBEDDED)
    assert len(prompts) == 16
    assert len(set(prompts)) == 8
    assert sum("wearing" in prompt for prompt in prompts) == 8
    assert "a photo of a sks dog in the snow" in prompts
    assert "a photo of a dog in the snow" in claims_runs.subject_prompts("dog", None, EMBEDDED)


@pytest.fixture(scope="module")
def small_claims(tiny_base, tmp_path_factory) -> tuple[Path, claims_runs.Protocol]:
    """(results, protocol) of two arms of one subject, run to the end."""
    work = tmp_path_factory.mktemp("claims")
    protocol = dataclasses.replace(TINY, base=tiny_base)
    run_small(work, protocol)
    return work, protocol


SMALL = (
    dataclasses.replace(BY_NAME["text+unet"], steps=(2, 4)),
    dataclasses.replace(BY_NAME["default-2"], steps=(2,)),
)


def run_small(work: Path, protocol: claims_runs.Protocol) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "ARMS", SMALL)
        options = claims.Options(
            work=work,
            results=work / "claims.jsonl",
            subjects=("dog",),
            seeds=(0,),
            arms=("text+unet", "default-2"),
        )
        claims.run_all(options, protocol)


def lines_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "claims.jsonl").read_text().splitlines()]


@pytest.mark.trains
def test_every_arm_is_trained_drawn_and_scored(small_claims):
    records = lines_of(small_claims[0])
    assert [(record["arm"], record["step"]) for record in records] == [
        *(("base", 0), ("text+unet", 2), ("text+unet", 4), ("default-2", 2))
    ]
    for record in records:
        assert set(record["scores"]) >= {*claims_arms.COLUMNS}
        assert all(0 <= value <= 1 for value in record["scores"].values())
    trained = {path.name for path in (small_claims[0] / "photos" / "dog").iterdir()}
    assert trained == {path.name for path in sorted(FOLDER.glob("dog/*.png"))[:-1]}


@pytest.mark.trains
def test_finished_runs_are_not_repeated_and_lost_ones_give_the_same_scores(small_claims, monkeypatch):
    """Again: nothing is run. Without the line of one adapter: that one alone, with the same scores."""
    work, protocol = small_claims
    before = lines_of(work)
    trained: list[str] = []
    real = claims.adapters_after

    def counted(training: Any, *rest: Any) -> Path:
        trained.append(training.flags)
        return real(training, *rest)

    monkeypatch.setattr(claims, "adapters_after", counted)
    run_small(work, protocol)
    assert trained == []
    kept = [record for record in before if (record["arm"], record["step"]) != ("text+unet", 4)]
    (work / "claims.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    run_small(work, protocol)
    assert len(trained) == 1
    (again,) = [record for record in lines_of(work) if record not in kept]
    (first,) = [record for record in before if record not in kept]
    assert again["scores"] == first["scores"]


@pytest.mark.trains
def test_the_default_initial_values_are_those_of_peft(small_claims):
    """Kaiming uniform with a = sqrt 5 lies within 1 / sqrt(inputs); the second factor is 0."""
    work, protocol = small_claims
    training = claims_runs.training_of(BY_NAME["default-2"], claims_arms.RATE, "dog", 0)
    path = claims_runs.default_init(training, protocol, work)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    downs = [tensor for name, tensor in tensors.items() if "lora_A" in name or "lora.down" in name]
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name or "lora.up" in name]
    assert len(downs) == len(ups) == len(tensors) / 2
    assert all(0 < tensor.abs().max() <= tensor.shape[1] ** -0.5 for tensor in downs)
    assert not any(tensor.any() for tensor in ups)


@pytest.mark.trains
def test_two_subjects_are_trained_together_mixed_and_one_after_the_other(small_claims, monkeypatch):
    """Pictures of both subjects have their own captions; the second training starts from the first's file."""
    work, protocol = small_claims
    short = {name: dataclasses.replace(s, steps=2) for name, s in claims_pair_arms.SOURCES.items()}
    monkeypatch.setattr(claims_pairs, "SOURCES", short)
    monkeypatch.setattr(claims_pair_arms, "STEPS", 2)
    studio = claims_runs.Studio(protocol)
    for name, drawn in (
        ("alone", ()),
        ("mix-unet", (("first", 2, {"": 1.0, "text_encoder": 0.0}), ("second", 2, {"": 1.0}))),
        ("sequence-kept", (("both-after-first", 2, {"": 1.0}),)),
    ):
        arm = claims_pair_arms.PairArm(name, name, drawn)
        record = claims_pairs.score_pair(studio, arm, ("dog", "cat"), 0, work)
        assert record["subject"] == "dog+cat"
        assert set(record["scores"]) == set(claims_pair_arms.PAIR_CLAIM.columns)
    captions = (work / "photos" / "dog-sks-cat-qwe" / "metadata.jsonl").read_text().splitlines()
    assert sorted({json.loads(line)["text"] for line in captions}) == [
        "a photo of a qwe cat",
        "a photo of a sks dog",
    ]
    runs = [json.loads(path.read_text()) for path in work.glob("adapters/*/run.json")]
    (after,) = [run for run in runs if run.get("starts_from")]
    assert after["starts_from"][0]["subjects"] == [["dog", "sks"]]


def test_a_mask_is_where_the_subject_is_drawn():
    """Where it is black, pictures of two places differ only as their backgrounds do."""
    scene = dataclasses.replace(subjects.make_subject("dog")[0], place="snow", backdrop=0)
    mask = np.asarray(claims_masks.mask_of(scene))
    picture, empty = np.asarray(draw(scene)), np.asarray(backdrop("snow", 0))
    assert 0.1 < mask.mean() / 255 < 0.6
    assert (picture[mask == 0] == empty[mask == 0]).all()
    other = np.asarray(draw(dataclasses.replace(scene, place="night")))
    assert (picture[mask == 255] == other[mask == 255]).all()


@pytest.mark.trains
def test_a_subject_before_one_background_is_trained_with_masks_and_scored(small_claims, monkeypatch):
    work, protocol = small_claims
    monkeypatch.setattr(claims_masks, "STEPS", 2)
    studio = claims_runs.Studio(protocol)
    for arm in (claims_mask_arms.MASK_ARMS[0], claims_mask_arms.MASK_ARMS[-1]):
        record = claims_masks.score_mask_arm(studio, arm, "dog", 0, work)
        assert set(record["scores"]) == set(claims_mask_arms.MASK_CLAIM.columns)
    assert len(list((work / "masks" / "dog-one-place").iterdir())) == 4
    runs = [json.loads(path.read_text()) for path in work.glob("adapters/*/run.json")]
    (masked,) = [run for run in runs if run.get("has_masks")]
    assert (masked["place"], "--unmasked_target base" in masked["flags"]) == ("desert", True)
