"""On a GPU, with the extension built for it: pytest -m gpu tests/cuda. Elsewhere all of it is skipped.

The ops' own tests with every call sent to the device and back; each op captured in a CUDA graph and replayed on new
inputs; the PTX wrappers against plain C++; rows exchanged between two GPUs by NCCL.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glam_ext
from glam_ext.data import Corpus, Tokenizer, write_corpus
from glam_ext.training import TrainingRun, load_config

from .emulated import ROOT
from .test_emulated_ops import ALL, GROUPS, run_op_tests
from .test_nvcc import nvcc

GPUS = torch.cuda.device_count()
BUILT = glam_ext.build_info()["backends"]["cuda"]["built"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="there is no GPU here"),
    pytest.mark.skipif(not BUILT, reason="glam_ext was built without CUDA (glam doctor says why)"),
]


@pytest.mark.parametrize("op", [op for group in GROUPS.values() for op in group])
def test_op(op: str) -> None:
    levels = f"{ALL} or test_compile or test_export or test_torchscript or test_double_backward"
    run_op_tests([op], levels, GLAM_TEST_DEVICE="cuda")


def test_a_layer_in_a_graph_follows_new_inputs() -> None:
    """Forward and backward are captured once; a replay with other logits and other routing equals a fresh run."""
    glam = torch.ops.glam
    torch.manual_seed(0)
    weights = [torch.randn(*shape, device="cuda").mul_(0.1).requires_grad_() for shape in ((6, 8, 5), (6, 5, 8))]
    logits, x = (torch.randn(40, size, device="cuda").requires_grad_() for size in (6, 8))

    def run() -> list[torch.Tensor]:
        gates, ids, positions, aux = glam.top2_gating(logits, None, None, 20, 4)
        y = glam.moe_mlp(x, gates, *glam.routing_plan(ids, positions, 6), *weights, None, "gelu")
        return [y, *torch.autograd.grad([y.square().sum() + aux.sum()], [logits, x, *weights])]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        for replayed, fresh in zip(captured, run(), strict=True):
            assert torch.equal(replayed, fresh)


def test_ptx_wrappers(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    program = tmp_path / "ptx_probe"
    command = [nvcc(), "-std=c++20", "--expt-relaxed-constexpr", f"-arch=sm_{major}{minor}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(ROOT / "tests/cuda/ptx_probe.cu"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_training_has_the_losses_of_the_cpu(tmp_path: Path) -> None:
    """The same run on both devices, saved on one and resumed on the other."""
    text = "".join(Corpus(["austen:heldout"]))[:12_000]
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}))
    corpus = Corpus([tmp_path / "text.jsonl"])
    write_corpus(tmp_path / "data", corpus, Tokenizer.train(corpus, 512), 16)
    file = tmp_path / "run.toml"
    file.write_text(f"""
[run]
name = "cpu"
folder = "{tmp_path / "runs"}"
steps = 6
log_interval = 1
[model]
preset = "tiny"
compute_dtype = "float32"
[data]
train = "{tmp_path / "data"}"
batch_size = 4
""")

    def train(*overrides: str) -> list[float]:
        config = load_config(file, overrides)
        assert TrainingRun(config).train() == 0
        lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    expected = train()
    assert train("--run.name=cuda", "--run.device=cuda") == pytest.approx(expected, rel=1e-4)
    train("--run.name=both", "--run.device=cuda", "--run.steps=3")
    assert train("--run.name=both") == pytest.approx(expected, rel=1e-4)


EXCHANGE = """
import os, torch, torch.distributed as dist
import glam_ext
from glam_ext.distributed import init_mesh
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
mesh = init_mesh(2, 60)
group = mesh.group_name("expert")
rows = (torch.arange(6.0, device="cuda").reshape(6, 1) + 10 * rank).requires_grad_()
sent, received = ([2, 4], [2, 1]) if rank == 0 else ([1, 5], [4, 5])
y = torch.ops.glam.exchange(rows, received, sent, group)
other = torch.arange(6.0, device="cuda").reshape(6, 1) + 10 * (1 - rank)
mine = rows.detach()
expected = torch.cat([mine[:2], other[:1]]) if rank == 0 else torch.cat([other[2:], mine[1:]])
assert torch.equal(y.detach(), expected), (rank, y, expected)
y.backward(y.detach())
assert torch.equal(rows.grad, mine)
mesh.close()
print("ok", flush=True)
"""


@pytest.mark.skipif(GPUS < 2, reason="there are not two GPUs here")
def test_two_gpus_exchange_rows(tmp_path: Path) -> None:
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("ok") == 2
