"""Odd things in place of files, and odd values of flags: a sample of the fuzzer of tests/faults."""

from pathlib import Path

import pytest

from tests.faults.odd_inputs import World, drawn, flag_cases, folder_cases, sees_a_fault

# Each is a mechanism of its own; the rest of the sample is drawn.
CHOSEN = {
    "draw a run: FIFO at out/pytorch_lora_weights.safetensors",
    "inspect: sparse file of a terabyte at adapter.safetensors",
    "overwrite: link to a user's file at out/metrics.jsonl",
    "resume: deep JSON at out/run.json",
    "resume: torn text at out/run.yaml",
    "draw: link loop at pictures/images.json",
    "generate: socket at class/manifest.json",
    "train by a file: link to a device at flags.yaml",
    "train: --peer_timeout large",
    "train: --seed 400 digits",
    "draw: --output_dir byte that is no UTF-8",
    "generate: --num_threads 400 digits",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("odd"))


@pytest.mark.trains
def test_odd_things_and_odd_values_end_with_a_message_and_change_nothing_of_the_user(world):
    cases = {case.name: case for case in (*folder_cases(), *flag_cases())}
    sample = [*(cases[name] for name in sorted(CHOSEN)), *drawn(4, 3)]
    results = {case.name: world.result(case) for case in sample}
    assert {name: (wrong, said) for name, (_, wrong, said) in results.items() if wrong} == {}
    assert {ended for ended, _, _ in results.values()} <= {"refused", "stopped", "passed"}
    assert results["draw: --output_dir byte that is no UTF-8"][0] == "refused"


@pytest.mark.trains
def test_the_fuzzer_sees_a_fault_that_is_made_on_purpose(world):
    assert sees_a_fault(world)


def test_every_command_and_every_odd_thing_is_among_the_cases():
    cases = [*folder_cases(), *flag_cases()]
    assert len({case.name for case in cases}) == len(cases) > 6000
    assert all(Path(case.target).parts for case in folder_cases())
