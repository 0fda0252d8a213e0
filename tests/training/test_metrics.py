"""What a run writes about itself: the numbers of a window, the file without repeats, the line on the screen."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from glam_ext.training.metrics import (
    MetricsFile,
    MetricWindow,
    dense_gemm_rate,
    duration,
    evaluation_line,
    router_balance,
    train_line,
)
from glam_ext.training.step import StepSums

# Two layers, three experts; columns: rows of each expert, first and second choices dropped, with 0, 1, 2 rows, real.
STATISTICS = torch.tensor([[6, 2, 1, 1, 4, 1, 4, 2, 7], [3, 3, 3, 0, 5, 0, 5, 2, 7]])


def sums(nll: float, total: float = 1.0) -> StepSums:
    number = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    return StepSums(number(total), number(nll), number(0.5), number(0.25), STATISTICS)


def test_a_window_averages_tokens_and_steps():
    window = MetricWindow(2, 3)
    window.add(sums(nll=12.0, total=3.0), 7, torch.tensor(2.0))
    window.add(sums(nll=30.0, total=5.0), 14, torch.tensor(4.0))
    summary = window.summary()
    assert summary["loss"] == 42.0 / 21
    assert summary["total_loss"] == 4.0
    assert (summary["aux"], summary["router_z"], summary["grad_norm"]) == (0.5, 0.25, 3.0)


def test_a_skipped_update_is_no_part_of_the_mean_norm():
    window = MetricWindow(2, 3)
    window.add(sums(math.nan), 7, torch.tensor(math.inf))
    assert math.isnan(window.summary()["grad_norm"])
    window.add(sums(1.0), 7, torch.tensor(3.0))
    assert window.summary()["grad_norm"] == 3.0
    assert math.isnan(window.summary()["loss"])


def test_a_window_goes_through_json_without_losing_a_bit():
    window, again = MetricWindow(2, 3), MetricWindow(2, 3)
    window.add(sums(nll=0.1 + 0.2, total=math.pi), 7, torch.tensor(1 / 3))
    window.add(sums(nll=math.nan, total=-math.inf), 7, torch.tensor(math.nan))
    again.load_state_dict(json.loads(json.dumps(window.state_dict(), allow_nan=False)))
    assert again.state_dict() == window.state_dict()
    assert repr(again.summary()) == repr(window.summary())
    again.reset()
    assert again.summary()["loss"] == 0


def test_the_balance_is_that_of_the_worst_layer():
    balance = router_balance(STATISTICS)
    assert balance["load_max"] == 2.0  # 6 rows where the mean is 3
    assert balance["over_capacity_first"] == 1 / 14
    assert balance["over_capacity_second"] == 9 / 14
    assert balance["tokens_with_0_experts"] == 1 / 14
    assert balance["tokens_with_1_expert"] == 9 / 14
    assert balance["tokens_with_2_experts"] == 4 / 14
    assert router_balance(torch.zeros(0, 6, dtype=torch.int64)) == {}


def test_the_file_forgets_what_is_to_be_done_again(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate(0)
    assert not file.path.exists()
    for step in (1, 2, 3, 4):
        file.write({"kind": "train", "step": step, "loss": math.nan if step == 1 else 0.5})
    file.write({"kind": "evaluation", "step": 2, "nats": math.inf})
    with file.path.open("a") as stream:
        stream.write('{"kind": "train", "step": 2, "lo')  # a kill in the middle of a line
    file.sync()

    again = MetricsFile(file.path)
    again.truncate(2)
    records = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [("train", 1), ("train", 2), ("evaluation", 2)]
    assert records[0]["loss"] is None
    assert records[2]["nats"] is None
    assert again.has("evaluation", 2)
    assert again.has("train", 2)
    assert not again.has("train", 3)
    again.write({"kind": "evaluation", "step": 3})
    assert again.has("evaluation", 3)
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_lines_say_everything():
    record = {
        "step": 20, "tokens": 81_920, "loss": 2.5, "bits_per_byte": 0.9641, "grad_norm": 0.123, "learning_rate": 1e-3,
        "tokens_per_second": 4321.0, "model_flops_per_second": 2.5e11, "utilisation_of_dense_gemm": 0.31,
        "skipped_updates": 0, "eta_seconds": 3661.0, **router_balance(STATISTICS),
    }  # fmt: skip
    assert train_line(record, 100) == (
        "step 20/100 | 81.9K tokens | loss 2.5000 | 0.964 bits/byte | grad 0.123 | lr 0.001 | 4.3K tokens/s | "
        "250GFLOP/s (31% of dense GEMM) | load max 2.00, over capacity 7.1%/64.3%, with 0/1/2 experts 7.1%/64.3%/28.6% "
        "| ETA 1:01:01"
    )
    assert "| skipped 3 |" in train_line({**record, "skipped_updates": 3}, 100)
    numbers = {"nats": 2.5, "perplexity": 12.18, "bits_per_byte": 0.9641, "seconds": 1.0}
    line = evaluation_line({"step": 20, "capacity": "x", **numbers})
    assert line == "held out after step 20: 2.5000 nats per token, perplexity 12.18, 0.9641 bits/byte (x, 1.0 s)"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (math.nan, "unknown")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_rate_of_a_dense_product_is_a_positive_number():
    assert dense_gemm_rate(torch.float32, size=64) > 0


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 2.0), (torch.float32, 2.0), (torch.float64, 0.5)])
def test_where_float32_is_faster_its_rate_counts(monkeypatch, dtype, expected):
    seconds = {torch.bfloat16: 4.0, torch.float32: 1.0, torch.float64: 4.0}
    now = [0.0]

    def product(a, b):
        now[0] += seconds[a.dtype]

    monkeypatch.setattr(torch, "matmul", product)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert dense_gemm_rate(dtype, size=1) == expected
