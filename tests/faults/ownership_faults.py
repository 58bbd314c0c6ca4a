"""Random files of a user in every folder that a script writes to. Not one byte of them may change.

    python -m tests.faults.ownership_faults [LAYOUTS]

Each layout has a user's files under names that the scripts write, and beside them; then a script runs with
random flags. Prints how many layouts there were, how many were refused, and every violation; the exit status
is 1 if there was one.
"""

import contextlib
import hashlib
import io
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate.state import AcceleratorState
from PIL import Image

import convert_adapter
import generate_class_images
import infer
import train_dreambooth_lora as train
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from dreambooth.runtime.stops import Stop
from tests import tiny
from tests.running import prior_words, train_words

ADAPTERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors")
RUN_NAMES = (
    *ADAPTERS,
    *("run.json", "run.yaml", "status.json", "metrics.jsonl", "README.md", ".lock", ".written.jsonl"),
    *("checkpoint-1", "checkpoint-1/optimizer.bin", "checkpoint-2/state.json", "checkpoint-2/holiday.png"),
    *(
        "validation",
        "validation/image_0.png",
        "validation/step-000000-00.png",
        "validation/step-000001-00.png",
        "validation/weight-0.50.png",
        "report.html",
        ".tmp-step-1-2-0123abcd/a.png",
    ),
    *(".trash-1000/a.png", ".trash-step-1-2-0123abcd/a.png", ".replaced-step-1/a.png", ".run.json.1.2.tmp"),
)
PICTURE_NAMES = ("images.json", "contact_sheet.png", "00000_0.png", "00001_0.png", "00001_1.png", ".lock")
CLASS_NAMES = (
    *("manifest.json", "class-000000.png", "class-000001.png", "class-1.png", ".lock"),
    *(".class-000000.png.sha256", ".class-000009.png.sha256", ".class-notes.png.sha256"),
)
OTHER_NAMES = (
    *("image_0.png", "image_20240710_holiday.png", "holiday.jpg", "notes.txt", "checkpoint-500/model.bin"),
    *(
        "step-000001-00.png",
        "validation/holiday.png",
        "logs/events",
        "checkpoint-old/a.png",
        ".holiday.1.tmp",
    ),
)


class World:
    """A tiny base, an adapter, photos, and a finished run, pictures and class images to start from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = tiny.build_pipeline(folder / "base")
        self.photos = tiny.make_photos(folder / "photos")
        self.run, self.pictures, self.classes = (folder / name for name in ("run", "pictures", "classes"))
        train.main(parse(TrainOptions, "", self.train(self.run)))
        infer.main(parse(InferOptions, "", self.infer(self.pictures)))
        generate_class_images.main(parse(ClassImageOptions, "", self.generate(self.classes)))
        self.adapter = folder / "adapter.safetensors"
        shutil.copy(self.run / ADAPTERS[0], self.adapter)

    def train(self, out: Path, *more: str) -> list[str]:
        steps = ("--max_train_steps", "2", "--checkpointing_steps", "1", "--cache_latents", "memory")
        return train_words(self.base, self.photos, out, *steps, *more)

    def infer(self, out: Path, *more: str) -> list[str]:
        words = f"--pretrained_model_name_or_path {self.base} --output_dir {out} --num_inference_steps 1"
        return [*words.split(), "--prompt", "a dog", "a cat", *more]

    def generate(self, out: Path, *more: str) -> list[str]:
        words = f"--pretrained_model_name_or_path {self.base} --class_data_dir {out} --num_class_images 2"
        return [*words.split(), "--class_prompt", "a dog", "--class_inference_steps", "1", *more]


def snapshot(folder: Path) -> dict[str, str]:
    """The hash of every file and the target of every link in a folder, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def put_user_files(folder: Path, draw: random.Random, names: tuple[str, ...]) -> list[str]:
    """Write a user's files into the folder, in place of the program's or beside them. Returns their names."""
    put = []
    for name in draw.sample(names, draw.randint(0, 3)) + draw.sample(OTHER_NAMES, draw.randint(1, 3)):
        path = folder / name
        with contextlib.suppress(OSError):  # a name may lie below one that is a file
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = draw.randrange(5)
            if path.is_file() and not path.is_symlink() and kind < 3:
                path.write_bytes(path.read_bytes() + b" edited")
            elif os.path.lexists(path):
                continue
            elif kind == 0:
                path.symlink_to(folder.parent / "precious.png")
            elif kind == 1:
                Image.new("RGB", (64, 64), (draw.randrange(256), 0, 0)).save(path, format="PNG")
            elif kind == 2:
                path.write_text(draw.choice(["{}", "[]", '{"flags": {}}', "null", ""]) + "\n")
            else:
                path.write_bytes(draw.randbytes(draw.randrange(1, 200)))
            put.append(name)
    return put


def layouts(world: World, draw: random.Random, out: Path) -> Callable[[], None]:
    """Fill `out` and return the script's run on it, with random flags."""
    script = draw.choice(["train", "train", "infer", "generate", "convert", "bake", "apart"])
    if script == "train":
        start = draw.choice([None, None, world.run, world.run, world.pictures])
        more = draw.choice([[], ["--overwrite"], ["--overwrite"], ["--resume_from_checkpoint", "latest"]])
        more += draw.choice([[], ["--validation_prompt", "a dog", "--num_validation_images", "1"]])
        more += draw.choice([[], ["--output_kohya_format"], ["--checkpoints_total_limit", "1"]])
        more += draw.choice([[], ["--max_train_steps", "3"], ["--validation_epochs", "1"]])
        if more and draw.random() < 0.2:
            more += prior_words(out.with_name("class"))
        _copy(start, out)
        return lambda: train.main(parse(TrainOptions, "", world.train(out, *more)))
    if script == "infer":
        _copy(draw.choice([None, world.pictures, world.run, world.classes]), out)
        more = draw.choice([[], ["--seeds", "0", "1"], ["--adapter", str(world.adapter), "--compare"]])
        return lambda: infer.main(parse(InferOptions, "", world.infer(out, *more)))
    if script == "generate":
        _copy(draw.choice([None, world.classes, world.classes, world.pictures]), out)
        more = draw.choice([[], ["--num_class_images", "3"], ["--seed", "7"]])
        return lambda: generate_class_images.main(parse(ClassImageOptions, "", world.generate(out, *more)))
    if script == "apart":
        shutil.copytree(world.photos, out / "photos")
        inside = draw.choice([out, out / "photos", out / "photos" / "run", out / "photos" / ".." / "photos"])
        words = world.train(inside, "--instance_data_dir", str(out / "photos"), "--overwrite")
        return lambda: train.main(parse(TrainOptions, "", words))
    target = draw.choice([out, out / "notes.txt", out / ADAPTERS[0]])
    words = ["bake", str(world.adapter), "--pretrained_model_name_or_path", str(world.base)]
    words += ["--merge_to", str(target)]
    if script == "convert":
        to = draw.choice(["native", "peft", "lora"])
        words = ["convert", str(world.adapter), "--to", to, "--output", str(target)]
    return lambda: convert_adapter.main(convert_adapter.parse_command(words))


def _copy(source: Path | None, out: Path) -> None:
    if source is not None:
        shutil.copytree(source, out, dirs_exist_ok=True)


def changed(world: World, seed: int) -> tuple[list[str], str]:
    """(what happened to a user's files that must not, how the script ended) for the layout of a seed."""
    draw = random.Random(seed)
    place = world.folder / f"layout-{seed}"
    out = place / "out"
    out.mkdir(parents=True)
    (place / "precious.png").write_bytes(b"a user's")
    tiny.make_photos(place / "class", 3, seed=9)
    work = layouts(world, draw, out)
    put = put_user_files(out, draw, RUN_NAMES + PICTURE_NAMES + CLASS_NAMES)
    fixed = {name: value for name, value in snapshot(place).items() if not name.startswith("out/")}
    users = {f"out/{name}" for name in put} | ({n for n in snapshot(place) if n.startswith("out/photos/")})
    before = {name: value for name, value in snapshot(place).items() if name in users or name in fixed}
    AcceleratorState._reset_state(reset_partial_state=True)
    ended, said = "finished", io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            work()
        except UserError as error:
            ended = f"refused: {error}"
        except (SystemExit, Stop) as stop:
            ended = f"stopped: {stop}"
        except Exception as error:
            ended = f"traceback: {type(error).__name__}: {error}"
    after = snapshot(place)
    # a damaged checkpoint of the program is moved to .bad-step-N, every byte of it
    moved = {value for name, value in after.items() if name.startswith("out/.bad-step-")}
    wrong = [
        f"{name} has changed"
        for name, value in before.items()
        if after.get(name) != value and not (name.startswith("out/checkpoint-") and value in moved)
    ]
    if ended.startswith("traceback"):
        wrong.append(ended)
    shutil.rmtree(place)
    return wrong, ended


def fuzz(folder: Path, seeds: range) -> Iterator[tuple[int, list[str], str]]:
    """(seed, violations, how the script ended) for each seed."""
    world = World(folder)
    for seed in seeds:
        yield (seed, *changed(world, seed))


def count(folder: Path, layouts: int) -> dict[str, int]:
    """The counts of `make faults`. Violations are printed."""
    refused = violations = 0
    for seed, wrong, ended in fuzz(folder, range(layouts)):
        refused += ended.startswith("refused")
        violations += bool(wrong)
        if wrong:
            print(f"layout {seed}: {'; '.join(wrong)} ({ended})", file=sys.stderr)
    return {"layouts": layouts, "layouts_refused": refused, "layouts_violated": violations}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        counts = count(Path(temporary), int(sys.argv[1]) if len(sys.argv) > 1 else 500)
    print(counts)
    sys.exit(bool(counts["layouts_violated"]))
