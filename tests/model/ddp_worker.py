"""One process of test_data_parallel.py: trains a model under DDP and saves its weights before it leaves the group.

python ddp_worker.py RANK WORLD_SIZE FOLDER CONFIG_JSON
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from glam_ext import GLaM, GLaMConfig

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.model.helpers import backward_of, batch_of

STEPS = 2


def train(rank: int, world_size: int, folder: Path, config: GLaMConfig) -> None:
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model = GLaM(config, seed=rank)  # DDP gives every rank the weights of rank 0
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        batch = batch_of(config, seed=step * world_size + rank)
        backward_of(parallel(batch["tokens"], batch["segment_ids"], batch["targets"], batch["weights"]))
        optimizer.step()
        optimizer.zero_grad()
    assert all(value is dict(model.named_parameters())[name] for name, value in model._core.named_parameters())
    torch.save(model.state_dict(), folder / f"rank{rank}.partial")
    (folder / f"rank{rank}.partial").rename(folder / f"rank{rank}.pt")
    # Gloo's threads must not outlive the interpreter.
    dist.barrier()
    del parallel, optimizer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), GLaMConfig.from_json(sys.argv[4]))
