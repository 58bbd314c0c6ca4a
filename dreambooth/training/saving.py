"""Saving a run: checkpoints along the way, the adapter at the end, the last step of a run that ends early."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dreambooth.adapter_files import layer_names, native, reading, run_info, writing
from dreambooth.adapters import inject
from dreambooth.bases import families
from dreambooth.files import checkpoint_folders
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console
from dreambooth.options.rules import sides_of
from dreambooth.runtime import environment
from dreambooth.training import checkpoints, optimizers, run_identity
from dreambooth.training.start import Start
from dreambooth.training.trainables import Trainables


def adapter_info(flags: Mapping[str, Any], base_name: str, base_fingerprint: str | None) -> dict[str, Any]:
    """The record of a run in the metadata of its adapter file, without the number of steps. `flags` are all
    flags of the run."""
    return {
        "base_model": base_name,
        "base_fingerprint": base_fingerprint,
        "versions": environment.versions(run_identity.LIBRARIES),
        "seed": flags["seed"],
        "resolution": sides_of(flags["resolution"])[0],
        "clip_skip": flags.get("clip_skip", 0),
        "instance_prompt": flags["instance_prompt"],
        "class_prompt": flags["class_prompt"] if flags["with_prior_preservation"] else None,
    }


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """The content of one checkpoint."""

    adapter: bytes
    tensors: dict[str, torch.Tensor]
    state: dict[str, object]


class Saver:
    """Writes adapter and checkpoints to the output folder, on the main process. The manifest of each
    checkpoint has the run's identity, and its state has the run's environment."""

    def __init__(self, start: Start, trainables: Trainables):
        self.run, self.peers, self.output_dir = start.options.run, start.peers, start.output_dir
        self.info = adapter_info(start.named_flags, start.base.options.name(), start.identity["base"])
        self.identity, self.environment = start.identity, start.environment
        self.optimizer, self.scaler = trainables.optimizer, trainables.scaler
        self.components = list(trainables.components)
        named = [pair for component in self.components for pair in component.named_parameters()]
        self.names = {id(parameter): name for name, parameter in named}
        self.configs = {component.name: inject.metadata(component) for component in self.components}
        # tensors of components whose training has ended
        self.finished: dict[str, dict[str, torch.Tensor]] = {}  # of the adapter file, by component
        self.finished_raw: dict[str, torch.Tensor] = {}  # `checkpoints.raw_parameters`
        self.status = start.status
        self.saved = 0  # the step of the newest checkpoint
        self.snapshot: _Snapshot | None = None

    @property
    def adapter(self) -> Path:
        return self.output_dir / native.ADAPTER_NAME

    def keep(self, component: inject.Component) -> None:
        """Copy the tensors of a component whose training has ended. Its model may then be freed."""
        self.finished[component.name] = {
            key: tensor.detach().to("cpu", copy=True) for key, tensor in component.state_dict().items()
        }
        if component.is_scaled:
            self.finished_raw |= checkpoints.raw_parameters(component.named_parameters())
        self.components.remove(component)

    def pack(self, step: int) -> bytes:
        """The adapter file after `step` steps. Raises ValueError if a value is not finite."""
        with optimizers.evaluated(self.optimizer):
            state = {component.name: component.state_dict() for component in self.components}
            return native.pack(state | self.finished, self.configs, {**self.info, "steps": step})

    def digest(self, step: int) -> str:
        """SHA-256 of the adapter file after `step` steps."""
        return hashlib.sha256(self.pack(step)).hexdigest()

    def take_snapshot(self, step: int) -> None:
        """Copy the content of a checkpoint of `step`. Later saves write this copy. Called at the end of a
        run, before the adapter is removed from its models."""
        self.snapshot = self._snapshot_of(step)

    def _snapshot_of(self, step: int) -> _Snapshot:
        """The content of a checkpoint of `step`. Raises ValueError if a value is not finite."""
        state: dict[str, object] = {"seed": self.run.seed, "surroundings": self.environment}
        # from the optimizer, since the step leaves it open: after the last step that trains the text encoder,
        # a checkpoint may be written before its training has ended
        state["trains_text"] = any(
            group["name"].startswith("text_encoder") for group in self.optimizer.param_groups
        )
        state["optimizer"] = optimizers.state_numbers(self.optimizer, self.names)
        if self.status.passes:
            state["passes"] = self.status.passes
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        return _Snapshot(self.pack(step), self._tensors(), state)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors, and parameters whose trained values differ from the adapter file's."""
        tensors = optimizers.state_tensors(self.optimizer, self.names) | self.finished_raw
        for component in self.components:
            if component.is_scaled or optimizers.needs_raw_parameters(self.optimizer):
                tensors |= checkpoints.raw_parameters(component.named_parameters())
        return tensors

    def save_checkpoint(self, step: int) -> None:
        """Write checkpoint-<step>. A failure, such as a full disk, is printed as a warning."""
        if self.peers.is_main:
            try:
                self._write_checkpoint(step)
            except checkpoint_folders.SaveFailed as error:
                self.peers.say(f"warning: {error}")
        self.peers.barrier()

    def save_adapter(self, step: int) -> None:
        """Write the finished adapter. Raises OSError if it cannot be written."""
        if self.peers.is_main:
            self._write_adapter(step)
            mebibytes = self.adapter.stat().st_size / 2**20
            self.peers.say(f"wrote {self.adapter} ({mebibytes:.2f} MiB)")
        self.peers.barrier()

    def save_early_end(self, step: int, last_step: int) -> None:
        """Write checkpoint and adapter of `step`, the last completed step. A failure is printed as a warning.
        There is no barrier, since the other processes may be dead."""
        if not self.peers.is_main or step == 0:
            return
        for name, write in (("checkpoint", self._write_newer_checkpoint), ("adapter", self._write_adapter)):
            try:
                write(step)
                message = f"saved step {step} of {last_step}: {name}"
            except (OSError, ValueError, checkpoint_folders.SaveFailed) as error:  # ValueError: not finite
                message = f"warning: step {step} could not be saved as {name}: {error}"
            self.peers.say(message)

    def _write_adapter(self, step: int) -> None:
        """Write the adapter file. Raises OSError, or ValueError if a value is not finite."""
        data = self.snapshot.adapter if self.snapshot else self.pack(step)
        WrittenFiles(self.output_dir).write(native.ADAPTER_NAME, data)

    def _write_newer_checkpoint(self, step: int) -> None:
        if step > self.saved:
            self._write_checkpoint(step)

    def _write_checkpoint(self, step: int) -> None:
        """Write a checkpoint. Raises SaveFailed, or ValueError if a value is not finite."""
        content = self.snapshot or self._snapshot_of(step)
        try:
            folder = checkpoints.save(
                self.output_dir,
                step,
                content.adapter,
                content.tensors,
                content.state,
                limit=self.run.checkpoints_total_limit,
                identity=self.identity,
            )
        except checkpoint_folders.PruneFailed as error:
            self.peers.say(f"warning: {error}")
            folder = self.output_dir / f"checkpoint-{step}"
        self.saved = step
        if note := checkpoint_folders.room_note(folder):
            self.peers.say(f"warning: {note}")


def write_kohya(adapter: Path, base: families.Base) -> None:
    """Write the finished adapter in kohya's format beside it, as `convert_adapter.py convert` does. Raises
    OSError if it cannot be written."""
    assert base.kohya_family is not None  # checked with the flags
    layers = base.layers()
    content, depth = reading.read_additive(adapter, layers), layer_names.depth_of(layers["unet"])
    info = run_info.of(content.metadata) | {"prediction_type": base.prediction_type}
    data = writing.write_kohya(content, base.kohya_family, info, depth=depth)
    path = adapter.with_name(native.KOHYA_NAME)
    WrittenFiles(path.parent).write(path.name, data)
    console.say(f"wrote {path}")
    console.notes(writing.kohya_notes(content))
