"""Memory of large results: taken again by the next step, never shared by two tensors that are in use."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_gradient(experts: int) -> Tensor:
    """Of [experts, 512, 1024] weights, 2 MiB each."""
    wi = torch.zeros(experts, 512, 1024, requires_grad=True)
    wo = torch.zeros(experts, 1024, 512, requires_grad=True)
    rows, offsets = torch.ones(experts, 512), torch.arange(experts + 1, dtype=torch.int32)
    torch.ops.glam.expert_mlp(rows, offsets, wi, wo, None, "relu").sum().backward()
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
