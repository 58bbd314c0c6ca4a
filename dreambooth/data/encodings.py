"""What a run encodes once: photos to latents, prompts to conditions.

An entry's name is made of contents: the photo's bytes, the part of it that is encoded, the weights that encode it, and what changes last bits.
Where crops vary the whole resized photo is encoded, and a crop is cut from its latents, on their grid. Models are loaded only for what is
missing, and freed after it. Several processes with one folder share the work.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import PIL
import torch
from tqdm import tqdm

from dreambooth.bases import autoencoder, families, loading, prompts
from dreambooth.bases.prompts import PromptCache, PromptEmbeds, TextParts
from dreambooth.data import photos
from dreambooth.data.crops import Box, Corner, Crops
from dreambooth.data.encoding_cache import Entries, Shapes, name_of
from dreambooth.data.photos import Photo
from dreambooth.errors import UserError, shown
from dreambooth.runtime import memory
from dreambooth.runtime.environment import environment, processor
from dreambooth.runtime.processes import Peers

Mode = Literal["memory", "disk", "off"]
Check = Callable[[], None]

_MOST_IN_MEMORY = 64  # pictures


def mode_of(
    wanted: Literal["auto", "memory", "disk", "off"], pictures: int, *, is_folder_given: bool
) -> Mode:
    """What --cache_latents means for so many pictures, mirror images counted. Who names a folder wants it to be used."""
    if wanted != "auto":
        return wanted
    return "disk" if pictures > _MOST_IN_MEMORY or is_folder_given else "memory"


@dataclasses.dataclass(frozen=True)
class Part:
    """What is encoded as one: a photo or its mirror image, and the box of it."""

    photo: Photo
    is_mirrored: bool
    box: Box


class EncodedPhotos:
    """The posterior of every crop that a run may draw."""

    def __init__(self, entries: Entries, names: Mapping[Part, str], crops: Crops):
        self.entries, self.names, self.crops = entries, names, crops

    def posterior(self, photo: Photo, corner: Corner, *, is_mirrored: bool) -> autoencoder.Posterior:
        """[1, channels, height, width] on the CPU, of the crop at `corner`, which where crops vary is a multiple of the grid."""
        box = self.crops.encoded_box(photo.size, corner)
        left, top = (
            (start - begin) // self.crops.stride for start, begin in zip(corner, box[:2], strict=True)
        )
        found = self.entries.read(self.names[Part(photo, is_mirrored, box)])
        side = self.crops.latent_side
        return autoencoder.Posterior(
            *(found[key][..., top : top + side, left : left + side] for key in ("mean", "std"))
        )


def encode_photos(
    entries: Entries,
    base: families.Base,
    pictures: Sequence[tuple[Photo, bool]],
    crops: Crops,
    device: torch.device,
    peers: Peers,
    check: Check,
) -> EncodedPhotos:
    """Encode every (photo, whether mirrored) of `pictures` that `entries` lacks. `check` is called before each that is
    looked for, and before each that is encoded.

    Raises UserError if a photo has changed since it was checked, or the VAE while it was read.
    """
    digests = {"vae": base.part_digest("vae")} if base.family.has_vae else {}
    channels = base.latent_channels
    around = environment(device, ("torch", "diffusers"), **processor(device))
    parts = [
        Part(photo, is_mirrored, box)
        for photo, is_mirrored in pictures
        for box in crops.encoded_boxes(photo.size)
    ]
    names, shapes = {}, {}
    for part in parts:
        left, top, right, bottom = part.box
        # a bucket of another aspect would be a word of its own here
        transform = {
            "resolution": crops.resolution,
            "interpolation": crops.interpolation,
            "mirrored": part.is_mirrored,
            "box": part.box,
        }
        what = {
            "photo": [
                part.photo.sha256,
                part.photo.pixels_sha256,
            ],  # one file may be other pixels with another decoder
            "transform": transform,
            "vae": digests.get("vae"),
            "dtype": "float32",
            "around": around | {"pillow": PIL.__version__},
        }
        names[part] = name_of("latents", what)
        shape = (1, channels, (bottom - top) // crops.stride, (right - left) // crops.stride)
        shapes[names[part]] = {"mean": shape, "std": shape}
    of_name = {name: part for part, name in names.items()}

    def encode(missing: Sequence[str]) -> None:
        vae = loading.load_vae(base, device)
        _check_unchanged(base, digests)
        if vae is not None:
            vae.decoder = None  # most of the weights, and of no use here
            memory.trim()
        for name in tqdm(missing, desc="encoding photos", unit="image", disable=not peers.is_main):
            check()
            part = of_name[name]
            image = photos.load_checked(part.photo)
            pixels = crops.pixel_values(image, part.box, is_mirrored=part.is_mirrored)
            posterior = autoencoder.encode(vae, pixels[None])
            entries.keep(name, {"mean": posterior.mean, "std": posterior.std})

    _fill(entries, shapes, encode, peers, check)
    return EncodedPhotos(entries, names, crops)


def encode_prompts(
    entries: Entries,
    base: families.Base,
    text: TextParts,
    asked: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers,
    check: Check,
) -> PromptCache:
    """Encode every prompt that `entries` lacks, with encoders in `dtype` that `text` has not loaded yet. `check` is called before each that is
    looked for, and each that is encoded. Raises UserError if an encoder has changed while it was read."""
    distinct = list(dict.fromkeys(asked))
    shapes_of_one = families.prompt_embed_shapes(base, text.max_tokens)
    digests = {encoder: base.part_digest(encoder) for encoder in base.family.text}
    common = {
        "family": base.family.key,
        "encoders": digests,
        "dtype": str(dtype),
        "clip_skip": text.clip_skip,
        "attention_mask": text.attention_mask,
        "max_tokens": text.max_tokens,
        "zeros_for_empty": text.zeros_for_empty,
        "around": environment(device, ("torch", "transformers"), **processor(device)),
    }
    names = {}
    for prompt in distinct:
        tokens = [
            [part.tolist() for part in text.ids(number, [prompt])] for number in range(len(text.tokenizers))
        ]
        names[prompt] = name_of("prompt", {"text": prompt, "tokens": tokens, **common})
    of_name = {name: prompt for prompt, name in names.items()}

    @torch.no_grad()
    def encode(missing: Sequence[str]) -> None:
        # frozen encoders have their dtype, and T5 keeps some of its weights in float32, where float16 overflows: no autocast
        loaded = dataclasses.replace(text, encoders=loading.load_encoders(base, dtype, device))
        _check_unchanged(base, digests)
        for name in missing:
            check()
            found = loaded([of_name[name]])
            entries.keep(
                name, {"embeds": found.embeds} | ({} if found.pooled is None else {"pooled": found.pooled})
            )

    _fill(entries, dict.fromkeys(names.values(), shapes_of_one), encode, peers, check)

    def read(prompt: str) -> PromptEmbeds:
        tensors = entries.read(names[prompt])
        return PromptEmbeds(tensors["embeds"], tensors.get("pooled"))

    return prompts.prompt_cache(read, distinct, device)


def _check_unchanged(base: families.Base, digests: Mapping[str, str]) -> None:
    """Raise UserError if the parts just read are not those that the names of entries tell of: what they encode would be found there ever after."""
    for part, digest in digests.items():
        if base.part_digest(part) != digest:
            folder = shown(base.part_folder(part))
            raise UserError(f"the base has changed while it was read: {folder}; start again")


def _fill(
    entries: Entries,
    wanted: Mapping[str, Shapes],
    encode: Callable[[Sequence[str]], None],
    peers: Peers,
    check: Check,
) -> None:
    """Have `encode` make what is missing. In memory each process makes all. In a folder each makes its share, and then what it lacks all the
    same: nodes may have no folder in common, or another's may be damaged or full."""

    def make(names: Sequence[str]) -> None:
        missing = []
        # each is read and hashed: seen where that takes long, and then it can be stopped
        is_quiet = entries.folder is None or not peers.is_main
        for name in tqdm(names, desc="looking for encodings", unit="file", delay=2, disable=is_quiet):
            check()
            if not entries.has(name, wanted[name]):
                missing.append(name)
        if missing:
            encode(missing)

    names = list(wanted)
    if entries.folder is None or peers.world == 1:
        make(names)
        return
    make(names[peers.rank :: peers.world])
    peers.barrier()
    make([name for place, name in enumerate(names) if place % peers.world != peers.rank])
