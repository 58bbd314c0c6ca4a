"""Trains, draws and scores subjects that always stand before one background, for benchmarks/claims.py."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.claims_arms import RATE, STEPS, WORD
from benchmarks.claims_mask_arms import PLACE_OF, MaskArm
from benchmarks.claims_runs import (
    HELD_OUT,
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
from picturebook.draw import draw, layers
from picturebook.read import Reading, read
from picturebook.world import Scene

FREE_SEED = 5000
SAVED = ("ID", "ID_all", "PA", "JOINT")


def configuration_of(arm: MaskArm, subject: str, seed: int, protocol: Protocol) -> dict[str, Any]:
    """What decides the adapter."""
    arm_fields = {
        name: value for name, value in dataclasses.asdict(arm).items() if name not in ("name", "label")
    }
    common = {"rate": RATE, "steps": STEPS, "base": fingerprint(protocol.base), "batch": protocol.batch}
    return {**arm_fields, **common, "subject": subject, "seed": seed, "place": PLACE_OF[subject]}


def result_key(arm: MaskArm, subject: str, seed: int, protocol: Protocol) -> str:
    configuration = configuration_of(arm, subject, seed, protocol)
    return key_of(masks=configuration, pictures=protocol.pictures, scoring=SCORING)


def mask_of(scene: Scene) -> Image.Image:
    """White where the subject of a scene is drawn, black elsewhere, with grey edges."""
    mask = Image.new("L", draw(scene).size)
    for layer, _ in layers(scene):
        mask.paste(255, (scene.pose.dx, scene.pose.dy), layer)
    return mask


def folders_of(arm: MaskArm, subject: str, work: Path) -> tuple[Path, Path | None]:
    """(folder of the photos that an arm is trained on, folder of their masks or None)."""
    if not arm.has_one_place:
        return photos_of(subject, work)[0], None
    photos, masks = work / "photos" / f"{subject}-one-place", work / "masks" / f"{subject}-one-place"
    for folder in (photos, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(subjects.make_subject(subject)[:-HELD_OUT]):
        moved = dataclasses.replace(scene, place=PLACE_OF[subject], backdrop=0)
        draw(moved).save(photos / f"{number}.png")
        mask_of(moved).save(masks / f"{number}.png")
    return photos, masks if arm.has_masks else None


def adapter_of(arm: MaskArm, subject: str, seed: int, protocol: Protocol, work: Path) -> Path:
    """The adapter file of an arm. Trains it if it is not there."""
    assert arm.flags is not None
    configuration = configuration_of(arm, subject, seed, protocol)
    key = key_of(**configuration)
    folder, output = work / "adapters" / key, work / "runs" / key
    if not adapter_file(folder, STEPS).exists():
        photos, masks = folders_of(arm, subject, work)
        words = shared_words(protocol, photos, output, steps=STEPS, rate=RATE, seed=seed)
        words += [*arm.flags.split(), "--instance_prompt", f"a photo of a {WORD} {subject}"]
        words += ["--mask_dir", str(masks)] if masks else []
        train_adapters(words, output, folder, STEPS, json.loads(json.dumps(configuration)))
    return adapter_file(folder, STEPS)


def place_share(readings: Sequence[Reading], place: str) -> float:
    """The share of pictures that show a place. A picture whose place cannot be read shows it not."""
    return sum(r.shows_caption and r.scene.place == place for r in readings) / len(readings)


def score_mask_arm(studio: Studio, arm: MaskArm, subject: str, seed: int, work: Path) -> dict[str, Any]:
    """The record of an arm. PLACE is the share of pictures with the photos' place where the prompt names
    another one, PLACE_free where the prompt names none."""
    protocol = studio.protocol
    kind, colour, identity = subjects.load_subject(subjects.FOLDER / subject)
    prompts = subject_prompts(kind, WORD, protocol)
    free = [f"a photo of a {WORD} {kind}"] * len(prompts)
    adapter = adapter_of(arm, subject, seed, protocol, work) if arm.flags else None
    with studio.adapted([(adapter, 1.0)]) if adapter else contextlib.nullcontext():
        named, unnamed = (
            list(map(read, studio.draw(texts, range(first, first + len(texts)))))
            for texts, first in ((prompts, SUBJECT_SEED), (free, FREE_SEED))
        )
    scores = metrics.subject_scores(named, prompts, kind, colour, identity)
    place = PLACE_OF[subject]
    places = {"PLACE": place_share(named, place), "PLACE_free": place_share(unnamed, place)}
    return {
        "key": result_key(arm, subject, seed, protocol),
        "arm": arm.name,
        "subject": subject,
        "seed": seed,
        "step": 0,
        "device": studio.device_name,
        "scores": rounded_scores({name: scores[name] for name in SAVED} | places),
    }
