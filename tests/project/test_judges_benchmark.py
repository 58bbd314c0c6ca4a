"""The benchmark of judges: its correlations, the orders that must hold, and its table."""

import json

import numpy as np
import pytest

from benchmarks import judges
from benchmarks.claims_arms import SUBJECTS


def drawn(identity: list[float], *, noise: float = 0.0) -> judges.Drawn:
    """Pictures whose likeness follows from their identity."""
    known, shifted = np.array(identity), np.array(identity) + noise * np.arange(len(identity))
    likeness = {"DINO": shifted, "CLIP-I": -shifted}
    own_and_others = np.stack([shifted, shifted - 0.1]), np.stack([known, known - 0.1])
    return judges.Drawn(*own_and_others, likeness, shifted - 0.2, known)


@pytest.fixture
def all_drawn() -> dict[tuple[str, int], judges.Drawn]:
    """Every subject gets nearer with the steps."""
    identity = {0: [0.0, 0.1], 50: [0.2, 0.4], 150: [0.7, 0.9]}
    return {
        (subject, step): drawn(values, noise=0.01)
        for subject in SUBJECTS
        for step, values in identity.items()
    }


def test_correlations_are_pearsons():
    first, second = np.array([1.0, 2, 4]), np.array([1.0, 3, 2])
    by_hand = ((first - 7 / 3) @ (second - 2)) / np.sqrt(
        ((first - 7 / 3) ** 2).sum() * ((second - 2) ** 2).sum()
    )
    assert judges.correlation(first, second) == pytest.approx(by_hand)
    assert judges.correlation(first, np.ones(3)) is None


def test_scores_that_follow_the_reader_correlate(all_drawn):
    result = judges.correlations(all_drawn)
    assert result["DINO and ID"]["pictures"] > 0.99
    assert result["CLIP-I and ID"]["adapters"] < -0.99
    low, high = result["CLIP-T and PA, own prompts"]["interval"]
    assert 0.99 < low <= high <= 1


def test_orders_hold_for_each_subject_alone(all_drawn):
    real = dict.fromkeys(SUBJECTS, 1.0) | {"cat": 0.5}
    rows = judges.invariants(all_drawn, real)
    assert rows["DINO: real, tuned, base"]["holds_for"] == len(SUBJECTS) - 1
    assert rows["CLIP-T of tuned: own prompts, others'"]["holds_for"] == len(SUBJECTS)


def test_the_page_has_the_table_of_the_results():
    """`--tables` writes the same page."""
    results = json.loads(judges.RESULTS.read_text(encoding="utf-8"))
    page = judges.PAGE.read_text(encoding="utf-8")
    assert f"{judges.MARKS[0]}\n{judges.table(results)}\n{judges.MARKS[1]}" in page
