"""evaluate.py from photos and adapters to tables: by hand, again, killed and resumed, on two processes, and
from the pictures alone."""

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, ViTModel

import evaluate
from dreambooth.adapter_files import writing
from dreambooth.bases import families, pipelines
from dreambooth.evaluation import judges
from dreambooth.files import pictures
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.options.training import BaseOptions
from picturebook import metrics
from picturebook.read import read
from picturebook.subjects import load_subject
from tests import tiny, tiny_judges
from tests.drawn_adapters import ATTENTION, adapter_of, dora, lora
from tests.running import main_on_two_processes

RESULTS = ("results.json", "tables.md", "pictures.jsonl")
PROMPTS = "# two of the paper's\na {0} {1} in the snow\n\na {0} {1} on the beach\n"


@pytest.fixture(scope="module")
def place(tiny_base, tiny_xl, layers, tmp_path_factory) -> Path:
    """A folder with a base, judges, photos of two subjects, adapters and prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "base").symlink_to(tiny_base)
    tiny_judges.build_dino(folder / "dino")
    tiny_judges.build_clip(folder / "clip")
    tiny_judges.build_dino(folder / "zeros", std=0)
    tiny.make_photos(folder / "rex")
    tiny.make_photos(folder / "tom", count=2, seed=1)
    for name, kind in (("lora", lora), ("dora", dora)):
        adapter = adapter_of(layers, kind, ATTENTION)
        (folder / f"{name}.safetensors").write_bytes(writing.write_native(adapter, {}))
    (folder / "prompts.txt").write_text(PROMPTS)
    # for mistakes
    row = "- {{subject: {}, photos: {}, adapter: {}, class_noun: dog, rare_word: sks}}\n"
    good, bad = folder / "lora.safetensors", folder / "none.safetensors"
    first = row.format("rex", folder / "rex", good)
    (folder / "photos.yaml").write_text(first + row.format("tom", folder / "nobody", good))
    (folder / "adapters.yaml").write_text(first + row.format("tom", folder / "tom", bad))
    (folder / "bad.txt").write_text("a sks {1}\n")
    (folder / "long.txt").write_text("a {0} {1} " + "in the snow " * 40)
    (folder / "empty").mkdir()
    tiny.make_photos(folder / "wide", size=(80, 64))
    other = adapter_of(families.find(BaseOptions(str(tiny_xl))).layers(), lora, ATTENTION)
    (folder / "xl.safetensors").write_bytes(writing.write_native(other, {}))
    return folder


def words_of(place: Path, out: Path, *more: str) -> list[str]:
    """A command line. The flags of `more` replace those of the same name, and --subjects_file those of one
    subject."""
    words = f"--pretrained_model_name_or_path {place}/base --prompts_file {place}/prompts.txt"
    words += f" --output_dir {out} --judge_dino {place}/dino --judge_clip {place}/clip --num_images 2"
    words += " --num_class_images 2 --num_inference_steps 2 --num_threads 1"
    if "--subjects_file" not in more:
        words += f" --adapter {place}/lora.safetensors --photos {place}/rex --class_noun dog --rare_word sks"
    defaults = words.split()
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    return [*(word for pair in pairs if pair[0] not in more for word in pair), *more]


def run(place: Path, out: Path, *more: str) -> dict[str, Any]:
    """Evaluate in this process; the content of results.json."""
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate.main(parse(EvaluateOptions, "", words_of(place, out, *more)))
    return json.loads((out / "results.json").read_text())


def bytes_of(out: Path) -> dict[str, bytes]:
    """The files of an evaluation, by name."""
    paths = [*(out / name for name in RESULTS), *out.rglob("*.png")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def records_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(place, tmp_path_factory) -> Path:
    """The output folder of one evaluation. Others are compared with it: read it only."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("evaluated") / "out"
    run(place, out)
    return out


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    def refuse(*args: Any) -> None:
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(pipelines, "load_pipeline", refuse)


# --- by hand


def embeddings(place: Path, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """Unit embeddings of pictures by DINO and CLIP, by transformers alone."""
    vit = ViTModel.from_pretrained(place / "dino", add_pooling_layer=False).eval()
    clip = CLIPModel.from_pretrained(place / "clip").eval()
    processor = CLIPImageProcessorPil.from_pretrained(place / "clip")
    rows: dict[str, list[np.ndarray]] = {"dino": [], "clip": []}
    for image in images:
        cut = image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC).crop((2, 2, 30, 30))
        values = (np.asarray(cut) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        pixels = torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            rows["dino"].append(vit(pixels).last_hidden_state[0, 0].double().numpy())
            pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
            rows["clip"].append(clip.get_image_features(pixels).pooler_output[0].double().numpy())
    return {name: np.stack([row / np.linalg.norm(row) for row in of]) for name, of in rows.items()}


def text_embedding(place: Path, text: str) -> np.ndarray:
    tokens = AutoTokenizer.from_pretrained(place / "clip")([text], return_tensors="pt").input_ids
    with torch.no_grad():
        row = CLIPModel.from_pretrained(place / "clip").eval().get_text_features(tokens).pooler_output[0]
    return row.double().numpy() / np.linalg.norm(row.double().numpy())


@pytest.mark.slow
def test_the_table_is_what_pair_loops_by_hand_give(place, evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    table = {row["row"]: row for row in results["table"]}
    photos = embeddings(place, [Image.open(place / "rex" / f"photo-{n}.png") for n in range(3)])
    for method, folder in (("adapter", "adapter/rex"), ("base", "base/sks_dog-*")):
        (pictures_dir,) = (evaluated / "pictures").glob(folder)
        names = [f"{prompt:02d}-{k:02d}.png" for prompt in (0, 1) for k in (0, 1)]
        drawn = embeddings(place, [Image.open(pictures_dir / name) for name in names])
        of_class = embeddings(place, [Image.open(pictures_dir / f"class-{k:03d}.png") for k in (0, 1)])
        wanted = {
            "DINO": np.mean([a @ b for a in drawn["dino"] for b in photos["dino"]]),
            "CLIP-I": np.mean([a @ b for a in drawn["clip"] for b in photos["clip"]]),
            "PRES": np.mean([a @ b for a in of_class["dino"] for b in photos["dino"]]),
            "nearest_trained": np.mean([max(a @ b for b in photos["dino"]) for a in drawn["dino"]]),
            "DIV": np.mean([1 - drawn["dino"][n] @ drawn["dino"][n + 1] for n in (0, 2)]),
        }
        for name, words in (("CLIP-T", "a dog"), ("CLIP-T word", "a sks dog")):
            texts = [text_embedding(place, f"{words} {end}") for end in ("in the snow", "on the beach")]
            wanted[name] = np.mean([drawn["clip"][n] @ texts[n // 2] for n in range(4)])
        for name, value in wanted.items():
            assert table[method]["scores"][name]["macro"] == pytest.approx(value, abs=1e-6), (method, name)
    for name, judge in (("DINO", "dino"), ("CLIP-I", "clip")):
        different = [a @ b for a, b in itertools.permutations(photos[judge], 2)]
        every = [a @ b for a in photos[judge] for b in photos[judge]]
        for row, values in (("without", different), ("with", every)):
            found = table[f"Real photos, {row} self pairs"]["scores"][name]["macro"]
            assert found == pytest.approx(np.mean(values), abs=1e-6), (row, name)


@pytest.mark.slow
def test_every_picture_has_a_line_with_its_prompt_seed_adapter_and_scores(place, evaluated):
    records = records_of(evaluated)
    assert len(records) == len(list(evaluated.rglob("*.png"))) == 2 * (2 * 2 + 2)
    by_method = {m: [record for record in records if record["method"] == m] for m in ("base", "adapter")}
    of_base, of_adapter = by_method["base"], by_method["adapter"]
    assert [r["seed"] for r in of_base] == [r["seed"] for r in of_adapter]
    assert len({record["seed"] for record in of_base}) == 6
    assert {record["adapter_sha256"] for record in of_base} == {None}
    assert len({record["adapter_sha256"] for record in of_adapter}) == 1
    first, last = of_adapter[0], of_adapter[-1]
    assert (first["prompt"], first["text"]) == ("a sks dog in the snow", "a dog in the snow")
    assert first["scores"].keys() == {"DINO", "nearest_trained", "copies", "CLIP-I", "CLIP-T", "CLIP-T word"}
    assert (last["prompt"], last["scores"].keys()) == ("a dog", {"PRES"})
    settings = json.loads((evaluated / "results.json").read_text())["settings"]
    assert settings["num_inference_steps"] == 2
    assert settings["judges"]["dino"]["sha256"] == judges.find("dino", str(place / "dino")).sha256
    assert "crop centre" in settings["judges"]["dino"]["transform"]


# --- again, killed, on two processes, from pictures alone


@pytest.mark.slow
def test_a_second_run_draws_and_embeds_nothing_and_gives_the_same_bytes(
    place, evaluated, tmp_path, nothing_is_drawn, monkeypatch
):
    shutil.copytree(evaluated, tmp_path / "out", ignore=shutil.ignore_patterns(".lock"))
    for name in RESULTS:
        (tmp_path / "out" / name).unlink()
    embed = judges.Judge.embed_images
    embedded: list[Any] = []

    def counted(self: judges.Judge, images: Sequence[Image.Image]) -> np.ndarray:
        embedded.extend(images)
        return embed(self, images)

    monkeypatch.setattr(judges.Judge, "embed_images", counted)
    run(place, tmp_path / "out")
    assert len(embedded) == 2 * (3 + 2)  # by two judges the photos, and a trial before and after the drawing
    assert bytes_of(tmp_path / "out") == bytes_of(evaluated)
    # another transform is another judge
    run(place, tmp_path / "out", "--judge_dino_transform", "squash")
    assert len(embedded) == 2 * 2 * (3 + 2) + 2 * 12
    assert bytes_of(tmp_path / "out") != bytes_of(evaluated)


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_to_the_same_bytes(place, evaluated, tmp_path, monkeypatch):
    out, draw = tmp_path / "out", pipelines.draw
    drawn: list[Any] = []
    child = os.fork()
    if child == 0:

        def killed(*args: Any, **keywords: Any) -> Any:
            if len(drawn) == 3:
                os._exit(9)
            drawn.append(args)
            return draw(*args, **keywords)

        pipelines.draw = killed
        run(place, out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(out.rglob("*.png"))) == 6
    (out / "pictures" / "base").joinpath("half.tmp").write_bytes(b"")  # not ours: it stays

    def counted(*args: Any, **keywords: Any) -> Any:
        drawn.append(args)
        return draw(*args, **keywords)

    monkeypatch.setattr(pipelines, "draw", counted)
    run(place, out)
    assert len(drawn) == 3
    assert bytes_of(out) == bytes_of(evaluated)


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(place, evaluated, tmp_path, capfd):
    options = parse(EvaluateOptions, "", words_of(place, tmp_path / "out"))
    main_on_two_processes(evaluate.main, options)
    assert bytes_of(tmp_path / "out") == bytes_of(evaluated)
    assert capfd.readouterr().out.count("wrote results.json") == 1


@pytest.mark.slow
def test_tables_come_from_the_pictures_alone(place, evaluated, tmp_path, nothing_is_drawn):
    shutil.copytree(evaluated / "pictures", tmp_path / "out" / "pictures")
    words = ("--pretrained_model_name_or_path", "nowhere", "--adapter", "gone.safetensors", "--tables_only")
    run(place, tmp_path / "out", *words)
    assert bytes_of(tmp_path / "out") == bytes_of(evaluated)


# --- failures


@pytest.mark.slow
def test_failed_pictures_count_and_are_listed(place, evaluated, tmp_path, capsys):
    shutil.copytree(evaluated / "pictures", tmp_path / "out" / "pictures")
    black, torn = (tmp_path / "out" / "pictures" / "adapter" / "rex" / f"00-0{k}.png" for k in (0, 1))
    settings = json.loads(Image.open(black).info["dreambooth"])
    black.write_bytes(pictures.png(Image.new("RGB", (64, 64)), settings))
    torn.write_bytes(torn.read_bytes()[:5000])
    results = run(place, tmp_path / "out", "--tables_only")
    assert results["failures"] == [
        {"file": "pictures/adapter/rex/00-00.png", "failure": "all black"},
        {"file": "pictures/adapter/rex/00-01.png", "failure": "unreadable"},
    ]
    row = {row["row"]: row for row in results["table"]}["adapter"]
    assert (row["pictures"], row["failed"]) == (6, 2)
    before = [record for record in records_of(evaluated) if record["method"] == "adapter"]
    whole = [record["scores"]["DINO"] for record in before[2:4]]
    assert row["scores"]["DINO"]["macro"] == pytest.approx(sum(whole) / 4, abs=1e-12)
    assert "note: 2 pictures failed, and count 0" in capsys.readouterr().out
    assert "`pictures/adapter/rex/00-01.png`: unreadable" in (tmp_path / "out" / "tables.md").read_text()
    left_out = run(place, tmp_path / "out", "--tables_only", "--failed_pictures", "skip")
    row = {row["row"]: row for row in left_out["table"]}["adapter"]
    assert row["scores"]["DINO"]["macro"] == pytest.approx(sum(whole) / 2, abs=1e-12)
    assert row["failed"] == 2


@pytest.mark.slow
def test_a_judge_without_finite_values_is_named_and_a_picture_without_them_is_a_failure(
    place, evaluated, tmp_path, monkeypatch
):
    shutil.copytree(evaluated / "pictures", tmp_path / "out" / "pictures")
    embed, calls = judges.Judge._run, itertools.count()

    def broken(self: judges.Judge, function: Any, value: Any) -> Any:
        output = embed(self, function, value)
        if self.name == "dino" and next(calls) in bad:
            output.last_hidden_state[:] = float("nan")
        return output

    monkeypatch.setattr(judges.Judge, "_run", broken)
    bad = {4}  # the first picture after a trial and three photos
    results = run(place, tmp_path / "out", "--tables_only")
    assert [entry["failure"] for entry in results["failures"]] == ["no finite embedding"]
    (record,) = [record for record in records_of(tmp_path / "out") if record["failure"]]
    assert set(record["scores"].values()) == {0.0}
    bad = {next(calls) + 2}
    message = "the dino judge returns values that are 0 or not finite for a photo"
    with pytest.raises(UserError, match=message):
        run(place, tmp_path / "out", "--tables_only")


# --- a table of subjects


@pytest.mark.slow
def test_a_table_has_subjects_and_methods_and_a_subset_draws_the_same_pictures(place, tmp_path):
    rows = "subject,adapter,photos,class_noun,rare_word,method,trained_photos\n"
    rows += f"rex,{place}/lora.safetensors,{place}/rex,dog,sks,lora,{place}/tom\n"
    rows += f"tom,{place}/lora.safetensors,{place}/tom,dog,sks,lora,\n"
    rows += f"tom,{place}/dora.safetensors:0.5,{place}/tom,dog,sks,dora,\n"
    (tmp_path / "subjects.csv").write_text(rows)
    (tmp_path / "one.txt").write_text("a {0} {1} in the snow\n")
    words = ["--subjects_file", str(tmp_path / "subjects.csv"), "--prompts_file", str(tmp_path / "one.txt")]
    words += ["--num_images", "1", "--num_class_images", "1"]
    results = run(place, tmp_path / "out", *words)
    table = {row["row"]: row for row in results["table"]}
    assert [row["subjects"] for row in results["table"]] == [2, 2, 2, 2, 1]
    assert list(table)[2:] == ["base", "lora", "dora"]
    of = {name: entry["methods"]["lora"]["scores"]["DINO"] for name, entry in results["subjects"].items()}
    dino = table["lora"]["scores"]["DINO"]
    assert dino["macro"] == pytest.approx((of["rex"] + of["tom"]) / 2, abs=1e-12)
    assert dino["micro"] == pytest.approx((3 * of["rex"] + 2 * of["tom"]) / 5, abs=1e-12)
    assert dino["interval"] == pytest.approx(sorted(of.values()), abs=1e-12)
    assert table["dora"]["scores"]["DINO"]["interval"] is None
    # copying is measured against the photos that were trained on
    record = next(r for r in records_of(tmp_path / "out") if (r["subject"], r["method"]) == ("rex", "lora"))
    drawn = embeddings(place, [Image.open(tmp_path / "out" / record["file"])])["dino"][0]
    for name, folder, count in (("nearest_trained", "tom", 2), ("nearest_held_out", "rex", 3)):
        photos = [Image.open(place / folder / f"photo-{n}.png") for n in range(count)]
        nearest = max(embeddings(place, photos)["dino"] @ drawn)
        assert record["scores"][name] == pytest.approx(nearest, abs=1e-6), name
    assert table["lora"]["scores"]["nearest_held_out"]["subjects"] == 1
    # both subjects have the same prompts: the base draws them once
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 2 * (1 + 3)
    run(place, tmp_path / "tom", *words, "--subjects", "tom")
    for path in (tmp_path / "tom").rglob("*.png"):
        name = path.relative_to(tmp_path / "tom")
        assert path.read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.slow
def test_the_reader_scores_pictures_of_the_drawn_world(place, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a {0} {1} in the snow\n")
    words = (
        "--pretrained_model_name_or_path picturebook/model --photos picturebook/subjects/dog --num_images 2"
    )
    words += " --class_noun dog --rare_word sks --judge_reader picturebook/subjects/dog"
    words += f" --output_dir {tmp_path}/out --adapter {tmp_path}/lora.safetensors --num_threads 1"
    words += f" --num_inference_steps 1 --num_class_images 2 --prompts_file {tmp_path}/prompts.txt"
    layers = families.find(BaseOptions("picturebook/model")).layers()
    adapter = writing.write_native(adapter_of(layers, lora, ("to_q", "q_proj")), {})
    (tmp_path / "lora.safetensors").write_bytes(adapter)
    evaluate.main(parse(EvaluateOptions, "", words.split()))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    table = {row["row"]: row["scores"] for row in results["table"]}
    assert table["Real photos, with self pairs"]["reader ID"]["macro"] == 1
    for row in ("base", "adapter"):
        names = ("ID", "ID_all", "PA", "JOINT", "PRES", "PRIOR_TV", "DIV", "COPY")
        assert table[row].keys() == {f"reader {name}" for name in names}
    assert table["base"]["reader PRIOR_TV"]["macro"] == 0
    # the means are those that picturebook.metrics gives for all pictures together
    drawn = [r for r in records_of(tmp_path / "out") if r["method"] == "adapter" and r["text"] != r["prompt"]]
    readings = [read(Image.open(tmp_path / "out" / record["file"])) for record in drawn]
    kind, colour, identity = load_subject(Path("picturebook/subjects/dog"))
    together = metrics.subject_scores(readings, [r["prompt"] for r in drawn], kind, colour, identity)
    for name in ("ID", "ID_all", "PA", "JOINT"):
        assert table["adapter"][f"reader {name}"]["macro"] == pytest.approx(together[name], abs=1e-12), name
    assert results["skipped"]["DINO"] == "--judge_dino is not given"


# --- mistakes


MISTAKES: dict[str, tuple[str, str]] = {
    "judge": ("--judge_dino {place}/none:", "--judge_dino: there is no folder .*none:, and"),
    "other judge": ("--judge_dino {place}/clip", "--judge_dino: .*/clip holds a clip; it must be"),
    "zeros": ("--judge_dino {place}/zeros", "--judge_dino: .*zeros cannot be loaded: .* 0 or not finite"),
    "weights": ("--judge_clip {place}/clip@sha256:" + "0" * 64, "have the SHA-256 [0-9a-f]+, not 0000"),
    "reader": ("--judge_reader {place}/rex", r"--judge_reader: .*rex has no subject\.json"),
    "size": (
        "--judge_reader picturebook/subjects/dog --photos {place}/wide",
        r"--photos: photo-0\.png has 80 x 64; the reader knows pictures of 64 x 64",
    ),
    "adapter": ("--adapter {place}/none.safetensors", r"--adapter: .*none\.safetensors"),
    "other base": ("--adapter {place}/xl.safetensors", r"--adapter: .*xl\.safetensors"),
    "weight": ("--adapter {place}/lora.safetensors:1000", "--adapter: the weight of"),
    "photos": ("--photos {place}/nobody", "--photos: there is no folder .*nobody"),
    "no photo": ("--photos {place}/empty", "--photos: no picture in .*empty"),
    "prompts": ("--prompts_file {place}/bad.txt", r"bad\.txt: line 1 must have \{0\}"),
    "long prompt": ("--prompts_file {place}/long.txt", "the prompt .* tokens"),
    "steps": ("--num_inference_steps 2000", "--num_inference_steps"),
    "row": ("--subjects_file {place}/photos.yaml", r"row 2 \(tom\): photos: there is no folder"),
    "adapter of row": ("--subjects_file {place}/adapters.yaml", r"row 2 \(tom\): .*none\.safetensors"),
    "in photos": ("--output_dir {place}/rex/out", "--output_dir: .*rex/out lies in .*rex, which --photos"),
    "of photos": ("--output_dir {place}/tom", "--output_dir: .*tom holds pictures that this program"),
    "nothing drawn": ("--tables_only", "--tables_only: 12 of 12 pictures are not in .*out, the first"),
    "fp16": ("--mixed_precision fp16", "--mixed_precision fp16 does not work on a CPU"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_meets_one_message_before_a_model_is_loaded(name, place, tmp_path, no_models):
    words, message = MISTAKES[name]
    given = words.format(place=place).split()
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    with pytest.raises(UserError, match=message):
        run(place, tmp_path / "out", *given)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_of_other_pictures_is_refused(place, evaluated, tmp_path, no_models):
    """Pictures with other settings, and a picture that somebody has changed."""
    out = tmp_path / "out"
    shutil.copytree(evaluated, out, ignore=shutil.ignore_patterns(".lock"))
    with pytest.raises(UserError, match="other settings: num_inference_steps is 2 there and 3 now"):
        run(place, out, "--num_inference_steps", "3")
    with pytest.raises(UserError, match=r"other settings: seed is \d+ there"):
        run(place, out, "--seed", "1", "--tables_only")
    with pytest.raises(UserError, match=r"adapter is 'lora\.safetensors' there and 'dora\.safetensors' now"):
        run(place, out, "--adapter", f"{place}/dora.safetensors")
    Image.new("RGB", (64, 64)).save(out / "pictures" / "adapter" / "rex" / "00-00.png")
    with pytest.raises(UserError, match=r"holds pictures/adapter/rex/00-00\.png, to be written now"):
        run(place, out)
    with pytest.raises(UserError, match=r"00-00\.png is no picture of this program"):
        run(place, out, "--tables_only")
