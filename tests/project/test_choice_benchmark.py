"""benchmarks/choice.py: its runs and prompts, and its tables on made records."""

from typing import Any

import pytest

from benchmarks import choice, choice_tables
from tests.evaluation.test_choice import record as meter_record


def made(
    subject: str, harms: list[float], joint: list[float], halves: float = 0.0, rate: str = "1e-3"
) -> dict[str, Any]:
    """The record of a run with these harms and values of JOINT after steps 50, 100, ... The half that judges
    has values that are higher by `halves`."""
    steps = [50 * number for number in range(1, len(harms) + 1)]
    scores = {
        str(step): {
            half: {"ID": value, "PA": 1 - value, "JOINT": value + more, "COPY": 0.0}
            for half, more in (("hindsight", 0.0), ("judged", halves))
        }
        for step, value in zip(steps, joint, strict=True)
    }
    meter = [meter_record(0), *(meter_record(step, harm) for step, harm in zip(steps, harms, strict=True))]
    case = {"subject": subject, "rate": rate, "prior": False, "text_encoder": True, "seed": 0}
    return {"case": case, "meter": meter, "scores": scores}


def test_rank_correlations_are_those_of_ranks_with_shared_means():
    assert choice_tables.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert choice_tables.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # by hand: ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3
    assert choice_tables.spearman([1, 2, 2, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert choice_tables.spearman([1, 1, 1], [1, 2, 3]) is None


def test_the_named_step_is_judged_against_the_best_and_the_last():
    run = made("dog", harms=[0.2, 0.6, 1.4], joint=[0.3, 0.7, 0.4], halves=0.1)
    row = choice_tables.judged(run)
    assert (row["named"], row["best"], row["over_trained"]) == (100, [100, 100], True)
    joint = [row[name] for name in ("JOINT_named", "JOINT_best", "JOINT_last")]
    assert joint == pytest.approx([0.75, 0.75, 0.45])


def test_the_best_in_hindsight_is_found_and_judged_by_different_pictures():
    run = made("dog", harms=[0.6, 0.2], joint=[0.5, 0.5])
    run["scores"]["50"]["hindsight"]["JOINT"] = 0.9  # by chance: the other half does not show it
    row = choice_tables.judged(run)
    assert row["JOINT_best_same_pictures"] == pytest.approx(0.7)
    # found by one half at step 50, by the other at step 50 as the first of two
    assert row["JOINT_best"] == pytest.approx((0.5 + 0.9) / 2)
    assert choice_tables.best_in_hindsight(run, "hindsight") == 50


def test_the_table_has_the_figures_of_all_runs():
    runs = [
        made("dog", harms=[0.2, 0.6, 1.4], joint=[0.3, 0.8, 0.4]),
        made("car", harms=[0.2, 0.6, 1.4], joint=[0.8, 0.4, 0.8], rate="2e-3"),
    ]
    figures = choice_tables.summary(runs)
    assert (figures["runs"], figures["over_trained"]) == (2, 1)
    assert figures["share_of_best"] == {"mean": 0.75, "low": 0.5, "high": 1.0, "subjects": 2}
    assert figures["share_of_best_unseen"]["mean"] == 1.0
    assert figures["named_minus_last_over_trained"]["mean"] == 0.4
    lines = choice_tables.table(runs, 16).splitlines()
    assert lines[0] == "2 of 16 runs are measured."
    assert "| dog, 1e-3, no prior, UNet and text | 100 | 100 | 0.80 | 0.80 | 0.40 | never |" in lines
    name = "| loss_held_out, lower than at step 0 | low bands |"
    assert next(line for line in lines if line.startswith(name)) == f"{name} -0.25 | -0.25 | 0.25 | - |"


def test_runs_are_of_all_subjects_rates_and_arms_and_prompts_of_the_halves_differ():
    cases = choice.cases()
    assert len({case.name for case in cases}) == len(cases) >= 12
    for field in ("rate", "prior", "text_encoder"):
        assert len({getattr(case, field) for case in cases}) == 2
    jobs = choice.prompts_of("dog")
    seeds = [{seed for _, seed in jobs[half]} for half in choice.HALVES]
    assert len(seeds[0] | seeds[1]) == 2 * choice.PICTURES
    assert all("sks dog" in prompt and prompt.startswith("a picture of") for prompt, _ in jobs["judged"])
