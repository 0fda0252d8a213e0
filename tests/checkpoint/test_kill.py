"""SIGKILL at random moments of a process that saves in a loop: whatever was complete before is still loadable.

The saver prints one line as each save begins and ends; a kill is proven to have landed inside a save when the last line
it printed is a beginning. Both languages then read the folder.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoint.helpers import (
    CONFIG,
    assert_same_tensors,
    load_in_cpp,
    load_in_python,
    model_tensors,
    optimizer_tensors,
    save,
)

# Enough bytes that a save takes several milliseconds, most of them in writes and syncs.
SAVER = """
import sys, torch
from tests.checkpoint.helpers import CONFIG, model_tensors, optimizer_tensors
from glam_ext.checkpoint import save_checkpoint
step = int(sys.argv[2])
ballast = torch.zeros(500_000)
while True:
    step += 1
    print("begin", step, flush=True)
    tensors = {**model_tensors(step), "ballast": ballast}
    save_checkpoint(sys.argv[1], step, CONFIG, tensors, optimizer_tensors(step), {"tokens": 10 * step}, keep=2)
    print("end", step, flush=True)
"""


def run_until_killed(root: Path, step: int, generator: random.Random) -> tuple[int, bool]:
    """Kills a saver at a random moment after its first save; the last save that ended, and whether one had begun."""
    with subprocess.Popen([sys.executable, "-c", SAVER, root, str(step)], stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdout is not None
        lines = [saver.stdout.readline(), saver.stdout.readline()]
        assert lines == [f"begin {step + 1}\n", f"end {step + 1}\n"], "the saver did not start"
        time.sleep(generator.uniform(0.0, 0.15))
        saver.send_signal(signal.SIGKILL)
        lines += saver.stdout.readlines()
    assert saver.returncode == -signal.SIGKILL
    word, number = lines[-1].split()
    return (int(number), False) if word == "end" else (int(number) - 1, True)


def check(root: Path, finished: int) -> int:
    """Every reader finds the last save that ended, or the one after it, killed between its marker and its message."""
    found = set()
    for read in (load_in_python, load_in_cpp):
        content, _ = read(root)
        step = content["trainer"]["step"]
        assert step in (finished, finished + 1)
        assert content["trainer"]["tokens"] == 10 * step
        assert content["config"] == CONFIG
        content["model"].pop("ballast", None)
        assert_same_tensors(content["model"], model_tensors(step))
        assert_same_tensors(content["optimizer"], optimizer_tensors(step))
        found.add(step)
    assert len(found) == 1
    return found.pop()


def kill_again_and_again(root: Path, rounds: int, seed: int) -> int:
    generator = random.Random(seed)
    step = inside = 0
    for _ in range(rounds):
        finished, was_inside = run_until_killed(root, step, generator)
        inside += was_inside
        step = check(root, finished)
    return inside


def test_a_few_kills(tmp_path):
    assert kill_again_and_again(tmp_path, rounds=3, seed=0) >= 1


@pytest.mark.slow
def test_many_kills(tmp_path):
    assert kill_again_and_again(tmp_path, rounds=60, seed=1) >= 20


# One kill at each stage of a save, exactly: the process kills itself as it enters its n-th sync, rename or deletion.
SUICIDE = """
import os, signal, sys
from tests.checkpoint.helpers import save
from pathlib import Path
root, fatal = Path(sys.argv[1]), int(sys.argv[2])
save(root, 1, tokens=10)
calls = 0
def counted(function):
    def wrapper(*arguments, **keywords):
        global calls
        calls += 1
        if calls == fatal:
            print("killed at", calls, function.__name__, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return wrapper
os.fsync, os.rename, os.unlink = counted(os.fsync), counted(os.rename), counted(os.unlink)
Path.touch = counted(Path.touch)
save(root, 2, keep=1, tokens=20)
print("calls", calls, flush=True)
"""


def run_suicide(root: Path, fatal: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SUICIDE, root, str(fatal)], capture_output=True, text=True)


# Five files, the folder, the rename, the parent: eight calls. The ninth makes the marker, the tenth and eleventh sync
# it and the folder, the twelfth renames the old folder and the last six empty it.
MARKER_CALL = 9
ALL_CALLS = 18
FAST = (2, MARKER_CALL, MARKER_CALL + 1)


@pytest.mark.parametrize(
    "fatal", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in range(1, ALL_CALLS + 1)]
)
def test_a_kill_at_each_stage(tmp_path, fatal):
    done = run_suicide(tmp_path, fatal)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.startswith(f"killed at {fatal} ")
    # Until the marker exists the older folder counts, from then on the newer one.
    assert check(tmp_path, 1) == (1 if fatal <= MARKER_CALL else 2)
    # The next save clears up and carries on.
    save(tmp_path, 3, keep=1, tokens=30)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_the_stages_are_all_of_them(tmp_path):
    done = run_suicide(tmp_path, 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"calls {ALL_CALLS}\n"
