"""Every family through the real entry points on tiny pipelines: trained, resumed, drawn by plain diffusers;
and the flags that they differ in."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
import train_dreambooth_lora as train
from dreambooth.adapter_files.native import ADAPTER_NAME
from dreambooth.bases import autoencoder, families, loading, pipelines
from dreambooth.data import sampling_order
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions, TextOptions, TrainOptions
from dreambooth.training import validation
from tests import tiny
from tests.plain_diffusers import PROMPT, plain_clip
from tests.running import digest, main_on_two_processes, run_train, train_words

BASES = {"sd": "tiny_base", "v": "tiny_v_base", "xl": "tiny_xl", "edm": "tiny_edm", "if": "tiny_if"}
STEPS = "--max_train_steps 3 --checkpointing_steps 2 --learning_rate 0.03"
XL_WORDS = (
    "--train_text_encoder --text_encoder_lr 0.02 --lora_dropout 0.1 --random_flip --caption_column "
    "text --caption_dropout 0.3 --shuffle_caption --caption_tag_dropout_rate 0.2"
)
WORDS = {
    "sd": "--train_text_encoder --output_kohya_format",
    "v": "--clip_skip 1 --lora_alpha 8 --output_kohya_format --caption_extension .txt --shuffle_caption",
    "xl": f"{XL_WORDS} --gradient_accumulation_steps 2 --output_kohya_format",
    "edm": "--output_kohya_format",
    "if": "--resolution 16",
}


@dataclasses.dataclass
class Run:
    """A finished run: of which family, on which base and photos, where, with which flags."""

    kind: str
    base: Path
    photos: Path
    out: Path
    words: list[str]

    @property
    def adapter(self) -> Path:
        return self.out / ADAPTER_NAME


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory) -> Path:
    """Three photos of two sizes, two of them with captions."""
    folder = tiny.make_photos(tmp_path_factory.mktemp("two_sizes"), 3, (96, 64))
    tiny.make_photos(folder, 1, (64, 80), seed=1)
    for number, caption in enumerate(("sks dog, in the snow, sunny", "sks dog, on a mat")):
        (folder / f"photo-{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def runs(request, two_sizes, tmp_path_factory) -> Callable[[str], Run]:
    """Three steps with validation, for each family once."""
    found: dict[str, Run] = {}

    def run_of(kind: str) -> Run:
        if kind not in found:
            found[kind] = trained(
                kind, request.getfixturevalue(BASES[kind]), two_sizes, tmp_path_factory.mktemp(kind)
            )
        return found[kind]

    return run_of


@pytest.fixture(params=BASES)
def run(request, runs) -> Run:
    return runs(request.param)


def sampling_steps(kind: str) -> int:
    """Steps of a validation picture: for Stable Diffusion as many as users get, fewer for the others."""
    return 25 if kind == "sd" else validation._INFERENCE_STEPS


def trained(kind: str, base: Path, photos: Path, out: Path) -> Run:
    torch.set_num_threads(1)
    words = [*STEPS.split(), *WORDS[kind].split()]
    pictures = ["--validation_steps=2", "--num_validation_images=1", "--validation_prompt", PROMPT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_INFERENCE_STEPS", sampling_steps(kind))
        run_train(base, photos, out, *words, *pictures)
    return Run(kind, base, photos, out, words)


def plain_pipeline(run: Run, scheduler: Any = None) -> Any:
    """As a user of diffusers has it; `scheduler` in place of the base's own."""
    pipeline = DiffusionPipeline.from_pretrained(
        run.base, **({} if run.kind in ("xl", "edm") else {"safety_checker": None})
    )
    if scheduler is not None or run.kind == "if":
        fixed = {"variance_type": "fixed_small"} if run.kind == "if" else {}
        pipeline.scheduler = (scheduler or type(pipeline.scheduler)).from_config(
            pipeline.scheduler.config, **fixed
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_picture(run: Run, pipeline: Any, seed: int, steps: int) -> np.ndarray:
    """uint8 [height, width, 3], as integers that can be subtracted."""
    words: dict[str, Any] = {"prompt": PROMPT}
    if (
        run.kind == "v"
        # by hand: with the newest transformers diffusers' own clip_skip fails, and it skips nothing for
        # the empty prompt
    ):
        words = {
            "prompt_embeds": plain_clip(pipeline, 1, PROMPT),
            "negative_prompt_embeds": plain_clip(pipeline, 1, ""),
        }
    generator = torch.Generator().manual_seed(seed)
    image = pipeline(**words, num_inference_steps=steps, guidance_scale=7.5, generator=generator).images[0]
    return np.asarray(image).astype(int)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def ours(run: Run, out: Path, seed: int, steps: int, *more: str) -> np.ndarray:
    words = (
        f"--pretrained_model_name_or_path {run.base} --output_dir {out} --num_inference_steps {steps} "
        f"--seeds {seed}"
    )
    infer.main(parse(InferOptions, "", [*words.split(), "--prompt", PROMPT, *more]))
    return pixels(out / f"00000_{seed}.png")


# --- each family


@pytest.mark.trains
def test_a_run_leaves_its_pictures_and_resumes_to_the_same_bytes(run, tmp_path):
    """Three steps are two and one more: with dropout, flips, dropped captions, accumulation, both text
    encoders where they can be trained."""
    swept = {"weight-0.50.png", "weight-0.75.png", "weight-1.25.png"}
    drawn = {"step-000000-00.png", "step-000002-00.png", "image_0.png"}
    assert {path.name for path in run.out.glob("**/*.png")} == drawn | swept
    resumed = run_train(
        run.base, run.photos, tmp_path, *run.words, "--resume_from_checkpoint", str(run.out / "checkpoint-2")
    )
    assert digest(resumed) == digest(run.adapter)
    assert digest(run.out / "checkpoint-2" / ADAPTER_NAME) != digest(run.adapter)


@pytest.mark.trains
def test_prompts_of_the_first_rows_are_on_the_page_of_a_run_with_captions(runs):
    page = (runs("v").out / "report.html").read_text()
    assert "Prompts of the first rows" in page
    assert re.search(
        r"<td>photo-0.png</td><td>(?!sks dog, in the snow, sunny)[^<]*in the snow[^<]*</td>", page
    )
    assert "Prompts of the first rows" not in (runs("sd").out / "report.html").read_text()


@pytest.mark.trains
def test_plain_diffusers_draws_what_infer_draws(run, tmp_path):
    """To one of 255 levels: the layout of the weights in memory is another. From the kohya file too, and from
    one without metadata."""
    drawn = ours(run, tmp_path / "out", 5, 4, "--adapter", str(run.adapter))
    without = plain_picture(run, plain_pipeline(run), 5, 4)
    assert np.abs(drawn - without).max() > 20
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(run.adapter), bare)
    kohya = [run.out / "pytorch_lora_weights_kohya.safetensors"] if "kohya" in WORDS[run.kind] else []
    for path in [run.adapter, bare, *kohya]:
        pipeline = plain_pipeline(run)
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
        assert np.abs(plain_picture(run, pipeline, 5, 4) - drawn).max() <= 1, path.name


@pytest.mark.trains
def test_validation_shows_what_plain_diffusers_draws_with_the_files(run):
    """Along the way the adapter in memory, at the end the finished file; to one of 255 levels."""
    scheduler = {"edm": EDMEulerScheduler, "if": DDPMScheduler}.get(run.kind, DPMSolverMultistepScheduler)
    seed, steps = sampling_order.key(1, "validation", 0), sampling_steps(run.kind)
    for path, folder in (
        (run.out / "validation" / "step-000002-00.png", run.out / "checkpoint-2"),
        (run.out / "validation" / "image_0.png", run.out),
    ):
        pipeline = plain_pipeline(run, scheduler)
        pipeline.load_lora_weights(folder, weight_name=ADAPTER_NAME)
        assert np.abs(plain_picture(run, pipeline, seed, steps) - pixels(path)).max() <= 1, path.name


@pytest.mark.trains
def test_two_processes_train_the_xl_adapter_of_one(runs, tmp_path):
    """Two processes are one that accumulates twice, bit for bit."""
    run, words = runs("xl"), [*STEPS.split(), *XL_WORDS.split(), "--num_threads", "1"]
    main_on_two_processes(
        train.main, parse(TrainOptions, "", train_words(run.base, run.photos, tmp_path, *words))
    )
    assert digest(tmp_path / ADAPTER_NAME) == digest(run.adapter)


# --- what the UNet is told


@pytest.fixture
def told(monkeypatch) -> list[dict[str, Any]]:
    """What the UNet was told at each call."""
    calls: list[dict[str, Any]] = []
    real = UNet2DConditionModel.forward

    def forward(self, sample, timestep, encoder_hidden_states, **others):
        calls.append({"embeds": encoder_hidden_states.detach(), **(others.get("added_cond_kwargs") or {})})
        return real(self, sample, timestep, encoder_hidden_states, **others)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return calls


@pytest.mark.trains
@pytest.mark.parametrize("crop", ["--cache_latents off", "--center_crop", ""])
def test_size_and_crop_of_each_picture_arrive_with_its_pixels(
    tiny_xl, two_sizes, tmp_path, monkeypatch, told, crop
):
    """Photos of two sizes and class images, mirrored or not: the crop is that of the picture as it is shown;
    of one encoded whole, on its grid."""
    encoded: list[torch.Tensor] = []
    real, grid = autoencoder.encode, 1 if crop else 8

    def encode(vae, pixel_values):
        encoded.extend(pixel_values)
        return real(vae, pixel_values)

    monkeypatch.setattr(autoencoder, "encode", encode)
    tiny.make_photos(tmp_path / "class", 3, (64, 72), seed=2)
    words = (
        f"--with_prior_preservation --class_data_dir {tmp_path / 'class'} --num_class_images 3 "
        "--train_batch_size 2 --max_train_steps 3"
    )
    run_train(
        tiny_xl,
        two_sizes,
        tmp_path / "out",
        *words.split(),
        *crop.split(),
        "--random_flip",
        "--class_prompt",
        "a dog",
    )
    expected, shown, flips = [], [], 0
    for step in range(3):
        for purpose, folder in (("instance", two_sizes), ("class", tmp_path / "class")):
            for row in (2 * step, 2 * step + 1):
                image: Image.Image = Image.open(
                    folder / f"photo-{sampling_order.image_of_row(1, f'{purpose}-order', row, 3)}.png"
                )
                room = (image.width - 64, image.height - 64)  # the shorter side is 64 already
                centered = crop == "--center_crop"
                left, top = (
                    (room[0] // 2, room[1] // 2)
                    if centered
                    else sampling_order.crop_of_row(1, purpose, row, room, grid)
                )
                expected.append([image.height, image.width, top, left, 64, 64])
                if purpose == "instance" and sampling_order.chance(1, "instance-flip", row) < 0.5:
                    image, flips = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flips + 1
                shown.append(
                    torch.tensor(np.asarray(image.crop((left, top, left + 64, top + 64)))).permute(2, 0, 1)
                    / 127.5
                    - 1
                )
    assert torch.cat([call["time_ids"] for call in told]).tolist() == expected
    assert 0 < flips < 6
    if crop == "--cache_latents off":
        assert torch.allclose(torch.stack(encoded), torch.stack(shown))
    else:  # each photo and its mirror image once
        assert len(encoded) == 3 * 2 + 3
        for (*_, top, left, _, _), pixel_values in zip(expected, shown, strict=True):
            top, left = (0, 0) if crop else (top, left)
            crops = [own[:, top : top + 64, left : left + 64] for own in encoded]
            assert any(own.shape == pixel_values.shape and torch.allclose(own, pixel_values) for own in crops)


@pytest.mark.trains
@pytest.mark.parametrize("train_text", [[], ["--train_text_encoder"]])
def test_dropped_captions_are_zeros_for_xl_and_the_empty_prompt_elsewhere(
    tiny_xl, tiny_base, photos_dir, tmp_path, told, train_text
):
    run_train(
        tiny_xl,
        photos_dir,
        tmp_path / "xl",
        "--max_train_steps",
        "1",
        "--caption_dropout",
        "1.0",
        *train_text,
    )
    assert not told[0]["embeds"].any()
    assert not told[0]["text_embeds"].any()
    run_train(
        tiny_base,
        photos_dir,
        tmp_path / "sd",
        "--max_train_steps",
        "1",
        "--caption_dropout",
        "1.0",
        *train_text,
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    assert torch.allclose(told[1]["embeds"], plain_clip(pipeline, 0, ""), atol=1e-6)


# --- loading and flags


def test_weights_lie_where_their_products_have_the_same_last_bits(tiny_xl):
    """A loader may leave them where a mapped file has them, and under torchrun it does not."""
    found = families.find(BaseOptions(str(tiny_xl)))
    cpu = torch.device("cpu")
    own = [
        loading.load_unet(found, torch.float32, cpu),
        loading.load_vae(found, cpu),
        *loading.load_encoders(found, torch.float32, cpu).values(),
    ]
    pipeline = pipelines.load_pipeline(found, torch.float32, cpu)
    for model in (*own, pipeline.unet, pipeline.text_encoder_2):
        assert model is not None
        assert {tensor.data_ptr() % 64 for tensor in model.parameters()} == {0}


@pytest.mark.trains
def test_lora_layers_selects_and_unknown_names_are_refused(tiny_base, photos_dir, tmp_path, request):
    state = load_file(
        run_train(
            tiny_base,
            photos_dir,
            tmp_path / "run",
            "--max_train_steps",
            "1",
            "--lora_layers",
            "to_q, attn2.to_k,conv1",
        )
    )
    ends = {".".join(key.split(".lora_")[0].split(".")[-2:]) for key in state}
    assert (
        {end for end in ends if not end.endswith(".conv1")}
        == {"attn1.to_q", "attn2.to_q", "attn2.to_k"}
        < ends
    )
    request.getfixturevalue("no_models")
    with pytest.raises(UserError, match=r"--lora_layers: no layer of unet ends with to_kk; there are .*to_k"):
        run_train(tiny_base, photos_dir, tmp_path / "other", "--lora_layers", "to_q,to_kk")


def numbers(path: Path) -> dict[str, bytes]:
    """An adapter's tensors; its metadata also name the base."""
    return {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}


@pytest.mark.trains
def test_another_vae_takes_the_place_of_the_bases(tiny_base, photos_dir, tmp_path, request):
    torch.manual_seed(7)
    tiny.build_vae().save_pretrained(tmp_path / "vae")
    words = ["--max_train_steps", "1", "--validation_prompt", "a dog", "--num_validation_images", "1"]
    own = run_train(tiny_base, photos_dir, tmp_path / "own", *words)
    other = run_train(
        tiny_base,
        photos_dir,
        tmp_path / "other",
        *words,
        "--pretrained_vae_model_name_or_path",
        str(tmp_path / "vae"),
    )
    swapped = shutil.copytree(tiny_base, tmp_path / "swapped")
    shutil.copytree(tmp_path / "vae", swapped / "vae", dirs_exist_ok=True)
    by_hand = run_train(swapped, photos_dir, tmp_path / "by_hand", *words)
    assert numbers(other) == numbers(by_hand) != numbers(own)
    assert digest(tmp_path / "other" / "validation" / "image_0.png") == digest(
        tmp_path / "by_hand" / "validation" / "image_0.png"
    )
    run = Run("sd", tiny_base, photos_dir, tmp_path, [])
    drawn = ours(run, tmp_path / "a", 1, 2, "--pretrained_vae_model_name_or_path", f"{tmp_path}/vae")
    assert np.array_equal(drawn, ours(dataclasses.replace(run, base=swapped), tmp_path / "b", 1, 2))
    request.getfixturevalue("no_models")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    with pytest.raises(
        UserError,
        match=(
            r"--pretrained_vae_model_name_or_path: .* has latents of 16 channels at 1/8; the base has "
            r"4 channels at 1/8"
        ),
    ):
        run_train(
            tiny_base,
            photos_dir,
            tmp_path / "refused",
            "--pretrained_vae_model_name_or_path",
            str(tmp_path / "vae"),
        )


@pytest.mark.trains
def test_prediction_type_makes_one_base_the_other(tiny_base, tiny_v_base, photos_dir, tmp_path):
    """The two have the same weights, and schedulers that differ in this alone: adapter, validation and
    pictures are the same."""
    words, override = (
        ["--max_train_steps", "2", "--validation_prompt", "a dog", "--num_validation_images", "1"],
        ["--prediction_type", "v_prediction"],
    )
    said, own = (
        run_train(tiny_base, photos_dir, tmp_path / "said", *words, *override),
        run_train(tiny_v_base, photos_dir, tmp_path / "own", *words),
    )
    assert (
        numbers(said)
        == numbers(own)
        != numbers(run_train(tiny_base, photos_dir, tmp_path / "epsilon", *words))
    )
    assert digest(tmp_path / "said" / "validation" / "image_0.png") == digest(
        tmp_path / "own" / "validation" / "image_0.png"
    )
    run = Run("sd", tiny_base, photos_dir, tmp_path, [])
    drawn = ours(run, tmp_path / "a", 1, 3, *override)
    assert np.array_equal(drawn, ours(dataclasses.replace(run, base=tiny_v_base), tmp_path / "b", 1, 3))


@pytest.mark.trains
def test_validation_flags_say_when_and_how(tiny_base, photos_dir, tmp_path):
    words = (
        "--max_train_steps 5 --validation_steps 2 --num_validation_images 1 --validation_scheduler "
        "DDPMScheduler --skip_final_inference"
    )
    run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        *words.split(),
        "--validation_prompt",
        PROMPT,
        "--checkpointing_steps",
        "4",
    )
    names = {f"step-00000{step}-00.png" for step in (0, 2, 4)}
    assert {path.name for path in tmp_path.glob("**/*.png")} == names
    run = Run("sd", tiny_base, photos_dir, tmp_path, [])
    pipeline = plain_pipeline(run, DDPMScheduler)
    pipeline.load_lora_weights(tmp_path / "checkpoint-4", weight_name=ADAPTER_NAME)
    seed, steps = sampling_order.key(1, "validation", 0), validation._INFERENCE_STEPS
    drawn = plain_picture(run, pipeline, seed, steps)
    assert np.abs(drawn - pixels(tmp_path / "validation" / "step-000004-00.png")).max() <= 1


# --- what a base cannot do


@pytest.mark.parametrize(
    ("base", "words", "said"),
    [
        (
            "tiny_if",
            "--train_text_encoder",
            "--train_text_encoder: DeepFloyd IF, first stage takes the text of a frozen T5",
        ),
        ("tiny_if", "--clip_skip 1", "--clip_skip: DeepFloyd IF, first stage has no CLIP"),
        (
            "tiny_if",
            "--pretrained_vae_model_name_or_path {vae}",
            "--pretrained_vae_model_name_or_path: .* has no VAE",
        ),
        ("tiny_if", "--do_edm_style_training", "--do_edm_style_training: .* is trained on noise prediction"),
        (
            "tiny_if",
            "--output_kohya_format",
            "--output_kohya_format: there is no such format for DeepFloyd IF",
        ),
        (
            "tiny_edm",
            "--validation_scheduler DDPMScheduler",
            "--validation_scheduler: a base with an EDM scheduler is drawn with its own scheduler",
        ),
        (
            "tiny_edm",
            "--snr_gamma 5",
            "--snr_gamma: Min-SNR formulation is not supported when conducting EDM-style training",
        ),
        ("tiny_base", "--tokenizer_max_length 78", "--tokenizer_max_length must be at most 77"),
        (
            "tiny_xl",
            "--tokenizer_max_length 33",
            "--tokenizer_max_length must be at most 32",
        ),  # what its tokenizers, and so its pipeline, pad to
    ],
)
def test_flags_that_a_base_cannot_follow_are_refused_at_the_door(
    request, photos_dir, tmp_path, no_models, base, words, said
):
    words = words.format(vae=request.getfixturevalue("tiny_base") / "vae")
    with pytest.raises(UserError, match=said) as refusal:
        run_train(
            request.getfixturevalue(base),
            photos_dir,
            tmp_path,
            "--validation_prompt",
            "a dog",
            *words.split(),
        )
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("base", "part", "change", "said"),
    [
        ("tiny_if", "unet", {"in_channels": 6}, "takes 6 channels and not 3: a second stage"),
        (
            "tiny_xl",
            "text_encoder_2",
            {"projection_dim": 32},
            "takes 72 numbers of text and size and gets 80: parts of two different bases",
        ),
        (
            "tiny_xl",
            "text_encoder_2",
            {"hidden_size": 48},
            "takes 72 wide text and its text encoders give 80: parts of two different bases",
        ),
    ],
)
def test_bases_of_other_shapes_are_refused_at_the_door(
    request, photos_dir, tmp_path, no_models, base, part, change, said
):
    folder = shutil.copytree(request.getfixturevalue(base), tmp_path / "base")
    config = json.loads((folder / part / "config.json").read_text())
    (folder / part / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        run_train(folder, photos_dir, tmp_path / "out", "--resolution", "16")
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_is_of_the_weights_that_are_loaded(tiny_base, tmp_path):
    """Those of a variant, in pieces, too: another base must not count as the same."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="100KB")
    pieces = sorted((tmp_path / "base" / "unet").glob("*.fp16-*.safetensors"))
    assert len(pieces) > 1
    base = families.find(BaseOptions(str(tmp_path / "base"), variant="fp16"))
    before = base.fingerprint()
    data = bytearray(pieces[-1].read_bytes())
    data[-1] ^= 1
    pieces[-1].write_bytes(bytes(data))
    assert base.fingerprint() != before
    with pytest.raises(UserError, match=r"--variant: .* has no bf16 weights; leave --variant out"):
        families.find(BaseOptions(str(tiny_base), variant="bf16"))


def test_the_advised_clip_skip_is_one_that_every_encoder_can_follow(tiny_xl, tmp_path):
    folder = shutil.copytree(tiny_xl, tmp_path / "base")
    base = families.find(BaseOptions(str(folder)))
    for part, layers in (("text_encoder", 9), ("text_encoder_2", 4)):
        config = json.loads((folder / part / "config.json").read_text())
        config["num_hidden_layers"] = layers
        (folder / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="--clip_skip must be at most 3, text_encoder_2 has no more"
    ) as refused:
        families.check_text(base, TextOptions(clip_skip=30))
    advised = int(str(refused.value).split("at most ")[1].split(",")[0])
    families.check_text(base, TextOptions(clip_skip=advised))
    with pytest.raises(UserError, match="--clip_skip must be at most"):
        families.check_text(base, TextOptions(clip_skip=advised + 1))
