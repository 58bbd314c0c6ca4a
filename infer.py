"""Draw pictures with an adapter, or without: prompts x seeds -> PNG files with their settings inside, and a contact sheet."""

from dreambooth import stops
from dreambooth.command_line import fail, parse
from dreambooth.picture_options import InferOptions

if __name__ == "__main__":
    OPTIONS = parse(InferOptions, __doc__)  # before the imports below: --help and mistakes are answered at once
    stops.until_imports_are_done()

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dreambooth import adapter_files, families, locks, pipelines, processes, prompts
from dreambooth.errors import UserError
from dreambooth.options import TextEncoding
from dreambooth.printable import shown
from dreambooth.prompts import TextParts


def read_prompts(options: InferOptions) -> list[str]:
    if not options.prompts_file:
        return list(options.prompt)
    try:
        lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--prompts_file {shown(options.prompts_file)}: {reason}") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--prompts_file {options.prompts_file}: no prompt in it")
    return prompts


def main(options: InferOptions) -> None:
    """Draw and save every picture, `images.json` and `contact_sheet.png`."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not work on a CPU; use bf16, or leave it out")
    words = read_prompts(options)
    output_dir = Path(options.output_dir)
    adapter = adapter_files.find(options.adapter) if options.adapter else None
    state, metadata = adapter_files.read(adapter) if adapter else ({}, {})
    base = families.find(options.base)
    if adapter:
        fields = adapter_files.lora_fields(adapter, state, metadata)
        adapter_files.check_shapes(adapter, state, base.layers(), fields)
    asked = {f"the prompt {p!r}": p for p in words} | {"--negative_prompt": options.negative_prompt}
    prompts.check(families.load_tokenizers(base), asked, families.max_tokens(base))
    clip_skip = _clip_skip(options, base, metadata)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]
    processes.make_folder(output_dir, "--output_dir")
    with locks.hold(output_dir, "--output_dir") as notes:
        for note in notes:
            print(f"note: {note}")
        pipeline = families.load_pipeline(base, dtype, device)
        if adapter:
            pipelines.put_on(pipeline, state, fields)
        draw_all(options, pipeline, families.text_of(pipeline, base, clip_skip=clip_skip), words, adapter)


def _clip_skip(options: InferOptions, base: families.Base, metadata: dict[str, str]) -> int:
    """Layers of the text encoder to leave out: those given, else those that the adapter was trained without."""
    recorded = adapter_files.recorded(metadata).get("clip_skip", 0)
    clip_skip = options.clip_skip if options.clip_skip is not None else recorded if type(recorded) is int and recorded >= 0 else 0
    families.check_text(base, TextEncoding(clip_skip=clip_skip))
    return clip_skip


def draw_all(options: InferOptions, pipeline: Any, text: TextParts, prompts: list[str], adapter: Path | None) -> None:
    """Draw and save every picture, their list and the contact sheet. `adapter` is the file of the one on the pipeline."""
    output_dir = Path(options.output_dir)
    jobs = [(prompt, seed) for prompt in prompts for seed in options.seeds]
    kinds = [False, True] if options.compare else [adapter is not None]
    pictures: dict[tuple[str, int, bool], Image.Image] = {}
    records: list[dict[str, Any]] = []
    with tqdm(total=len(jobs) * len(kinds), desc="pictures", unit="image") as bar:
        for with_adapter in kinds:
            if adapter:
                (pipeline.enable_lora if with_adapter else pipeline.disable_lora)()
            with torch.no_grad():
                book = text.book([*prompts, options.negative_prompt])
            for start in range(0, len(jobs), options.batch_size):
                batch = jobs[start : start + options.batch_size]
                images = pipelines.draw(
                    pipeline,
                    book.of([prompt for prompt, _ in batch]),
                    book.of([options.negative_prompt]),
                    [seed for _, seed in batch],
                    num_inference_steps=options.num_inference_steps,
                    guidance_scale=options.guidance_scale,
                    side=options.resolution,
                )
                for (prompt, seed), image in zip(batch, images, strict=True):
                    pictures[prompt, seed, with_adapter] = image
                    name = f"{len(records):05d}_{seed}{'_base' if adapter and not with_adapter else ''}.png"
                    settings = {
                        "prompt": prompt,
                        "seed": seed,
                        "negative_prompt": options.negative_prompt,
                        "steps": options.num_inference_steps,
                        "guidance_scale": options.guidance_scale,
                        "clip_skip": text.clip_skip,
                        "base": options.base.pretrained_model_name_or_path,
                        "adapter": f"{adapter.parent.name}/{adapter.name}" if adapter and with_adapter else None,
                    }
                    pipelines.save_png(image, output_dir / name, settings)
                    records.append({"file": name, **settings})
                bar.update(len(batch))
    (output_dir / "images.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [(prompt, [pictures[prompt, seed, k] for seed in options.seeds for k in kinds]) for prompt in prompts]
    columns = [f"seed {seed}" + (" adapter" if k else " base") * options.compare for seed in options.seeds for k in kinds]
    pipelines.contact_sheet(rows, columns).save(output_dir / "contact_sheet.png")
    print(f"wrote {len(records)} pictures and contact_sheet.png to {output_dir}")


if __name__ == "__main__":
    try:
        main(OPTIONS)
    except UserError as error:
        fail(error)
