"""The rule that names the checkpoint to keep, from the meter's records alone.

It looks at one measure, the *harm* of a step: the logarithm of the loss on held-out photos at low noise,
divided by that of step 0 on the same noise. At low noise nearly everything of a photo is visible, so a higher
loss means that pictures in general are denoised worse. Named is the last step whose harm is at most LIMIT: as
long as the model is not damaged, more steps give better pictures. A ratio of losses does not depend on what
the base predicts (noise or velocity), nor on the size of its losses.

`benchmarks/choice.py` judges the rule; docs/evidence.md says which measures do not predict and are left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOW = slice(0, 3)  # of the ten bands of timesteps
LIMIT = 1.0  # a loss of 2.7 times the base's
IN_A_ROW = 3  # A run is worse once so many measurements in a row lie over the limit.

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """The step whose adapter to keep."""

    step: int | None
    """None if no step can be named."""
    why: str
    """Why this step, or why none, in one sentence without a full stop."""
    worse: str | None = None
    """How the run has got worse since that step, in one sentence without a full stop; None if it has not."""


def choose(records: Sequence[Record]) -> Choice:
    """The step to keep, from the records of metrics.jsonl. Those without `meter` are passed over."""
    meters = _meters(records)
    if 0 not in meters:
        return Choice(None, "the adapter was not measured at step 0" if meters else "nothing was measured")
    if "loss_held_out" not in meters[0]:
        return Choice(None, "no photo is held out (--holdout or --holdout_data_dir)")
    by_step = harms(records)
    if not by_step:
        return Choice(None, "nothing was measured after step 0")
    named = max((step for step, harm in by_step.items() if harm <= LIMIT), default=None)
    if named is None:
        return Choice(None, f"at low noise the loss on held-out photos is always over {_times(LIMIT)}")
    later = [harm for step, harm in by_step.items() if step > named]
    if not later:
        loss = f"at low noise the loss on held-out photos is {_times(by_step[named])}"
        return Choice(named, f"up to the last measurement pictures are not damaged: {loss}")
    why = f"later steps damage pictures: at low noise the loss on held-out photos is over {_times(LIMIT)}"
    is_worse = len(later) >= IN_A_ROW
    worse = f"at low noise the loss on held-out photos is {_times(later[-1])}" if is_worse else None
    return Choice(named, why, worse)


def harms(records: Sequence[Record]) -> dict[int, float]:
    """The harm of each step after step 0, in order; {} without a held-out photo or a record of step 0. Steps
    whose losses are not finite are left out."""
    meters = _meters(records)
    if 0 not in meters or "loss_held_out" not in meters[0]:
        return {}
    by_step = {step: harm(meters[step], meters[0]) for step in sorted(meters) if step > 0}
    return {step: value for step, value in by_step.items() if math.isfinite(value)}


def harm(meter: Mapping[str, Any], at_start: Mapping[str, Any]) -> float:
    """The harm of a step in nats, from its meter record and that of step 0: the mean over the bands of low
    noise. NaN where a loss is 0."""
    pairs = zip(meter["loss_held_out"]["bands"][LOW], at_start["loss_held_out"]["bands"][LOW], strict=True)
    changes = [math.log(now / before) if now > 0 and before > 0 else math.nan for now, before in pairs]
    return sum(changes) / len(changes)


def _meters(records: Sequence[Record]) -> dict[int, Mapping[str, Any]]:
    return {record["step"]: record["meter"] for record in records if "meter" in record}


def _times(harm: float) -> str:
    return f"{math.exp(harm):.1f} times the base's"
