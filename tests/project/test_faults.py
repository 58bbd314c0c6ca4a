"""The fast half of the fault matrix, through the real launchers; `make faults` runs and counts all of it."""

import json
from pathlib import Path

import pytest

from benchmarks import faults as matrix
from tests.faults import folder_faults, run_faults
from tests.faults.jobs import World

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("faults"))


@pytest.mark.trains
def test_one_two_and_four_processes_and_a_resume_between_them_give_the_same_bytes(world):
    """Text encoder, prior preservation, dropout, random crops, accumulation; adapter and optimizer."""
    found = run_faults.exact_worlds(world, sizes=(1, 2, 4), resumes=((4, 1),), launchers={2: "accelerate"})
    assert found["worlds_equal"], found
    assert found["control_differs"], "another seed gave the same bytes"


@pytest.mark.trains
def test_random_faults_leave_the_adapter_as_it_would_have_been(world):
    found = run_faults.chaos(world, faults=2, share_of_two=0)
    assert found["final_hash_equal"]
    assert found["faults_recovered"] == found["faults_injected"] == 2
    assert found["steps_lost_max"] <= found["checkpoint_interval"] + 1


@pytest.mark.trains
def test_a_run_stops_at_each_signal(world):
    found = run_faults.seconds_to_stop(world, times=1)
    assert found["stops_right"] == found["stops"] == 3


@pytest.mark.trains
def test_a_run_whose_launcher_is_killed_saves_and_ends(world):
    assert run_faults.launcher_killed(world)["launcher_killed"]


@pytest.mark.trains
def test_a_stopped_launcher_stops_both_processes(world):
    assert run_faults.launcher_stopped(world)["launcher_stopped"]


@pytest.mark.trains
def test_a_process_that_dies_ends_the_job_by_name(world):
    assert run_faults.peers_lost(world, ("kill",))["peers_lost"]["kill"]["right"]


@pytest.mark.trains
def test_a_full_disk_costs_checkpoints_and_says_so(world):
    assert folder_faults.disk_full(world)["disk_full"]


@pytest.mark.trains
def test_a_second_run_in_a_folder_is_refused_and_the_first_unharmed(world):
    assert folder_faults.two_runs(world)["second_run_refused"]


@pytest.mark.trains
def test_a_run_whose_folder_was_given_to_another_writes_nothing_there(world):
    assert folder_faults.folder_lost(world, [folder_faults._replaced])["folders_lost_right"] == 1


@pytest.mark.trains
def test_class_images_killed_and_completed_are_the_same_set(world):
    assert folder_faults.class_images_killed(world)["class_images_equal"]


@pytest.mark.trains
def test_one_process_where_two_were_asked_for_is_said(world):
    assert run_faults.one_process_where_two_were_asked_for(world)["one_process_said"]


def test_the_committed_figures_are_those_of_the_page_and_keep_every_promise():
    record = json.loads(matrix.RESULTS.read_text())
    assert matrix.broken(record["counts"]) == record["broken"] == []
    assert matrix.table(record["counts"]) in matrix.PAGE.read_text()
