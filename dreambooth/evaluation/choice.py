"""The rule that names the checkpoint to keep, from the meter's records alone.

It weighs two measures. Both are logarithms of a loss divided by that of step 0, on the same noise:

- The *fit*: how far the loss on trained photos fell, at middle noise. There the layout of a photo is visible
  and its details are not, so a lower loss means that the subject's details were learned.
- The *harm*: how far the loss on held-out photos rose, at low noise. There nearly everything is visible, so a
  higher loss means that pictures in general are denoised worse.

The named step is the one with the most fit less harm. Ratios of losses do not depend on what the base
predicts (noise or velocity), nor on the size of its losses, and the rule has no weight to tune.
`benchmarks/choice.py` judges it; docs/evidence.md says which measures do not predict and are left out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

LOW, MIDDLE = slice(0, 3), slice(3, 7)  # of the ten bands of timesteps
# A run is worse once this many measurements in a row have a score that lies this far under the best one.
IN_A_ROW, MARGIN = 2, 0.1

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The step whose adapter to keep."""

    step: int | None
    """None if no step can be named."""
    why: str
    """Why this step, or why none, in one sentence without a full stop."""
    worse: str | None = None
    """How the run has got worse since that step, in one sentence without a full stop; None if it has not."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The measures of one step, in nats: 0.1 is a loss that changed by a tenth."""

    fit: float
    harm: float

    @property
    def total(self) -> float:
        return self.fit - self.harm


def choose(records: Sequence[Record]) -> Choice:
    """The step to keep, from the records of metrics.jsonl. Those without `meter` are passed over."""
    meters = _meters(records)
    if 0 not in meters:
        return Choice(None, "the adapter was not measured at step 0" if meters else "nothing was measured")
    if "loss_held_out" not in meters[0]:
        return Choice(None, "no photo is held out (--holdout or --holdout_data_dir)")
    scores = _scores(records)
    if len(scores) < 2:
        return Choice(None, f"a choice needs two measurements after step 0, and there are {len(scores)}")
    best = _best(scores)
    if scores[best].total <= 0:
        return Choice(
            None, "no measured step has learned more of the subject than it lost on held-out photos"
        )
    later = [value for step, value in scores.items() if step > best]
    return Choice(best, _why(scores[best], later), _worse(scores[best], later))


def candidates(records: Sequence[Record]) -> list[int]:
    """The measured steps that are chosen now, or may be after more measurements: the best so far."""
    scores = _scores(records)
    return [_best(scores)] if scores else []


def _best(scores: Mapping[int, Score]) -> int:
    """The step with the highest score, the first of several."""
    return max(scores, key=lambda step: scores[step].total)


def _meters(records: Sequence[Record]) -> dict[int, Mapping[str, Any]]:
    return {record["step"]: record["meter"] for record in records if "meter" in record}


def _scores(records: Sequence[Record]) -> dict[int, Score]:
    """The scores of all steps after step 0, in order; {} without a held-out photo or a record of step 0."""
    meters = _meters(records)
    if 0 not in meters or "loss_held_out" not in meters[0]:
        return {}
    scores = {step: score(meters[step], meters[0]) for step in sorted(meters) if step > 0}
    return {step: value for step, value in scores.items() if math.isfinite(value.total)}


def score(meter: Mapping[str, Any], at_start: Mapping[str, Any]) -> Score:
    """The measures of a step from its meter record and from that of step 0."""
    fit = [-change for change in _changes(meter, at_start, "loss_trained")[MIDDLE]]
    harm = _changes(meter, at_start, "loss_held_out")[LOW]
    return Score(sum(fit) / len(fit), sum(harm) / len(harm))


def _changes(meter: Mapping[str, Any], at_start: Mapping[str, Any], name: str) -> list[float]:
    """By band, the logarithm of the loss divided by that at step 0; NaN where one of them is 0."""
    pairs = zip(meter[name]["bands"], at_start[name]["bands"], strict=True)
    return [math.log(now / before) if now > 0 and before > 0 else math.nan for now, before in pairs]


def _why(best: Score, later: Sequence[Score]) -> str:
    """Why the step with the score `best` is chosen, in view of the later scores."""
    if not later:
        return "likeness still grows, and held-out photos do not lose as much"
    grows, loses = later[-1].fit > best.fit, later[-1].harm > best.harm
    if grows and loses:
        return "likeness grows on, but held-out photos lose more than it gains"
    return "likeness no longer grows" + (", and held-out photos lose" if loses else "")


def _worse(best: Score, later: Sequence[Score]) -> str | None:
    """How the run got worse; None unless each of the last IN_A_ROW scores lies MARGIN under the best."""
    recent = later[-IN_A_ROW:]
    if len(recent) < IN_A_ROW or any(value.total > best.total - MARGIN for value in recent):
        return None
    change = f"from {best.total:.2f} to {recent[-1].total:.2f}"
    return f"likeness less the loss on held-out photos fell {change} since the best step"
