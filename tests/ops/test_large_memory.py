"""Memory of large results: taken again by the next step, never shared by two tensors that are in use."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import torch
from torch import Tensor

import glam_ext  # noqa: F401  (its ops)


def weights(experts: int) -> list[Tensor]:
    """[experts, 512, 1024] and [experts, 1024, 512], 2 MiB for each expert."""
    return [torch.zeros(experts, *size, requires_grad=True) for size in ((512, 1024), (1024, 512))]


def make_gradients(wi: Tensor, wo: Tensor) -> None:
    experts = wi.shape[0]
    rows, offsets = torch.ones(experts, 512), torch.arange(experts + 1, dtype=torch.int32)
    torch.ops.glam.expert_mlp(rows, offsets, wi, wo, None, "relu").sum().backward()


def weight_gradient(experts: int) -> Tensor:
    wi, wo = weights(experts)
    make_gradients(wi, wo)
    assert wi.grad is not None
    return wi.grad


def test_the_next_step_takes_it_again() -> None:
    first = weight_gradient(4)
    place = first.data_ptr()
    assert place % (2 << 20) == 0
    del first
    places = {weight_gradient(4).data_ptr() for _ in range(5)}
    assert len(places) <= 2  # that of wi's gradient or of wo's


def test_what_is_in_use_is_left_alone() -> None:
    kept = [weight_gradient(4) for _ in range(3)]
    for index, gradient in enumerate(kept):
        gradient.fill_(index)
    weight_gradient(4)
    assert len({gradient.data_ptr() for gradient in kept}) == 3
    assert all(bool((gradient == index).all()) for index, gradient in enumerate(kept))


def test_a_view_keeps_it() -> None:
    row = weight_gradient(4)[3, 511, 1020:].fill_(7)
    weight_gradient(4)
    assert row.tolist() == [7] * 4


def test_a_block_is_not_taken_for_a_much_smaller_tensor() -> None:
    large = weight_gradient(16)
    place, size = large.data_ptr(), large.nbytes
    del large
    small = weight_gradient(4)
    assert not place <= small.data_ptr() < place + size


def print_faults() -> None:
    """Page faults of the first step, and of four later ones."""
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: each page of 4 KiB is a fault

    # Neither's sizes fit the other; together they are a third more than is ever in use at once.
    turns = [weights(16), weights(5)]

    def faults_of(steps: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for turn in steps * turns:
            make_gradients(*turn)
            for weight in turn:
                weight.grad = None
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    first = faults_of(1)
    faults_of(2)
    print(first, faults_of(4))


def test_steps_that_come_round_touch_no_fresh_pages() -> None:
    program = [sys.executable, __file__]
    first, later = map(int, subprocess.run(program, check=True, capture_output=True, text=True).stdout.split())
    assert first > (64 << 20) / 4096  # both gradients of the larger one
    assert later < first / 4


if __name__ == "__main__":
    print_faults()
