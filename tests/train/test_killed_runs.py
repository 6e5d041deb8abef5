"""SIGKILL while sampling, judging, training, saving and in between: the resumed run ends with the same bits."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import kill_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    assert kill_run.completed(folder, tiny_folder, "whole")
    return folder


@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("evaluating", 1),
        ("sampling", 30),
        ("committing a chunk", 3),
        ("judging", 2),
        ("training", 3),
        ("rounding the masters", 3),
        ("saving the optimiser", 2),
        ("naming a checkpoint", 2),
        ("dropping finished work", 1),
        ("publishing a round", 2),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(whole: Path, tiny_folder: Path, point: str, call: int) -> None:
    name = f"{point}-{call}".replace(" ", "-")
    assert kill_run.killed(whole, tiny_folder, name, point, call), "the run ended before that instant"
    assert kill_run.completed(whole, tiny_folder, name)
    assert kill_run.differences(whole / "whole", whole / name) == []


def test_killed_twice(whole: Path, tiny_folder: Path) -> None:
    assert kill_run.killed(whole, tiny_folder, "twice", "training", 4)
    assert kill_run.killed(whole, tiny_folder, "twice", "naming a checkpoint", 1)
    assert kill_run.completed(whole, tiny_folder, "twice")
    assert kill_run.differences(whole / "whole", whole / "twice") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("distillation", [("sampling", 20), ("moving the teacher", 2), ("saving the teacher", 1)]),
        ("rl", [("judging", 2), ("scoring", 2), ("training", 3)]),
        ("graduation", [("keeping probed weights", 7), ("dropping probed weights", 5), ("handing over", 1)]),
    ],
    ids=["distillation", "rl", "graduation"],
)
def test_killed_distillation_rl_and_graduation_resume_to_the_same_bits(
    tmp_path: Path, tiny_folder: Path, kind: str, points: list[tuple[str, int]]
) -> None:
    """With a teacher that moves with the student and has weights of its own; with a baseline, a gate and a base; with
    probes at every update, all of them later than the checkpoint the killed run goes back to."""
    assert kill_run.completed(tmp_path, tiny_folder, "whole", kind)
    for point, call in points:
        assert kill_run.killed(tmp_path, tiny_folder, point, point, call, kind), f"it ended before {point} {call}"
        assert kill_run.completed(tmp_path, tiny_folder, point, kind)
        assert kill_run.differences(tmp_path / "whole", tmp_path / point) == [], point
