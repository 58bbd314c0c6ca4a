"""The flags of what a run shows and sends: validation pictures, logs, uploads. Imports no torch."""

import dataclasses
from typing import Annotated, Literal

from dreambooth.options.paths import FilePath, PathInOutput
from dreambooth.options.rules import Count, Group, Name, Range, require, require_package


@dataclasses.dataclass
class ValidationOptions(Group):
    """Validation pictures."""

    validation_prompt: str | None = None
    """Prompt of the validation pictures. Without it and --validation_prompts_file none are drawn."""
    validation_prompts_file: FilePath | None = None
    """Text file with a prompt on each line, for validation pictures of several prompts. Empty lines and lines
    that start with # are skipped. With --validation_prompt too, that prompt is the first."""
    num_validation_images: Annotated[int, Range(1, 10_000)] = 4
    """Number of pictures of each prompt at each validation. A picture has the same noise at every step."""
    validation_epochs: Count = 50
    """Passes (as in --num_train_epochs) between validations. The first validation is before the first step,
    the second after the first pass."""
    validation_steps: Count | None = None
    """Steps between validations; overrides --validation_epochs. The first validation is before the first
    step."""
    validation_scheduler: Literal["DPMSolverMultistepScheduler", "DDPMScheduler"] | None = None
    """Sampler of the validation pictures. Default: the multistep DPM solver; DDPM for DeepFloyd IF; the
    base's sampler if that is an EDM scheduler."""
    skip_final_inference: bool = False
    """Draw no pictures at the end of the run: those of the finished adapter, and three of the first prompt
    with other weights of the adapter."""
    validation_images: tuple[str, ...] | None = None
    """First-stage pictures for validating a second-stage model. Refused: no supported base is a second
    stage."""
    class_labels_conditioning: str | None = None
    """`timesteps` for second-stage models. Refused: no supported base is a second stage."""

    @property
    def has_prompts(self) -> bool:
        """Whether validation pictures are drawn."""
        return self.validation_prompt is not None or self.validation_prompts_file is not None

    def _check(self) -> None:
        require(
            self.validation_prompt is None or self.validation_prompt.strip() != "",
            "--validation_prompt must not be empty",
        )
        rule = "is for second-stage (super-resolution) bases, which this version does not train: leave it out"
        require(self.validation_images is None, f"--validation_images {rule}")
        require(self.class_labels_conditioning is None, f"--class_labels_conditioning {rule}")


@dataclasses.dataclass
class ReportOptions(Group):
    """Logs and uploads. metrics.jsonl and report.html are always written."""

    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = "tensorboard"
    """Tracker. The default, tensorboard, is skipped with a note if it is not installed."""
    logging_dir: PathInOutput = "logs"
    """Folder of the tracker's logs, inside the output folder."""
    push_to_hub: bool = False
    """Upload adapter, model card and pictures to the hub when the run is finished."""
    hub_token: str | None = None
    """Token for --push_to_hub; it is never written to a file. Default: the token of `hf auth login`."""
    hub_model_id: Name | None = None
    """Repository for --push_to_hub. Default: the name of the output folder."""
    hub_private_repo: bool = False
    """Create the repository as a private one."""

    def _check(self) -> None:
        for tracker, extra in (("wandb", "wandb"), ("comet_ml", "comet")):
            require_package(
                self.report_to == tracker, f"--report_to {tracker}", tracker, f"pip install '.[{extra}]'"
            )
