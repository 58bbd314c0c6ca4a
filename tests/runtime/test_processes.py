"""What processes of one run do together: two of them, forked, over the real backend."""

import os
import signal
import time
from typing import Any

import pytest
import torch

from dreambooth.io.errors import UserError
from dreambooth.runtime import processes
from dreambooth.runtime.stops import Stop
from tests.running import together


def test_gathered_rows_come_in_the_order_of_the_processes():
    assert together(lambda peers: peers.gather(torch.tensor([[peers.rank + 1.0]])).flatten().tolist()) == [
        [1, 2],
        [1, 2],
    ]


def test_sums_are_over_all_processes():
    assert together(lambda peers: peers.sum(torch.tensor([peers.rank + 1.0])).tolist()) == [[3], [3]]


def test_the_main_process_decides_for_all():
    assert together(lambda peers: peers.broadcast(f"of {peers.rank}")) == ["of 0", "of 0"]
    assert together(lambda peers: peers.on_main(lambda: f"of {peers.rank}")) == ["of 0", "of 0"]


def test_what_the_main_process_refuses_is_refused_on_all():
    def refuse() -> None:
        raise UserError("no such folder")

    assert together(lambda peers: peers.on_main(refuse)) == ["UserError: no such folder"] * 2


def test_a_stop_of_one_is_a_stop_of_all_with_its_reason():
    """Signals reach processes at different moments; one that stopped alone would leave the others waiting."""

    def work(peers: processes.Peers) -> Any:
        if peers.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            peers.sync_stop()
        except Stop as stop:
            return [stop.reason, stop.exit_code, stop.state]

    assert together(work) == [["stopped by SIGTERM", 143, "stopped"]] * 2


def test_one_clock_decides_when_the_time_is_up():
    def work(peers: processes.Peers) -> Any:
        return peers.watch.deadline is None

    def join_with_limit(peers: processes.Peers) -> Any:
        peers.watch.deadline = time.monotonic() + (100 if peers.rank == 0 else -1)
        again = processes.Peers(peers.accelerator, peers.watch, processes.datetime.timedelta(seconds=4))
        return again.sync_stop()

    assert together(work) == [True, True]
    assert together(join_with_limit) == [None, None]


def test_processes_that_see_other_data_are_refused_by_number():
    """Nodes may have other photos, another base, another version of the program."""
    found = together(lambda peers: peers.check_same({"photos": f"those of {peers.rank}", "base": "one"}))
    assert (
        found
        == ["UserError: the processes of this run do not agree with process 0: process 1 has other photos"]
        * 2
    )
    assert together(lambda peers: peers.check_same({"photos": "the same"})) == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["sync_stop", "gather", "sum", "barrier", "check_same"])
@pytest.mark.parametrize("is_stopped", [False, True], ids=["alone", "stopped by its launcher"])
def test_a_process_that_died_is_named_by_every_exchange(exchange, is_stopped):
    """Also if the launcher, which stops the others when one has died, is faster than the exchange."""

    def work(peers: processes.Peers) -> Any:
        if peers.rank == 1:
            os._exit(1)
        if is_stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        arguments: dict[str, list[Any]] = {
            "gather": [torch.ones(1)],
            "sum": [torch.ones(1)],
            "barrier": [],
            "sync_stop": [],
            "check_same": [{"a": "b"}],
        }
        return getattr(peers, exchange)(*arguments[exchange])

    assert together(work)[0] == "Stop: process 1 of 2 (counted from 0) died or hangs"


@pytest.mark.slow
def test_a_process_whose_main_process_has_ended_at_a_signal_ends_at_its_own():
    """While pictures are drawn, the main process alone checks for signals; the others wait."""

    def work(peers: processes.Peers) -> Any:
        if peers.rank == 0:
            os._exit(143)
        os.kill(os.getpid(), signal.SIGTERM)
        return peers.barrier()

    assert together(work)[1] == "Stop: stopped by SIGTERM"


@pytest.mark.parametrize(
    ("module", "name"),
    [(torch.distributed.distributed_c10d, "ProcessGroupGloo"), (processes.dist, "new_group")],
    ids=["in accelerate", "after accelerate"],
)
def test_a_process_that_is_lost_while_the_processes_join_ends_the_others_with_one_line(
    module, name, monkeypatch
):
    join = processes.join

    def lose_the_first(*arguments: Any, **settings: Any) -> processes.Peers:
        if os.environ["RANK"] == "0":
            monkeypatch.setattr(module, name, lambda *_, **__: os._exit(1))
        return join(*arguments, **settings)

    monkeypatch.setattr(processes, "join", lose_the_first)
    assert together(lambda peers: None)[1].startswith("Stop: the processes could not join (")


@pytest.mark.parametrize("exchange", ["gather", "sum"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_memory_that_runs_out_in_an_exchange_is_no_lost_process(exchange, error, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    def work(peers: processes.Peers) -> str:
        for name in ("gather", "reduce"):
            monkeypatch.setattr(peers.accelerator, name, fail)
        with pytest.raises(type(error)) as caught:
            getattr(peers, exchange)(torch.ones(1))
        return str(caught.value)

    assert together(work) == [str(error)] * 2


@pytest.mark.slow
def test_a_process_that_hangs_is_named(monkeypatch):
    monkeypatch.setattr(processes, "_ROLL_CALL", processes.datetime.timedelta(seconds=2))

    def work(peers: processes.Peers) -> Any:
        if peers.rank == 1:
            time.sleep(9)
            os._exit(0)
        return peers.gather(torch.ones(1)).tolist()

    assert together(work)[0] == "Stop: process 1 of 2 (counted from 0) died or hangs"


def test_of_three_processes_the_one_that_is_lost_is_named():
    def work(peers: processes.Peers) -> Any:
        if peers.rank == 2:
            os._exit(1)
        return peers.gather(torch.ones(1)).tolist()

    assert together(work, 3)[0] == "Stop: process 2 of 3 (counted from 0) died or hangs"
