"""The demo subjects: identities that base training never used, with five pictures and the attributes of each.

    python -m picturebook.subjects

Writes picturebook/subjects/, the same bytes every time.
"""

import json
import random
from pathlib import Path

from picturebook.draw import draw
from picturebook.world import BACKDROPS, COLOURS, PLACES, Identity, Scene, random_identity, random_pose

FOLDER = Path(__file__).parent / "subjects"
KINDS = ("dog", "cat", "bird", "car")
PICTURES = 5


def make_subject(kind: str) -> list[Scene]:
    """Five scenes of one held-out identity in one colour, each in another place, without an accessory."""
    rng = random.Random(f"subject {kind}")
    identity = random_identity(rng)
    while not identity.is_held_out(kind):
        identity = random_identity(rng)
    colour = rng.choice(tuple(COLOURS))
    places = rng.sample(tuple(PLACES), PICTURES)
    return [
        Scene(kind, colour, place, identity, pose=random_pose(rng), backdrop=rng.randrange(BACKDROPS))
        for place in places
    ]


def load_subject(folder: Path) -> tuple[str, str, Identity]:
    """(kind, colour, identity) from a subject's `subject.json`."""
    record = json.loads((folder / "subject.json").read_text())
    return record["kind"], record["colour"], Identity(**record["identity"])


def main() -> None:
    for kind in KINDS:
        scenes = make_subject(kind)
        folder = FOLDER / kind
        folder.mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            draw(scene).save(folder / f"{number}.png")
        record = {
            "kind": kind,
            "colour": scenes[0].colour,
            "identity": scenes[0].identity.__dict__,
            "places": [s.place for s in scenes],
        }
        (folder / "subject.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
