"""Trains, draws and scores pairs of subjects for benchmarks/claims.py."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import claims_pair_arms
from benchmarks.claims_pair_arms import FLAGS, PAIR_RATE, SOURCES, WORDS, PairArm, Source
from benchmarks.claims_runs import (
    SCORING,
    SUBJECT_SEED,
    Protocol,
    Studio,
    adapter_file,
    fingerprint,
    key_of,
    photos_of,
    rounded_scores,
    shared_words,
    subject_prompts,
    train_adapters,
)
from picturebook import metrics, subjects
from picturebook.read import read

Pair = tuple[str, str]
SAVED = ("ID", "ID_all", "PA", "JOINT")


def configuration_of(source: Source, pair: Pair, seed: int, protocol: Protocol) -> dict[str, Any]:
    """What decides the adapter of a source after any step. Trainings of one subject do not depend on the
    other, but on the word."""
    starts_from = source.starts_from and configuration_of(SOURCES[source.starts_from], pair, seed, protocol)
    return {
        "flags": FLAGS,
        "rate": PAIR_RATE,
        "seed": seed,
        "subjects": [(pair[number], WORDS[number]) for number in source.subjects],
        "starts_from": starts_from and [starts_from, SOURCES[source.starts_from or ""].steps],
        "base": fingerprint(protocol.base),
        "batch": protocol.batch,
        **({"is_table": True} if source.is_table else {}),
    }


def result_key(arm: PairArm, pair: Pair, seed: int, protocol: Protocol) -> str:
    drawn = [
        (configuration_of(SOURCES[name], pair, seed, protocol), steps, weights)
        for name, steps, weights in arm.drawn
    ]
    return key_of(
        arm=arm.name, pair=pair, seed=seed, drawn=drawn, pictures=protocol.pictures, scoring=SCORING
    )


def photos_of_source(source: Source, pair: Pair, work: Path) -> Path:
    """The folder of the pictures that a source is trained on, with a caption for each."""
    folder = work / "photos" / "-".join(f"{pair[number]}-{WORDS[number]}" for number in source.subjects)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in source.subjects:
        for photo in photos_of(pair[number], work)[1]:
            name = f"{pair[number]}-{photo.name}"
            shutil.copyfile(photo, folder / name)
            text = f"a photo of a {WORDS[number]} {pair[number]}"
            lines.append(json.dumps({"file_name": name, "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def table_of_source(source: Source, pair: Pair, work: Path) -> Path:
    """The table of --subjects of a source."""
    rows = [
        {
            "photos": str(photos_of(pair[number], work)[0].resolve()),
            "prompt": f"a photo of a {WORDS[number]} {pair[number]}",
            "class_prompt": f"a photo of a {pair[number]}",
        }
        for number in source.subjects
    ]
    path = work / "photos" / f"{'-'.join(pair)}.yaml"
    path.write_text(json.dumps(rows))  # JSON is YAML
    return path


def adapter_of(name: str, steps: int, pair: Pair, seed: int, protocol: Protocol, work: Path) -> Path:
    """The adapter file of a source after `steps` steps. Trains it, and what it starts from, if it is not
    there."""
    source = SOURCES[name]
    configuration = configuration_of(source, pair, seed, protocol)
    key = key_of(**configuration)
    folder, output = work / "adapters" / key, work / "runs" / key
    if adapter_file(folder, source.steps).exists():
        return adapter_file(folder, steps)
    photos = photos_of_source(source, pair, work)
    words = shared_words(protocol, photos, output, steps=source.steps, rate=PAIR_RATE, seed=seed)
    words += FLAGS.split()
    if source.is_table:
        del words[words.index("--instance_data_dir") : words.index("--instance_data_dir") + 2]
        words += ["--subjects", str(table_of_source(source, pair, work))]
    else:
        words += ["--caption_column", "text"]
        words += ["--instance_prompt", f"a photo of a {WORDS[source.subjects[0]]} {pair[source.subjects[0]]}"]
    if source.starts_from:
        before = SOURCES[source.starts_from]
        words += ["--init_adapter", str(adapter_of(before.name, before.steps, pair, seed, protocol, work))]
    train_adapters(words, output, folder, source.steps, configuration)
    return adapter_file(folder, steps)


def scores_of_subject(studio: Studio, pair: Pair, number: int) -> dict[str, float]:
    """Scores of pictures of one subject of a pair, with the adapters that are in the base. BLEED is the mean
    share of the other subject's identity attributes; some may be those of this subject too."""
    kind, colour, identity = subjects.load_subject(subjects.FOLDER / pair[number])
    _, _, other = subjects.load_subject(subjects.FOLDER / pair[1 - number])
    prompts = subject_prompts(kind, WORDS[number], studio.protocol)
    readings = list(map(read, studio.draw(prompts, range(SUBJECT_SEED, SUBJECT_SEED + len(prompts)))))
    scores = metrics.subject_scores(readings, prompts, kind, colour, identity)
    return {name: scores[name] for name in SAVED} | {"BLEED": metrics.leak(readings, other)}


def score_pair(studio: Studio, arm: PairArm, pair: Pair, seed: int, work: Path) -> dict[str, Any]:
    """The record of one way to draw a pair: the mean of both subjects' scores, and the JOINT of each."""

    def adapters(drawn: Sequence[tuple[str, int, Any]]) -> list[tuple[Path, Any]]:
        return [
            (adapter_of(name, steps, pair, seed, studio.protocol, work), weights)
            for name, steps, weights in drawn
        ]

    both = []
    for number, source in enumerate(("first", "second")):
        drawn = arm.drawn or ((source, claims_pair_arms.STEPS, {"": 1.0}),)
        with studio.adapted(adapters(drawn)):
            both.append(scores_of_subject(studio, pair, number))
    scores = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
    scores |= {"JOINT_first": both[0]["JOINT"], "JOINT_second": both[1]["JOINT"]}
    key = result_key(arm, pair, seed, studio.protocol)
    return {
        "key": key,
        "arm": arm.name,
        "subject": "+".join(pair),
        "seed": seed,
        "step": 0,
        "device": studio.device_name,
        "scores": rounded_scores(scores),
    }
