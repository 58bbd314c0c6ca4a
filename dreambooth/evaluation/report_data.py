"""Numbers and sentences of a run's page, from the run's records."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

_SMOOTHED_ROWS = 64  # a mean over fewer rows says more about the rows than about the adapter
_STEP_NAME = re.compile(r"validation/step-([0-9]{6,})-(?:([0-9]{2,})-)?([0-9]{2,})\.png")
_FINAL_NAME = re.compile(r"validation/image_(?:([0-9]{2,})_)?([0-9]+)\.png")
_WEIGHT_NAME = re.compile(r"validation/weight-([0-9]+\.[0-9]{2})\.png")

HARM = (
    "How far the loss on held-out photos rose at low noise, as a logarithm: 1 is 2.7 times the base's. The"
    " last step with at most 1 is chosen."
)
METERS = {
    "gap": (
        "Gap",
        "Loss on held-out photos minus loss on trained photos. It grows as those are learned by heart.",
    ),
    "drift": (
        "Drift",
        "How far predictions for the class prompt have moved from the base's. It grows as the class is lost.",
    ),
}
BANDS = {
    "binding": (
        "Binding by noise level",
        "Loss with the class prompt minus loss with the subject's prompt. Over 0, the subject's prompt fits"
        " the photos better.",
    ),
    "loss_trained": ("Loss on trained photos, by noise level", "Change since the first measurement."),
    "loss_held_out": ("Loss on held-out photos, by noise level", "Change since the first measurement."),
}
_RELATIVE = ("loss_trained", "loss_held_out")
# What scores mean, by the last part of their names; in the order in which plots prefer them.
SCORES = {
    "JOINT": "share of pictures that show all of the subject and all that the prompt names",
    "ID": "mean share of the subject's identity attributes that pictures show; all: share with all of them",
    "PA": "mean share of the prompt's attributes that pictures show; all: share with all of them",
    "DINO": "likeness to the photos trained on",
    "CLIP-I": "likeness to the photos trained on",
    "CLIP-T": "likeness to the prompt",
    "nearest_trained": "likeness to the nearest photo trained on: copying",
    "COPY": "share of pictures that copy a photo",
    "PRES": "how much pictures of the class look like the subject; base: without the adapter",
    "LEAK": "how much pictures of other classes look like the subject",
    "DIV": "how different pictures of one prompt are from each other",
    "PRIOR_TV": "how far the mix of class pictures is from the base's",
    "nearest_held_out": "likeness to the nearest photo that was held out",
    "copies": "share of pictures nearer to a photo than the photos are to each other",
    "real": "likeness of the photos to each other",
}


@dataclasses.dataclass(frozen=True, order=True)
class Drawn:
    """A validation picture."""

    step: int
    """0 for a picture of the finished adapter: the file itself has its step."""
    is_finished: bool
    """Whether it was drawn with the finished adapter's file."""
    prompt: int
    number: int
    weight: float | None
    """The adapter's weight, if the picture belongs to those of several weights."""
    name: str
    """Of the file, relative to the run's folder."""


def drawn(names: Iterable[str]) -> list[Drawn]:
    """The validation pictures among the files `names`, in order of steps."""
    listed = []
    for name in names:
        if match := _STEP_NAME.fullmatch(name):
            step, prompt, number = (int(group or 0) for group in match.groups())
            listed.append(Drawn(step, False, prompt, number, None, name))
        elif match := _FINAL_NAME.fullmatch(name):
            prompt, number = (int(group or 0) for group in match.groups())
            listed.append(Drawn(0, True, prompt, number, None, name))
        elif match := _WEIGHT_NAME.fullmatch(name):
            listed.append(Drawn(0, True, 0, 0, float(match[1]), name))
    return sorted(listed, key=lambda picture: (picture.step, picture.is_finished, picture.name))


@dataclasses.dataclass(frozen=True)
class Series:
    """A value after some steps."""

    steps: list[int]
    values: list[float]
    noise: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The records of meters and judges by step, and the last choice of a checkpoint: `best` with step and
    why, None without one; `unnamed`, why none was named."""

    meters: Mapping[int, Mapping[str, Any]]
    judges: Mapping[int, Mapping[str, Any]]
    best: Mapping[str, Any] | None
    unnamed: str = ""

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Measured":
        meters = {record["step"]: record["meter"] for record in records if "meter" in record}
        judges = {record["step"]: record["judge"] for record in records if "judge" in record}
        best = next((record["best"] for record in reversed(records) if "best" in record), None)
        is_named = best is not None and best["step"] is not None
        return cls(
            dict(sorted(meters.items())),
            dict(sorted(judges.items())),
            best if is_named else None,
            "" if best is None or is_named else str(best["why"]),
        )

    def meter(self, name: str) -> Series | None:
        """The means of a meter and their noise; None if it was not measured."""
        measured = [(step, meter[name]) for step, meter in self.meters.items() if name in meter]
        if not measured:
            return None
        return Series(
            [step for step, _ in measured],
            [value["mean"] for _, value in measured],
            [value.get("noise") or 0.0 for _, value in measured],
        )

    def bands(self, name: str, most: int, chosen: int | None) -> tuple[list[int], list[list[float]]] | None:
        """(steps, values by band at each) of a meter, at most `most` steps; None if it has no bands."""
        by_step = {s: m[name]["bands"] for s, m in self.meters.items() if "bands" in m.get(name, {})}
        if not by_step:
            return None
        first = by_step[min(by_step)]
        steps = spread(by_step.keys(), most, chosen)
        if name not in _RELATIVE:
            return steps, [list(by_step[step]) for step in steps]
        steps = [step for step in steps if step != min(by_step)]
        changes = [[b - a for a, b in zip(first, by_step[step], strict=True)] for step in steps]
        return (steps, changes) if steps else None


def spread(steps: Collection[int], most: int, chosen: int | None) -> list[int]:
    """At most `most` of the steps, evenly spread, with the first, the last and `chosen` if it is one of
    them."""
    ordered = sorted(steps)
    if len(ordered) <= most:
        return ordered
    places = [round(number * (len(ordered) - 1) / (most - 1)) for number in range(most)]
    kept = [ordered[place] for place in places]
    if chosen in ordered and chosen not in kept:
        # in place of the nearest one that is neither the first nor the last
        nearest = min(kept[1:-1], key=lambda step: abs(step - (chosen or 0)))
        kept[kept.index(nearest)] = chosen
    return sorted(kept)


# --- loss


def losses(records: Sequence[Record]) -> dict[str, Series]:
    """The loss after each step by name: of photos and class images, or the one loss."""
    steps = {record["step"]: record for record in records if "loss" in record}
    table: dict[str, Series] = {}
    names = {"loss": "loss"}
    if any("loss_prior" in record for record in steps.values()):
        names = {"loss_instance": "photos", "loss_prior": "class images"}
    for key, name in names.items():
        numbers = [step for step in sorted(steps) if math.isfinite(steps[step].get(key, math.nan))]
        if numbers:
            table[name] = Series(numbers, [steps[number][key] for number in numbers])
    return table


def window(steps: int, rows_per_step: int) -> int:
    """Number of steps over which losses are averaged: about 64 rows, and no more than a fifth of the
    steps."""
    return max(1, min(math.ceil(_SMOOTHED_ROWS / rows_per_step), steps // 5))


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and of those before it, `width` in all, or as many as there are."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = (max(0, end - width) for end in range(1, len(sums)))
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def speed(records: Sequence[Record]) -> float | None:
    """The median of the pictures a second of all steps."""
    rates = sorted(record["images_per_second"] for record in records if "images_per_second" in record)
    return rates[len(rates) // 2] if rates else None


# --- scores


def score_series(measured: Measured, most: int) -> dict[str, Series]:
    """The first `most` scores that lie between -1 and 1, by name, for one plot; {} if they were read at one
    step only."""
    table: dict[str, Series] = {}
    for name in sorted(_score_names(measured), key=_preference):
        values = {
            step: scores[name] for step, scores in measured.judges.items() if _is_number(scores.get(name))
        }
        if len(values) > 1 and all(abs(value) <= 1 for value in values.values()) and len(table) < most:
            table[name] = Series(list(values), list(values.values()))
    return table


def _preference(name: str) -> int:
    """The place of a score among those that are plotted: the last are scores of the base, and those that
    count pictures which show all, whose lines are near others."""
    meaning = _meaning(name)
    if meaning is None or name.endswith(("_base", "_all")):
        return len(SCORES)
    return list(SCORES).index(meaning)


def _meaning(name: str) -> str | None:
    """The key in SCORES of a score such as DINO, DINO_DIV or PRES_base; None if it has none."""
    plain = name.removesuffix("_base").removesuffix("_all")
    return next((key for key in SCORES if plain == key or plain.endswith(f"_{key}")), None)


def scores(measured: Measured) -> dict[str, Any]:
    """All scores as a table: names, a row for each step, and what the names mean."""
    names = _score_names(measured)
    rows = [
        (step, [f"{v:.3f}" if _is_number(v := values.get(name)) else "" for name in names])
        for step, values in measured.judges.items()
    ]
    keys = dict.fromkeys(filter(None, map(_meaning, names)))
    return {"names": names, "rows": rows, "meanings": [(key, SCORES[key]) for key in keys]}


def bleeding(measured: Measured, subjects: int, chosen: int | None) -> dict[str, Any]:
    """With several subjects: the binding of each prompt (rows) on the photos of each subject (columns), less
    that of the base, with its error, at the `chosen` step or else the last; {} without measurements."""
    steps = [step for step, meter in measured.meters.items() if step > 0 and "binding_1" in meter]
    if subjects < 2 or not steps:
        return {}
    step = chosen if chosen in steps else steps[-1]
    rows = []
    for i in range(1, subjects + 1):
        names = [f"binding_{i}" if i == j else f"bleed_{i}_{j}" for j in range(1, subjects + 1)]
        changes = [measured.meters[step].get(name, {}).get("since_base", {}) for name in names]
        rows.append([f"{c['mean']:+.4f} ± {c['noise']:.4f}" if c else "" for c in changes])
    return {"step": step, "rows": rows}


def _score_names(measured: Measured) -> list[str]:
    return list(dict.fromkeys(name for values in measured.judges.values() for name in values))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- phases, state and answer


def phases(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Time and memory of each phase of the last start: seconds since the phase before, peaks in GiB."""
    last: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if "memory" in record:
            if record["memory"]["phase"] in last:  # of a later start, as are those after it
                last.clear()
            last[record["memory"]["phase"]] = record["memory"]
    rows, before = [], 0.0
    for phase, reading in last.items():
        seconds = reading.get("seconds", 0.0)
        rows.append(
            {
                "phase": phase,
                "duration": duration(seconds - before) if seconds >= before else "",
                "memory": reading.get("peak_resident_gib"),
                "device": reading.get("peak_reserved_device_gib", reading.get("peak_device_gib")),
            }
        )
        before = seconds
    return rows


def duration(seconds: float) -> str:
    """A time for people: 8.4 s, 12 min 3 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def state(status: Record, last: int, max_steps: int | None) -> dict[str, str]:
    """How far the run is: a word, and steps in words."""
    steps = f"{last} steps" if max_steps is None else f"{last} of {max_steps} steps"
    reason = str(status.get("reason") or "")
    word = "running" if is_running(status) else str(status["state"])
    return {"word": word, "steps": steps, "reason": reason and _sentence(reason)}


def is_running(status: Record) -> bool:
    """Whether the run has not ended."""
    return status.get("state") not in ("finished", "stopped", "failed")


def answer(status: Record, measured: Measured, last: int) -> dict[str, str]:
    """Which adapter to use, why, and where it is."""
    if measured.best:
        headline = f"Use the adapter after step {measured.best['step']}"
        if is_running(status):
            headline = f"So far the best: step {measured.best['step']}"
        file = "best/pytorch_lora_weights.safetensors"
        return {"headline": headline, "why": _sentence(str(measured.best["why"])), "file": file}
    advice = "Nothing measured the checkpoints of this run; --meter_steps does."
    if measured.meters:
        advice = f"No step is named{': ' if measured.unnamed else ''}{measured.unnamed}."
    if is_running(status):
        return {"headline": f"Training: {last} steps so far", "why": advice, "file": ""}
    headline = f"Use the adapter after the last step, {last}"
    return {"headline": headline, "why": advice, "file": "pytorch_lora_weights.safetensors"}


def _sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def text_of(value: object) -> str:
    """The value of a flag as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
