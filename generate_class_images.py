"""Fill a folder with pictures of the class, drawn by the base itself, for prior preservation.

Picture k depends on the seed and k only: any number of processes and any interruption give the same set.
Launch with `accelerate launch` to share the work among processes, or with plain `python`."""

from dreambooth.bases import folders
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions
from dreambooth.runtime import startup, stops

if __name__ == "__main__":  # before the slow imports, see runtime/startup.py
    startup.begin()
    OPTIONS = parse(ClassImageOptions, __doc__)
    folders.hash_ahead(OPTIONS.base)

from pathlib import Path

from dreambooth.bases import families, loading, prompt_syntax, prompts
from dreambooth.data import class_images
from dreambooth.files import ownership
from dreambooth.runtime import processes
from dreambooth.runtime.stops import Watch


def main(options: ClassImageOptions) -> None:
    """Draw the missing class images. Raises UserError if the folder holds another set. A signal raises
    SystemExit; finished pictures stay, and the next start draws the others."""
    with stops.stoppable(advice="the next start draws the missing pictures") as watch:
        generate(options, watch)


def generate(options: ClassImageOptions, watch: Watch) -> None:
    """`main` without its handling of signals."""
    peers = processes.join(watch, threads=options.num_threads, peer_timeout=600)

    # base, prompt and settings
    folder = Path(options.class_data_dir)
    ownership.check_apart({"--class_data_dir": options.class_data_dir}, {}, options.base.sources())
    generation = class_images.continued(options.generation, class_images.made_with(folder))
    peers.on_main(lambda: families.find(options.base).folder)  # a base on the hub is downloaded once
    base = families.find(options.base)
    prompts.check(
        loading.load_tokenizers(base), {"--class_prompt": options.class_prompt}, families.max_tokens(base)
    )
    peers.say_notes(prompt_syntax.notes([options.class_prompt]))
    settings = class_images.make_settings(
        generation,
        options.class_prompt,
        options.seed,
        options.resolution or base.default_resolution,
        base,
        peers.accelerator.device,
    )

    # pictures
    peers.say_notes([*base.notes(), *class_images.notes(folder)])
    total = generation.num_class_images
    class_images.make(folder, settings, total, base, peers, watch, options.speed)
    peers.say(f"{folder} holds {total} class images")


if __name__ == "__main__":
    startup.run(main, OPTIONS)
