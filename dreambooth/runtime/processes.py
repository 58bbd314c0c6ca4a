"""The processes of one run: what they must agree on, and what they do when one of them is lost."""

import contextlib
import datetime
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm

from dreambooth.errors import UserError, reason_of
from dreambooth.runtime.stops import Stop, Watch

T = TypeVar("T")
_ROLL_CALL = datetime.timedelta(seconds=10)
_FOR_EVER = datetime.timedelta(days=30)


def adopt_local_rank(local_rank: int) -> None:
    """Set LOCAL_RANK, which accelerate reads, where an old launcher passed only --local_rank; -1 is none."""
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


def join(watch: Watch, *, peer_timeout: float, **settings: Any) -> "Peers":
    """Join the processes that the launcher started. `peer_timeout`, in seconds, is for exchanges within a step.

    Raises UserError if the launcher started more processes than could be joined: each would do the whole work, into the same folder.
    """
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=peer_timeout))
    accelerator = Accelerator(kwargs_handlers=[timeout], **settings)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"the launcher started {started} processes and accelerate joined {accelerator.num_processes}; "
            "without a GPU set ACCELERATE_USE_CPU=true for torchrun"
        )
    return Peers(accelerator, watch, datetime.timedelta(seconds=peer_timeout))


def notes() -> list[str]:
    """What is odd about how the process was launched."""
    # `accelerate launch --cpu --num_processes 2` sets an address to meet at, and then starts one process without a word
    if (
        "ACCELERATE_DYNAMO_BACKEND" in os.environ
        and "MASTER_PORT" in os.environ
        and "WORLD_SIZE" not in os.environ
    ):
        asked = re.search(r"--num_processes[= ](\d+)", _command_line(os.getppid()))
        return [
            f"accelerate launch was asked for {asked[1] if asked else 'several'} processes and started 1: on CPUs it starts several only as "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N` (configs/accelerate/cpu_processes.yaml)"
        ]
    return []


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # no /proc on this system
        return ""


class Peers:
    """All processes of the run, seen from this one."""

    def __init__(self, accelerator: Accelerator, watch: Watch, timeout: datetime.timedelta):
        self.accelerator, self.watch = accelerator, watch
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        # Over gloo whatever the GPUs speak, and patient: class images and validation take as long as they take. A process that died is
        # noticed all the same, by its closed connection.
        self.group = dist.new_group(backend="gloo", timeout=_FOR_EVER) if self.world > 1 else None
        self.step_group = dist.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None
        if not self.is_main:
            watch.deadline = None  # clocks differ: one of them decides

    def say(self, text: str) -> None:
        """Print on the main process, without tearing its progress bar."""
        if self.is_main:
            tqdm.write(text)

    def sync_stop(self) -> None:
        """Within a step: raise Stop, the same on every process, if any of them is to stop. On its own one would leave the others in an exchange
        that never ends. Over gloo also beside GPUs, so that a process that died is noticed before theirs is entered."""
        pending = self.watch.pending()
        if self.world == 1:
            if pending:
                raise pending
            return
        codes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        reasons: list[Any] = [None] * self.world
        try:
            dist.all_gather(codes, torch.tensor([pending.exit_code if pending else 0]), group=self.step_group)
            if any(codes):
                dist.all_gather_object(
                    reasons,
                    pending and (pending.reason, pending.exit_code, pending.state),
                    group=self.step_group,
                )
        except RuntimeError as error:
            raise self._lost(error) from None
        for reason in filter(None, reasons):
            raise Stop(*reason)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[processes * n, ...] from every process's [n, ...], in their order. Raises Stop, naming it, if a process is lost or hangs."""
        try:
            return self.accelerator.gather(tensor)  # type: ignore[return-value]
        except RuntimeError as error:
            raise self._lost(error) from None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in an order of the backend's own choice. Raises Stop as `gather` does."""
        try:
            return self.accelerator.reduce(tensor, "sum")  # type: ignore[return-value]
        except RuntimeError as error:
            raise self._lost(error) from None

    def barrier(self) -> None:
        """Return when every process is here, however long that takes. Raises Stop, naming it, if one is lost."""
        if self.world > 1:
            try:
                dist.barrier(group=self.group)
            except RuntimeError as error:
                raise self._lost(error) from None

    def broadcast(self, value: T) -> T:
        """The main process's `value`, on every process."""
        if self.world == 1:
            return value
        box = [value]
        try:
            dist.broadcast_object_list(box, src=0, group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from None
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work`, done by the main process, gives, on every process; its UserError is raised on every process too."""
        result: T | None = None
        trouble: str | None = None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                trouble = str(error)
        result, trouble = self.broadcast((result, trouble))
        if trouble is not None:
            raise UserError(trouble)
        return result  # type: ignore[return-value]

    def check_same(self, what: Mapping[str, str]) -> None:
        """Raise UserError, on every process, if one sees other options, photos or weights than the first: nodes may differ."""
        if self.world == 1:
            return
        everyone: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(everyone, dict(what), group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from None
        different = [
            f"process {rank} has other {name}"
            for rank, other in enumerate(everyone)
            for name in what
            if other[name] != everyone[0][name]
        ]
        if different:
            raise UserError(f"the processes of this run do not agree with process 0: {'; '.join(different)}")

    def _lost(self, error: RuntimeError) -> Stop:
        """What to raise after a failed exchange: every process still alive answers the main one's roll call, and those that do not are named."""
        if self.world == 1:
            raise error
        self.watch.check()  # who was asked to stop may find the others gone already
        missing = self._roll_call()
        self.watch.check()
        if missing:
            return Stop(
                f"process {' and '.join(map(str, missing))} of {self.world} (counted from 0) died or hangs"
            )
        reason = reason_of(error)
        return Stop(f"the connection to the other processes failed ({reason})")

    def _roll_call(self) -> list[int]:
        """On the main process the numbers of those that do not answer; one message each, since a barrier would fail as a whole."""
        if not self.is_main:
            with contextlib.suppress(RuntimeError):  # the main process is the one that is lost
                _work(dist.isend(torch.ones(1), dst=0, group=self.group)).wait(_ROLL_CALL)
            return []
        missing, answers = [], []
        for rank in range(1, self.world):
            try:
                answers.append((rank, _work(dist.irecv(torch.zeros(1), src=rank, group=self.group))))
            except RuntimeError:  # its connection is closed
                missing.append(rank)
        end = time.monotonic() + _ROLL_CALL.total_seconds()
        for rank, answer in answers:
            try:
                answer.wait(datetime.timedelta(seconds=max(0.1, end - time.monotonic())))
            except RuntimeError:
                missing.append(rank)
        return sorted(missing)


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None  # None is for processes outside the group
    return work
