"""The processes of one run: exchanges between them, and the detection of lost processes."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs

from dreambooth.io import console
from dreambooth.io.errors import UserError, is_memory_error, reason_of, type_and_reason
from dreambooth.runtime import graphs, launcher
from dreambooth.runtime.stops import Stop, Watch

T = TypeVar("T")
_ROLL_CALL = datetime.timedelta(seconds=10)  # time to answer it
_FOR_EVER = datetime.timedelta(days=30)  # gloo has no "never"


def join(
    watch: Watch, *, peer_timeout: float, threads: int | None = None, accumulation: int = 1, **settings: Any
) -> "Peers":
    """Join the processes that the launcher started, and print notes on the launcher's settings.

    `peer_timeout` is the timeout of exchanges within a step, in seconds. `threads` is --num_threads and
    `accumulation` is --gradient_accumulation_steps; `settings` go to `Accelerator`.
    Raises UserError if the launcher's settings cannot be followed, or if accelerate joined fewer processes
    than were started: each would do all the work, in the same folder. Raises Stop if a process is lost or
    cannot be reached.
    """
    if threads:
        torch.set_num_threads(threads)
    launcher.check(settings.get("mixed_precision"))
    timeout = datetime.timedelta(seconds=peer_timeout)
    try:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)], **settings)
    except Exception as error:  # accelerate raises any exception for settings that it cannot follow
        if is_memory_error(error):
            raise
        if isinstance(error, RuntimeError) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise _not_joined(watch, error) from None
        raise UserError(
            f"accelerate cannot start with the launcher's settings ({type_and_reason(error)}); see "
            "`accelerate env` and the variables RANK, WORLD_SIZE, MASTER_* and ACCELERATE_*"
        ) from None
    # a recorded graph must hold every cast of a weight; autocast's cache would leave out those made before
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=not graphs.can_record(accelerator.device))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"the launcher started {started} processes and accelerate joined {accelerator.num_processes}; "
            "without a GPU set ACCELERATE_USE_CPU=true for torchrun"
        )
    try:
        peers = Peers(accelerator, watch, timeout)
    except RuntimeError as error:
        if is_memory_error(error):
            raise
        raise _not_joined(watch, error) from None
    peers.say_notes(launcher.notes(accumulation))
    return peers


def _not_joined(watch: Watch, error: RuntimeError) -> Stop:
    """The Stop after an error of torch while the processes join. The error of a process that was lost does
    not differ from that of an address which leads nowhere."""
    watch.check()  # a launcher signals the others when a process has died
    return Stop(
        f"the processes could not join ({type_and_reason(error)}): a process was lost, or the launcher's "
        "settings are wrong; see the output of process 0, and MASTER_ADDR and MASTER_PORT"
    )


class Peers:
    """The processes of the run, with the exchanges between this process and the others.

    `rank` is this process's number, and `world` is the number of processes. With one process, exchanges
    return at once. Exchanges raise Stop, with the number of the lost process, if a process died or hangs.
    """

    def __init__(self, accelerator: Accelerator, watch: Watch, timeout: datetime.timedelta):
        self.accelerator, self.watch = accelerator, watch
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.is_quiet = False
        """Whether notes and other lines are not printed."""
        # gloo even with GPUs. `group` waits without a timeout, since class images and validation may take
        # hours; a process that died is noticed all the same, because its connection closes. `step_group` has
        # the timeout of exchanges within a step.
        self.group = dist.new_group(backend="gloo", timeout=_FOR_EVER) if self.world > 1 else None
        self.step_group = dist.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None
        if not self.is_main:
            watch.deadline = None  # clocks differ: the main process decides when the time is up

    def say(self, text: str) -> None:
        """Print on the main process, above its progress bar."""
        if self.is_main and not self.is_quiet:
            console.say(text)

    def say_notes(self, notes: Iterable[str]) -> None:
        """Print each note on the main process."""
        if self.is_main and not self.is_quiet:
            console.notes(notes)

    def sync_stop(self, failure: Stop | None = None) -> None:
        """Raise the same Stop on every process if any of them must end, this one because of `failure`. Called
        within a step.

        A process that stopped alone would leave the others in an exchange that never ends. The exchange uses
        gloo also with GPUs, so that a process that died is noticed before the GPUs' own exchange begins.
        """
        pending = failure or self.watch.pending()
        if self.world == 1:
            if pending:
                raise pending
            return
        codes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        stops: list[Any] = [None] * self.world
        with self._lost_processes_named():
            dist.all_gather(codes, torch.tensor([pending.exit_code if pending else 0]), group=self.step_group)
            if any(codes):
                dist.all_gather_object(
                    stops,
                    pending and (pending.reason, pending.exit_code, pending.state),
                    group=self.step_group,
                )
        for stop in filter(None, stops):
            raise Stop(*stop)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process; the same on all of them. Called within a step."""
        if self.world == 1:
            return flag
        flags = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        with self._lost_processes_named():
            dist.all_gather(flags, torch.tensor([int(flag)]), group=self.step_group)
        return any(flags)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[world * n, ...] from each process's [n, ...], in the order of ranks."""
        with self._lost_processes_named():
            return self.accelerator.gather(tensor)  # type: ignore[return-value]

    def gather_slots(self, values: torch.Tensor) -> torch.Tensor:
        """[slots] from each process's [micro-steps]. Slot j is micro-step j // world of process j % world."""
        return self.gather(values[None]).transpose(0, 1).flatten()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; the backend chooses the order of the summands."""
        with self._lost_processes_named():
            return self.accelerator.reduce(tensor, "sum")  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait, without a timeout, until every process calls this."""
        if self.world > 1:
            with self._lost_processes_named():
                dist.barrier(group=self.group)

    def broadcast(self, value: T) -> T:
        """The main process's `value`, on every process."""
        if self.world == 1:
            return value
        values = [value]
        with self._lost_processes_named():
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on the main process; return its result, or raise its UserError, on every process."""
        result: T | None = None
        message: str | None = None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                message = str(error)
        result, message = self.broadcast((result, message))
        if message is not None:
            raise UserError(message)
        return result  # type: ignore[return-value]

    def check_same(self, values: Mapping[str, str]) -> None:
        """Raise UserError on every process if the values of one differ from the main process's. Nodes may
        have other photos, another base or another version. The keys of `values` name them in the message."""
        if self.world == 1:
            return
        of_rank: list[Any] = [None] * self.world
        with self._lost_processes_named():
            dist.all_gather_object(of_rank, dict(values), group=self.group)
        different = [
            f"process {rank} has other {name}"
            for rank, values_of_rank in enumerate(of_rank)
            for name in values
            if values_of_rank[name] != of_rank[0][name]
        ]
        if different:
            raise UserError(f"the processes of this run do not agree with process 0: {'; '.join(different)}")

    @contextlib.contextmanager
    def _lost_processes_named(self) -> Iterator[None]:
        """Turn the error of an exchange that failed into a Stop that names the lost processes."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or is_memory_error(error):
                raise
            raise self._lost(error) from None

    def _lost(self, error: RuntimeError) -> Stop:
        """The Stop after a failed exchange. It names the processes that do not answer a roll call.

        The roll call comes before the check for signals: as soon as one process has died, a launcher signals
        the others, which is not the reason of the failure.
        """
        if missing := self._roll_call():
            numbers = " and ".join(map(str, missing))
            return Stop(f"process {numbers} of {self.world} (counted from 0) died or hangs")
        self.watch.check()  # the main process may have ended at the signal that this process received too
        return Stop(f"the connection to the other processes failed ({reason_of(error)})")

    def _roll_call(self) -> list[int]:
        """On the main process, the ranks that do not answer; [] on the others. Each process sends one
        message, since a failed barrier does not name the lost process."""
        if not self.is_main:
            with contextlib.suppress(RuntimeError):  # the main process is lost
                _work(dist.isend(torch.ones(1), dst=0, group=self.group)).wait(_ROLL_CALL)
            return []
        missing, answers = [], []
        for rank in range(1, self.world):
            try:
                answers.append((rank, _work(dist.irecv(torch.zeros(1), src=rank, group=self.group))))
            except RuntimeError:  # the connection is closed
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
