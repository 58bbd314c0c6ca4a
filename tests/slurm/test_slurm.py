"""configs/slurm/train.sh on a real Slurm: `make slurm`. It takes minutes, two of which Slurm waits."""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.faults.jobs import steps_done
from tests.running import ROOT, digest, free_port, run_train, train_words
from tests.slurm.cluster import Cluster, reason_to_skip

SCRIPT = str(ROOT / "configs/slurm/train.sh")
LIMIT = 600.0  # seconds of one job, the two that it waits in the queue again included
pytestmark = [pytest.mark.trains, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if not any("tests/slurm" in word for word in sys.argv[1:]):
        pytest.skip("these tests take minutes, and run as `make slurm`")
    if reason := reason_to_skip():
        pytest.skip(reason)
    started = Cluster(tmp_path_factory.mktemp("slurm"), (free_port(), free_port(), free_port()))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> Path:
    return tiny.build_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory) -> Path:
    return tiny.make_photos(tmp_path_factory.mktemp("photos"))


def finish(cluster: Cluster, job: int, log: Path) -> None:
    """Wait until the job has left the queue."""
    end = time.monotonic() + LIMIT
    while not cluster.is_over(job):
        assert time.monotonic() < end, log.read_text() + cluster.logs()
        time.sleep(1)


def test_a_run_over_two_nodes_that_is_stopped_and_requeued_has_the_bytes_of_one_process(
    cluster, tiny_base, photos_dir, tmp_path
):
    more = ["--max_train_steps", "150", "--num_threads", "1", "--checkpointing_steps", "1000"]
    out, log = tmp_path / "out", tmp_path / "log"
    words = train_words(tiny_base, photos_dir, out, *more, "--mixed_precision", "no")
    job = cluster.submit("--nodes=2", f"--output={log}", f"--chdir={ROOT}", SCRIPT, *words)
    end = time.monotonic() + LIMIT
    while steps_done(out) < 20:
        assert time.monotonic() < end, log.read_text() + cluster.logs()
        time.sleep(0.1)
    cluster.run("scancel", "--signal=USR1", "--batch", str(job))  # as Slurm does before the time is up
    while "resuming from" not in log.read_text():
        assert time.monotonic() < end, log.read_text() + cluster.logs()
        assert not cluster.is_over(job), log.read_text()
        time.sleep(1)
    finish(cluster, job, log)
    assert json.loads((out / "status.json").read_text())["state"] == "finished", log.read_text()
    alone = run_train(tiny_base, photos_dir, tmp_path / "alone", *more, "--gradient_accumulation_steps", "2")
    assert digest(out / alone.name) == digest(alone)


def test_a_table_of_runs_is_an_array_of_jobs(cluster, tiny_base, photos_dir, tmp_path):
    rows = {"one": [], "two": ["--rank", "2"]}
    (tmp_path / "runs.yaml").write_text("one: {}\ntwo: {rank: 2}\n")
    more = ["--max_train_steps", "2", "--num_threads", "1"]
    table = ["--runs", str(tmp_path / "runs.yaml"), "--mixed_precision", "no"]
    words = train_words(tiny_base, photos_dir, tmp_path / "out", *more, *table)
    log = tmp_path / "log-1"
    job = cluster.submit(
        *("--array=1-2", "--nodes=1", f"--output={tmp_path}/log-%a", f"--chdir={ROOT}", SCRIPT, *words)
    )
    finish(cluster, job, log)
    for name, flags in rows.items():
        alone = run_train(tiny_base, photos_dir, tmp_path / "alone" / name, *more, *flags)
        assert digest(tmp_path / "out" / name / alone.name) == digest(alone), shlex.join(words)
