"""Which probed weights are left, so that whatever a monitor may still choose is there."""

from pathlib import Path

import pytest

from tutelage.errors import CheckpointError
from tutelage.train import probed


def probe(run: Path, *steps: int) -> None:
    for step in steps:
        probed.save(run, step, lambda folder: folder.mkdir(parents=True, exist_ok=True), count=3)


def checkpoint(run: Path, step: int, round: int, in_round: int) -> None:
    (run / "checkpoints" / f"step-{step:07d}-00-{round:05d}-{in_round:05d}").mkdir(parents=True)


def left(run: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (run / "probes").iterdir())


def test_the_last_ones_are_left_and_those_that_were_the_last_at_each_checkpoint(tmp_path: Path) -> None:
    probe(tmp_path, 0, 10, 20)
    checkpoint(tmp_path, 20, 1, 0)
    probe(tmp_path, 30, 40, 50, 60, 70, 80)
    assert left(tmp_path) == [0, 10, 20, 60, 70, 80]


def test_a_run_killed_long_after_its_checkpoint_writes_its_probes_anew_and_keeps_them(tmp_path: Path) -> None:
    probe(tmp_path, 0, 10, 20)
    checkpoint(tmp_path, 20, 1, 0)
    probe(tmp_path, 30, 40, 50, 60, 70, 80)
    for step, expected in ((30, [0, 10, 20, 30]), (40, [0, 10, 20, 30, 40]), (50, [0, 10, 20, 30, 40, 50])):
        probe(tmp_path, step)
        assert left(tmp_path) == expected


def test_after_a_round_is_taken_back_the_choice_is_what_it_was_when_the_round_began(tmp_path: Path) -> None:
    probe(tmp_path, 0, 10, 20)
    checkpoint(tmp_path, 20, 1, 0)
    probe(tmp_path, 30, 40, 50)
    probed.drop_after(tmp_path, 20)
    assert left(tmp_path) == [0, 10, 20]
    checkpoint(tmp_path, 50, 2, 0)  # the next round's start: the weights of 20
    probe(tmp_path, 60)
    assert left(tmp_path) == [0, 10, 20, 60]


def test_the_first_round_goes_back_to_the_start_of_the_run(tmp_path: Path) -> None:
    probe(tmp_path, 0, 10, 20)
    checkpoint(tmp_path, 25, 0, 25)
    probe(tmp_path, 30, 40, 50)
    assert left(tmp_path) == [0, 10, 20, 30, 40, 50]
    probed.drop_after(tmp_path, 0)
    assert left(tmp_path) == [0]


def test_chosen_weights_that_are_gone_are_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    probe(tmp_path, 0, 10)
    assert probed.folder_of(tmp_path, probed.name_of(10)).is_dir()
    with pytest.raises(
        CheckpointError, match=r"'step-0000020' were chosen .* holds \['step-0000000', 'step-0000010'\]"
    ):
        probed.folder_of(tmp_path, probed.name_of(20))
