"""After training: the adapter in kohya's format, the model card, the upload."""

from collections.abc import Mapping
from pathlib import Path

from dreambooth.io.errors import shown
from dreambooth.training import hub, model_card, programs, saving
from dreambooth.training.start import Start


def publish(start: Start, adapter: Path, pictures: Mapping[str, str]) -> None:
    """Write the kohya file for --output_kohya_format, and upload for --push_to_hub. For the main process.

    `pictures` are prompts by the names of files beside `adapter`. Raises Stop if a file cannot be written, or
    the upload fails.
    """
    options, base = start.options, start.base
    if options.adapter.output_kohya_format:
        saving.write_kohya(adapter, base)
    if start.repository is not None:
        card = model_card.model_card(
            start.named_flags,
            base_folder=base.place,
            family=base.family.key,
            pictures=pictures,
            repository=start.repository,
            token=options.reports.hub_token,
            single_file=base.single_file.scheduler if base.single_file else None,
            passes=start.status.passes,
        )
        hub.publish(options.reports, start.output_dir, card, list(pictures))


def last_line(start: Start) -> str:
    """The last line of a run: which file is for which program."""
    has_kohya_names = start.base.kohya_family is not None
    folder = shown(start.output_dir)
    return "; ".join(programs.readers(start.flags, folder, has_kohya_names=has_kohya_names))
