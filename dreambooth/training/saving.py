"""What a run leaves behind: checkpoints along the way, the adapter at the end, and the last completed step when something ends it early."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dreambooth.adapter_files import native
from dreambooth.adapters import inject
from dreambooth.files import atomic, checkpoint_folders
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.runtime import environment
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Stop
from dreambooth.training import checkpoints, optimizers, run_folder


class Saver:
    """Writes adapter and optimizer to the output folder, on the main process."""

    def __init__(
        self,
        options: ResolvedTrainOptions,
        peers: Peers,
        components: Sequence[inject.Component],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        identity: dict[str, Any],
    ):
        self.options, self.peers, self.optimizer, self.scaler, self.identity = (
            options,
            peers,
            optimizer,
            scaler,
            identity,
        )
        self.accelerator, self.output_dir = peers.accelerator, Path(options.run.output_dir)
        self.components = list(components)
        self.names = {id(p): name for component in components for name, p in component.named_parameters()}
        # those that are trained no more: what is left of them
        self.finished: dict[str, dict[str, torch.Tensor]] = {}
        self.configs = {component.name: inject.metadata(component) for component in components}
        self.finished_raw: dict[str, torch.Tensor] = {}
        self.saved = 0  # the step of the newest checkpoint
        self.held: tuple[bytes, dict[str, torch.Tensor], dict[str, object]] | None = None

    def finish(self, component: inject.Component) -> None:
        """Keep the tensors of a component that is trained no more and whose model will go."""
        self.finished[component.name] = {
            key: tensor.detach().to("cpu", copy=True) for key, tensor in component.state_dict().items()
        }
        if component.is_scaled:
            self.finished_raw |= checkpoints.raw_parameters(component.named_parameters())
        self.components.remove(component)

    def pack(self, step: int) -> bytes:
        """The adapter file after `step` steps."""
        o = self.options
        name = o.base.pretrained_model_name_or_path
        info = {
            "base_model": Path(name).name
            if Path(name).exists()
            else name,  # a folder's own name: where it lies is nobody's business
            "base_fingerprint": self.identity.get("base"),
            "versions": environment.versions(run_folder.LIBRARIES),
            "steps": step,
            "seed": o.run.seed,
            "resolution": o.instance.resolution,
            "clip_skip": o.text.clip_skip or 0,
            "instance_prompt": o.instance.instance_prompt,
            "class_prompt": o.prior.class_prompt if o.prior.with_prior_preservation else None,
        }
        with optimizers.evaluated(self.optimizer):
            state = {component.name: component.state_dict() for component in self.components}
            return native.pack(state | self.finished, self.configs, info)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's, and the parameters where the adapter file has others than are trained."""
        tensors = optimizers.state_tensors(self.optimizer, self.names) | self.finished_raw
        for component in self.components:
            if component.is_scaled or optimizers.needs_raw_parameters(self.optimizer):
                tensors |= checkpoints.raw_parameters(component.named_parameters())
        return tensors

    def _content(self, step: int) -> tuple[bytes, dict[str, torch.Tensor], dict[str, object]]:
        """(adapter file, tensors, state) of checkpoint-<step>."""
        around = run_folder.environment_of(
            self.options.run, self.accelerator.device, is_compiled=self.options.speed.compile
        )
        state: dict[str, object] = {"seed": self.options.run.seed, "surroundings": around}
        # a checkpoint of the very step at which they stop may be from before or after
        state["trains_text"] = any(
            group["name"].startswith("text_encoder") for group in self.optimizer.param_groups
        )
        state["optimizer"] = optimizers.state_numbers(self.optimizer, self.names)
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        return self.pack(step), self._tensors(), state

    def hold(self, step: int) -> None:
        """Take down what there is to save: the adapter is about to be taken off its models."""
        self.held = self._content(step)

    def _publish(self, step: int) -> None:
        """Write checkpoint-<step>; for the main process alone."""
        adapter, tensors, state = self.held or self._content(step)
        limit = self.options.run.checkpoints_total_limit
        try:
            folder = checkpoints.save(
                self.output_dir, step, adapter, tensors, state, limit=limit, identity=self.identity
            )
        except checkpoint_folders.PruneFailed as error:
            self.peers.say(f"warning: {error}")
            folder = self.output_dir / f"checkpoint-{step}"
        self.saved = step
        if note := checkpoint_folders.room_note(self.output_dir, checkpoint_folders.size(folder)):
            self.peers.say(f"warning: {note}")

    def checkpoint(self, step: int) -> None:
        """A checkpoint that cannot be written (a full disk) is said, and tried again at the next interval: the run goes on."""
        if self.peers.is_main:
            try:
                self._publish(step)
            except checkpoint_folders.SaveFailed as error:
                self.peers.say(f"warning: {error}")
        self.peers.barrier()

    @property
    def adapter(self) -> Path:
        return self.output_dir / native.ADAPTER_NAME

    def _write_adapter(self, step: int) -> None:
        atomic.write(self.adapter, self.held[0] if self.held else self.pack(step))

    def final(self, step: int) -> None:
        """The finished adapter. Raises Stop if it cannot be written."""
        if self.peers.is_main:
            try:
                self._write_adapter(step)
            except OSError as error:
                raise Stop(f"{self.adapter} cannot be written: {error.strerror or error}") from None
            self.peers.say(f"wrote {self.adapter} ({self.adapter.stat().st_size / 2**20:.2f} MiB)")
        self.peers.barrier()

    def what_is_done(self, step: int, last_step: int) -> None:
        """Checkpoint and adapter of the last completed step, written without the other processes: they may be gone."""
        if not self.peers.is_main or step == 0:
            return
        for what, is_needed, write in (
            ("checkpoint", step > self.saved, self._publish),
            ("adapter", True, self._write_adapter),
        ):
            try:
                if is_needed:
                    write(step)
                self.peers.say(f"saved step {step} of {last_step}: {what}")
            except (
                OSError,
                ValueError,
                checkpoint_folders.SaveFailed,
            ) as trouble:  # ValueError: an adapter that is not finite
                self.peers.say(f"warning: step {step} could not be saved as {what}: {trouble}")


@contextlib.contextmanager
def in_eval_mode(components: Sequence[inject.Component], optimizer: torch.optim.Optimizer):
    """Within the block the models draw as the adapter's user will see them: no dropout, and the values that the adapter file gets."""
    for component in components:
        component.model.eval()
    with optimizers.evaluated(optimizer):
        yield
    for component in components:
        component.model.train()
