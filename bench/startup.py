"""How long `import tutelage` and `tutelage --help` take, as fresh processes.

    .venv/bin/python bench/startup.py [--rounds 15]

The forms take turns for `--rounds` rounds; medians of wall and of CPU time (user and system). "python" is a process
that imports nothing: neither can be faster. Aims: import under 0.3 s, help under 0.5 s, no torch in either.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

FORMS = {
    "python": [sys.executable, "-c", "pass"],
    "import tutelage": [sys.executable, "-c", "import tutelage, sys; assert 'torch' not in sys.modules"],
    "tutelage --help": [sys.executable, "-m", "tutelage", "--help"],
}
AIMS_S = {"import tutelage": 0.3, "tutelage --help": 0.5}


def measured(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, os.times()
    children = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    return wall, children


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for command in FORMS.values():  # files into the cache, byte code written
        measured(command)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for _ in range(args.rounds):
        for name, command in FORMS.items():
            taken[name].append(measured(command))
    print(f"{args.rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| form | wall s, median | fastest | CPU s, median | aim |\n|---|---|---|---|---|")
    for name, pairs in taken.items():
        walls, cpus = [w for w, _ in pairs], [c for _, c in pairs]
        aim = AIMS_S.get(name, "")
        print(f"| {name} | {statistics.median(walls):.3f} | {min(walls):.3f} | {statistics.median(cpus):.3f} | {aim} |")


if __name__ == "__main__":
    main()
