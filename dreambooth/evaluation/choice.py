"""The rule that names the checkpoint to keep, from the meter's records alone.

It weighs two measures. Both are logarithms of a loss divided by that of step 0, on the same noise:

- The *fit*: how far the loss on trained photos fell, at middle noise. There the layout of a photo is visible
  and its details are not, so a lower loss means that the subject's details were learned.
- The *harm*: how far the loss on held-out photos rose, at low noise. There nearly everything is visible, so a
  higher loss means that pictures in general are denoised worse.

The score of a step is fit less harm. Named is the last of the steps whose score lies within MARGIN of the
highest one: as long as the score does not fall, pictures go on getting better. Ratios of losses do not depend
on what the base predicts (noise or velocity), nor on the size of its losses, and no weight is tuned.
`benchmarks/choice.py` judges the rule; docs/evidence.md says which measures do not predict and are left out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

LOW, MIDDLE = slice(0, 3), slice(3, 7)  # of the ten bands of timesteps
MARGIN = 0.1  # about twice the scatter of the score from one measurement to the next, late in a run
IN_A_ROW = 3  # A run is worse once so many scores in a row lie more than MARGIN under the highest.

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
    by_step = scores(records)
    if len(by_step) < 2:
        return Choice(None, f"a choice needs two measurements after step 0, and there are {len(by_step)}")
    named = _named(by_step)
    if named is None:
        return Choice(None, "the loss on held-out photos rose more than the loss on trained photos fell")
    later = [value for step, value in by_step.items() if step > named]
    return Choice(named, _why(by_step[named], later), _worse(list(by_step.values())))


def candidates(records: Sequence[Record]) -> list[int]:
    """The measured steps that are named now, or may be after more measurements. That is the present one
    alone: another one is named only if a later step comes within MARGIN of the highest score."""
    named = _named(scores(records))
    return [] if named is None else [named]


def _named(by_step: Mapping[int, Score]) -> int | None:
    """The last step with a score over 0 that lies within MARGIN of the highest one; None without one."""
    least = max((value.total for value in by_step.values()), default=0.0) - MARGIN
    steps = [step for step, value in by_step.items() if value.total >= max(least, 0) and value.total > 0]
    return max(steps, default=None)


def _meters(records: Sequence[Record]) -> dict[int, Mapping[str, Any]]:
    return {record["step"]: record["meter"] for record in records if "meter" in record}


def scores(records: Sequence[Record]) -> dict[int, Score]:
    """The scores of all steps after step 0, in order; {} without a held-out photo or a record of step 0."""
    meters = _meters(records)
    if 0 not in meters or "loss_held_out" not in meters[0]:
        return {}
    by_step = {step: score(meters[step], meters[0]) for step in sorted(meters) if step > 0}
    return {step: value for step, value in by_step.items() if math.isfinite(value.total)}


def score(meter: Mapping[str, Any], at_start: Mapping[str, Any]) -> Score:
    """The measures of a step from its meter record and from that of step 0."""
    fit = [-change for change in _changes(meter, at_start, "loss_trained")[MIDDLE]]
    harm = _changes(meter, at_start, "loss_held_out")[LOW]
    return Score(sum(fit) / len(fit), sum(harm) / len(harm))


def _changes(meter: Mapping[str, Any], at_start: Mapping[str, Any], name: str) -> list[float]:
    """By band, the logarithm of the loss divided by that at step 0; NaN where one of them is 0."""
    pairs = zip(meter[name]["bands"], at_start[name]["bands"], strict=True)
    return [math.log(now / before) if now > 0 and before > 0 else math.nan for now, before in pairs]


def _why(named: Score, later: Sequence[Score]) -> str:
    """Why the step with the score `named` is chosen, in view of the later scores."""
    if not later:
        return "no earlier step is clearly better"
    grows, rises = later[-1].fit > named.fit, later[-1].harm > named.harm
    if grows and rises:
        return "likeness still grows, but the loss on held-out photos rises more"
    return "likeness no longer grows" + (", and the loss on held-out photos rises" if rises else "")


def _worse(in_order: Sequence[Score]) -> str | None:
    """How the run got worse; None unless each of the last IN_A_ROW scores lies MARGIN under the highest."""
    highest, recent = max(value.total for value in in_order), in_order[-IN_A_ROW:]
    if len(recent) < IN_A_ROW or any(value.total >= highest - MARGIN for value in recent):
        return None
    change = f"from {highest:.2f} to {recent[-1].total:.2f}"
    return f"the score of the measurements fell {change}"
