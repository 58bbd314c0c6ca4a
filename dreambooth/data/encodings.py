"""Encodes photos to latents and prompts to embeddings, through the encoding cache.

The name of a cache entry is a hash of contents: the photo's bytes, its encoded box, the weights that encode
it, and what changes last bits. For random crops the full resized photo is encoded, and crops are cut from its
latents. Models are loaded only for missing entries, and freed afterwards. Processes that share a
folder share the work.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import PIL
import torch
from tqdm import tqdm

from dreambooth.bases import autoencoder, families, loading
from dreambooth.bases.autoencoder import Posterior
from dreambooth.bases.families import Base
from dreambooth.bases.prompts import PromptCache, PromptEmbeds, TextParts
from dreambooth.data import photos
from dreambooth.data.crops import Box, Corner, Crops
from dreambooth.data.encoding_cache import EncodingCache, Entry, name_of
from dreambooth.data.photos import Photo
from dreambooth.io.errors import UserError, shown
from dreambooth.runtime import memory
from dreambooth.runtime.environment import environment, processor
from dreambooth.runtime.processes import Peers

Mode = Literal["memory", "disk", "off"]
Check = Callable[[], None]

_MOST_IN_MEMORY = 64  # pictures


def mode_of(
    wanted: Literal["auto", "memory", "disk", "off"], pictures: int, *, is_folder_given: bool
) -> Mode:
    """The value of --cache_latents with "auto" resolved. `pictures` counts photos and their mirror images.

    A given --encoded_dir means disk.
    """
    if wanted != "auto":
        return wanted
    return "disk" if pictures > _MOST_IN_MEMORY or is_folder_given else "memory"


@dataclasses.dataclass(frozen=True)
class Part:
    """A box of a photo, or of its mirror image, that is encoded as one."""

    photo: Photo
    is_mirrored: bool
    crops: Crops
    box: Box


class EncodedPhotos:
    """The cached posteriors of every crop that a run may use."""

    def __init__(self, cache: EncodingCache, entries: Mapping[Part, Entry]):
        self.cache, self.entries = cache, entries

    def posterior(self, photo: Photo, crops: Crops, corner: Corner, *, is_mirrored: bool) -> Posterior:
        """The posterior of the crop at `corner`, [1, channels, height, width] on the CPU.

        Where crops vary, the corner is a multiple of the VAE's stride. Raises Stop if the cache has been
        damaged.
        """
        box = crops.encoded_box(photo.size, corner)
        tensors = self.cache.read(self.entries[Part(photo, is_mirrored, crops, box)])
        left, top = ((at - start) // crops.stride for at, start in zip(corner, box[:2], strict=True))
        width, height = crops.latent_shape
        return Posterior(
            *(tensors[key][..., top : top + height, left : left + width] for key in ("mean", "std"))
        )


def encode_photos(
    cache: EncodingCache,
    base: Base,
    pictures: Sequence[tuple[Photo, bool, Crops]],
    device: torch.device,
    peers: Peers,
    check: Check,
) -> EncodedPhotos:
    """The latents of every (photo, whether mirrored, how it is cut) of `pictures`. The VAE is loaded only if
    a part is not cached.

    `check` is called before each entry is looked up and before each is encoded. Raises UserError if a photo
    has changed since it was checked, or if the VAE changed while it was read.
    """
    digests = {"vae": base.part_digest("vae")} if base.family.has_vae else {}
    channels = base.latent_channels
    last_bits = environment(device, ("torch", "diffusers"), **processor(device)) | {"pillow": PIL.__version__}

    def entry_of(part: Part) -> Entry:
        crops, (left, top, right, bottom) = part.crops, part.box
        content = {
            # the same file may have other pixels with another decoder
            "photo": [part.photo.sha256, part.photo.pixels_sha256],
            "transform": {
                "resolution": crops.bucket or crops.resolution,
                "interpolation": crops.interpolation,
                "mirrored": part.is_mirrored,
                "box": part.box,
            },
            "vae": digests.get("vae"),
            "dtype": "float32",
            "around": last_bits,
        }
        shape = (1, channels, (bottom - top) // crops.stride, (right - left) // crops.stride)
        return Entry(name_of("latents", content), {"mean": shape, "std": shape})

    entries = {
        part: entry_of(part)
        for photo, is_mirrored, crops in pictures
        for part in (Part(photo, is_mirrored, crops, box) for box in crops.encoded_boxes(photo.size))
    }
    parts = {entry: part for part, entry in entries.items()}

    def encode(missing: Sequence[Entry]) -> None:
        vae = loading.load_vae(base, device)
        _check_unchanged(base, digests)
        if vae is not None:
            vae.decoder = None  # unused, and most of the weights
            memory.trim()
        for entry in tqdm(missing, desc="encoding photos", unit="image", disable=not peers.is_main):
            check()
            part = parts[entry]
            image, mirrored = photos.load(part.photo), part.is_mirrored
            pixel_values = part.crops.pixel_values(image, part.box, is_mirrored=mirrored)
            posterior = autoencoder.encode(vae, pixel_values[None])
            cache.store(entry, {"mean": posterior.mean, "std": posterior.std})

    _fill(cache, list(parts), encode, peers, check)
    return EncodedPhotos(cache, entries)


def encode_prompts(
    cache: EncodingCache,
    base: Base,
    text: TextParts,
    wanted: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers,
    check: Check,
) -> PromptCache:
    """The embeddings of all `wanted` prompts. The encoders are loaded, in `dtype`, only if a prompt is not
    cached.

    `text` has no encoders. `check` is called before each entry is looked up and before each is encoded.
    Raises UserError if an encoder changed while it was read.
    """
    # Name the entry of every prompt.
    shapes = families.prompt_embed_shapes(base, text.max_tokens)
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
    entries: dict[str, Entry] = {}
    for prompt in dict.fromkeys(wanted):
        tokens = [[ids.tolist() for ids in text.tokenize(n, [prompt])] for n in range(len(text.tokenizers))]
        name = name_of("prompt", {"text": prompt, "tokens": tokens, **common})
        entries[prompt] = Entry(name, shapes)
    prompt_of = {entry: prompt for prompt, entry in entries.items()}

    @torch.no_grad()
    def encode(missing: Sequence[Entry]) -> None:
        # No autocast: frozen encoders are in `dtype`, except for weights of T5 that overflow in float16.
        loaded = dataclasses.replace(text, encoders=loading.load_encoders(base, dtype, device))
        _check_unchanged(base, digests)
        for entry in missing:
            check()
            prompt_embeds = loaded([prompt_of[entry]])
            pooled = {} if prompt_embeds.pooled is None else {"pooled": prompt_embeds.pooled}
            cache.store(entry, {"embeds": prompt_embeds.embeds} | pooled)

    def read(prompt: str) -> PromptEmbeds:
        tensors = cache.read(entries[prompt])
        return PromptEmbeds(tensors["embeds"], tensors.get("pooled"))

    _fill(cache, list(prompt_of), encode, peers, check)
    return PromptCache(read, list(entries), device)


def _check_unchanged(base: Base, digests: Mapping[str, str]) -> None:
    """Raise UserError if the files of a part are not those whose digests are in the names of entries.

    Otherwise the cache would hold encodings of the new weights under names of the old ones, for good.
    """
    for part, digest in digests.items():
        if base.part_digest(part) != digest:
            place = shown(base.place if base.single_file else base.part_folder(part))
            raise UserError(f"the base has changed while it was read: {place}; start again")


def _fill(
    cache: EncodingCache,
    entries: Sequence[Entry],
    encode: Callable[[Sequence[Entry]], None],
    peers: Peers,
    check: Check,
) -> None:
    """Call `encode` for the entries that are not cached.

    In memory, every process encodes all of them. In a folder, each process encodes its share, and afterwards
    whatever it still lacks: nodes may have no folder in common, and files may be damaged or the disk full.
    """

    def encode_missing(entries: Sequence[Entry]) -> None:
        missing = []
        # Files are read and hashed, which may take long: show a bar, and let `check` stop it.
        is_quiet = cache.folder is None or not peers.is_main
        for entry in tqdm(entries, desc="looking for encodings", unit="file", delay=2, disable=is_quiet):
            check()
            if not cache.has(entry):
                missing.append(entry)
        if missing:
            encode(missing)

    if cache.folder is None or peers.world == 1:
        encode_missing(entries)
        return
    encode_missing(entries[peers.rank :: peers.world])
    peers.barrier()
    encode_missing([entry for n, entry in enumerate(entries) if n % peers.world != peers.rank])
