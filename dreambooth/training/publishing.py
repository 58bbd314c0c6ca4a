"""What is made of a finished adapter: its kohya form, its model card, its upload."""

from collections.abc import Sequence
from pathlib import Path

from dreambooth.adapter_files import formats, layer_names, native
from dreambooth.bases import families
from dreambooth.files import atomic
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.runtime.stops import Stop
from dreambooth.training import hub, model_card


def publish(
    options: ResolvedTrainOptions,
    base: families.Base,
    adapter: Path,
    pictures: Sequence[str],
    repository: str | None,
) -> None:
    """Write and upload what the flags ask for. `pictures` are names in the adapter's folder, `repository` is OWNER/NAME on the hub or None.
    Raises Stop if one of them fails."""
    folder = adapter.parent
    if options.adapter.output_kohya_format:
        _write_kohya(options, base, adapter)
    if repository is not None:
        card = model_card.model_card(
            options, base_folder=base.folder, family=base.family.key, pictures=pictures, repository=repository
        )
        try:
            atomic.write(folder / hub.CARD_NAME, card.encode())
            print(f"uploaded to {hub.push(options.reports, folder, pictures)}")
        except (OSError, hub.UploadFailed) as error:
            raise Stop(str(error)) from None


def _write_kohya(options: ResolvedTrainOptions, base: families.Base, adapter: Path) -> None:
    info = {
        "resolution": options.instance.resolution,
        "seed": options.run.seed,
        "prediction_type": base.prediction_type,
    }
    layers = base.layers()
    found = formats.read(adapter, layers)
    family = base.kohya_family
    assert family is not None  # checked with the flags
    data = formats.write_kohya(found, family, info, depth=layer_names.depth_of(layers["unet"]))
    path = adapter.parent / native.KOHYA_NAME
    try:
        atomic.write(path, data)
    except OSError as error:
        raise Stop(f"{path} cannot be written: {error.strerror or error}") from None
    print(f"wrote {path}")
