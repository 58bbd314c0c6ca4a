"""Draw pictures with an adapter, or without: prompts x seeds -> PNG files with their settings inside, and a contact sheet."""

from dreambooth.options import InferOptions, fail, parse

if __name__ == "__main__":
    OPTIONS = parse(InferOptions, __doc__)  # before the imports below: --help and mistakes are answered at once

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dreambooth import adapter_files, families, pipelines, processes
from dreambooth.errors import UserError

ADAPTER_NAME = "subject"


def read_prompts(options: InferOptions) -> list[str]:
    if not options.prompts_file:
        return list(options.prompt)
    try:
        lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file {options.prompts_file}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--prompts_file {options.prompts_file}: no prompt in it")
    return prompts


def load_adapter(pipeline: Any, path: Path) -> None:
    """Put an adapter on the pipeline. Raises UserError unless every tensor of the file has its place: diffusers would skip it in silence."""
    state, _ = adapter_files.read(path)
    adapter_files.check_fits(path, state, {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=ADAPTER_NAME)


def main(options: InferOptions) -> None:
    """Draw and save every picture, `images.json` and `contact_sheet.png`."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not work on a CPU; use bf16, or leave it out")
    prompts = read_prompts(options)
    output_dir = Path(options.output_dir)
    adapter = adapter_files.find(options.adapter) if options.adapter else None
    base_folder = families.local_folder(options.base)
    tokenizer = families.load_tokenizer(options.base, base_folder)
    limit = families.max_tokens(base_folder)
    families.check_prompts(tokenizer, {f"the prompt {p!r}": p for p in prompts} | {"--negative_prompt": options.negative_prompt}, limit)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]
    processes.make_folder(output_dir, "--output_dir")
    pipeline = families.load_pipeline(options.base, base_folder, dtype, device)
    if adapter:
        load_adapter(pipeline, adapter)

    jobs = [(prompt, seed) for prompt in prompts for seed in options.seeds]
    kinds = [False, True] if options.compare else [adapter is not None]
    pictures: dict[tuple[str, int, bool], Image.Image] = {}
    records: list[dict[str, Any]] = []
    with tqdm(total=len(jobs) * len(kinds), desc="pictures", unit="image") as bar:
        for with_adapter in kinds:
            if adapter:
                (pipeline.enable_lora if with_adapter else pipeline.disable_lora)()
            for start in range(0, len(jobs), options.batch_size):
                batch = jobs[start : start + options.batch_size]
                images = pipelines.draw(
                    pipeline,
                    [prompt for prompt, _ in batch],
                    [seed for _, seed in batch],
                    num_inference_steps=options.num_inference_steps,
                    guidance_scale=options.guidance_scale,
                    negative_prompt=options.negative_prompt,
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
