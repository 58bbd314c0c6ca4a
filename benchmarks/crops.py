"""Measures how much latents cut from those of the full photo differ from latents of the crop, with the
embedded base's VAE.

    python -m benchmarks.crops PHOTOS

PHOTOS is a folder of photos, or of folders of photos. Of each photo the middle is taken, with sides of 3:2,
so that a crop can move. Random crops start on the VAE's grid, at the base's resolution and at twice that. The
figure is the root mean square of the difference of the means, divided by that of the latents. Beside it
stands the same figure for moving the crop by one pixel. Each is taken over the whole crop, over its outermost
latents, and over those at least 4 from the border. Writes `benchmarks/results/crops.json`; without photos,
the reason in place of figures. Takes half a minute on two cores.
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dreambooth.bases import autoencoder, families, loading
from dreambooth.data import encoding_cache, encodings, photos, picture_files
from dreambooth.data.crops import Crops
from dreambooth.options.training import BaseOptions
from dreambooth.runtime.processes import Peers

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "crops.json"
CROPS = 8  # for each photo
INSIDE = 4  # latents between the inside of a crop and its border


class Alone(Peers):
    """One process without peers."""

    def __init__(self) -> None:
        self.rank, self.world, self.is_main = 0, 1, True


def rms(difference: torch.Tensor, latents: torch.Tensor) -> dict[str, float]:
    """Root mean square of `difference` divided by that of `latents`: over all, at the border, away from it.

    Both are [1, channels, height, width]."""
    side = latents.shape[-1]
    border = torch.ones(side, side, dtype=torch.bool)
    inside = torch.zeros(side, side, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    inside[INSIDE:-INSIDE, INSIDE:-INSIDE] = True
    scale = latents.square().mean()
    places = {
        "all": torch.ones_like(border),
        "outermost": border,
        f"{INSIDE} and more from the border": inside,
    }
    return {
        where: float((difference[..., mask].square().mean() / scale).sqrt()) for where, mask in places.items()
    }


def measure(base: families.Base, checked: list[photos.Photo], resolution: int) -> dict[str, Any]:
    """The figures, each the mean over all crops of all photos."""
    device = torch.device("cpu")
    vae, draw = loading.load_vae(base, device), random.Random(0)
    crops = Crops(resolution, "lanczos", False, base.vae_stride)
    cut: list[dict[str, float]] = []
    moved: list[dict[str, float]] = []
    for photo in checked:
        entries = encoding_cache.EncodingCache(None, print)
        encoded = encodings.encode_photos(
            entries, base, [(photo, False, crops)], device, Alone(), lambda: None
        )
        room = crops.room(photo.size)
        for _ in range(CROPS):
            left, top = (base.vae_stride * draw.randrange(length // base.vae_stride + 1) for length in room)
            # one pixel along the longer side, to where there is room
            step = 1 if max(left, top) < max(room) else -1
            other = (left + step, top) if room[0] >= room[1] else (left, top + step)
            pixels = [crops.pixel_values(photos.load(photo), crops.box(at)) for at in ((left, top), other)]
            direct, shifted = (autoencoder.encode(vae, crop[None]).mean for crop in pixels)
            of_cache = encoded.posterior(photo, crops, (left, top), is_mirrored=False).mean
            cut.append(rms(of_cache - direct, direct))
            moved.append(rms(shifted - direct, direct))
    return {
        what: {where: round(sum(each[where] for each in values) / len(values), 5) for where in values[0]}
        for what, values in (("cut from the whole photo's latents", cut), ("crop moved by one pixel", moved))
    }


def main(folder: Path | None) -> dict[str, Any]:
    """The figures by resolution, or the reason why there are none."""
    if folder is None or not folder.is_dir():
        return {
            "skipped": "no folder of photos was given"
            if folder is None
            else "the folder of photos is not there"
        }
    base = families.find(BaseOptions(str(ROOT / "picturebook" / "model")))
    with tempfile.TemporaryDirectory() as wide:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in picture_files.ENDINGS)
        for number, path in enumerate(paths):
            image = photos.decode(path.read_bytes())[0]
            width, height = min(image.width, image.height * 3 // 2), min(image.height, image.width * 2 // 3)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image.crop((left, top, left + width, top + height)).save(Path(wide, f"{number:04d}.png"))
        if not paths:
            return {"skipped": "the folder has no photos"}
        checked = photos.check_folder(wide, "PHOTOS").photos
        sides = (base.default_resolution, 2 * base.default_resolution)
        results = {f"{resolution} pixels": measure(base, checked, resolution) for resolution in sides}
    return {
        "photos": len(checked),
        "crops of each photo": CROPS,
        "pixels of the grid": base.vae_stride,
        "root mean square of the difference, over that of the latents": results,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = json.dumps(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None), indent=1)
    RESULTS.write_text(report + "\n")
    print(report)
