"""DistributedDataParallel over two Gloo processes: the weights of one that averages both gradients, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glam_ext import GLaMConfig
from tests.guards import PROCESS_SECONDS

from .ddp_worker import STEPS
from .helpers import assert_same_bits, backward_of, batch_of, build, config_of

RANKS = 2


def expected_weights(config: GLaMConfig) -> dict[str, torch.Tensor]:
    model = build(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        for rank in range(RANKS):
            backward_of(model.loss(**batch_of(config, seed=step * RANKS + rank)))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= RANKS  # a power of two: no rounding, whatever the order
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("recompute", [False, True])
def test_two_processes_train_as_one(tmp_path: Path, recompute: bool) -> None:
    config = config_of(recompute=recompute)
    worker = str(Path(__file__).with_name("ddp_worker.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(RANKS), str(tmp_path), config.to_json()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    expected = expected_weights(config)
    output = "\n".join(process.communicate(timeout=PROCESS_SECONDS)[0] for process in processes)
    for rank in range(RANKS):
        # The verdict is the file: a process may still abort while torch shuts Gloo down.
        assert (tmp_path / f"rank{rank}.pt").exists(), output
        assert_same_bits(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), expected)
