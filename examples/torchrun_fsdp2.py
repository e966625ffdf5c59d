"""Sharded parameters (FSDP2): `torchrun --standalone --nproc-per-node 2 examples/torchrun_fsdp2.py`.

Tested with torch 2.13 on 1 and 2 ranks. `fully_shard` first; the optimizer sees by itself that gradients are shards."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from problem import Net, Points
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from mtl_optim import MultiTaskOptimizer, PCGrad
from mtl_optim.distributed.checkpoint import TrainingState


def train(epochs: int = 3, micro: int = 1, checkpoint: str | None = None) -> tuple[torch.nn.Module, MultiTaskOptimizer]:
    """Trains, from a checkpoint where there is one, and saves one after every epoch; steps of ``micro`` batches."""
    torch.manual_seed(0)
    fully_shard((model := Net()).trunk)
    fully_shard(model)
    opt = MultiTaskOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), PCGrad())
    sampler, saved = DistributedSampler(dataset := Points()), {"training": TrainingState(model, opt), "epoch": 0}
    loader = DataLoader(dataset, 16, sampler=sampler)
    if checkpoint and os.path.exists(f"{checkpoint}/.metadata"):
        dcp.load(saved, checkpoint_id=checkpoint)
    for epoch in range(saved["epoch"], epochs):
        sampler.set_epoch(epoch)
        for i, batch in enumerate(loader, start=1):
            losses = model(**batch)
            last = i % micro == 0 or i == len(loader)
            opt.backward({name: loss / micro for name, loss in losses.items()}, accumulate=not last)
            if last:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
        if checkpoint:
            dcp.save({**saved, "epoch": epoch + 1}, checkpoint_id=checkpoint)
        if dist.get_rank() == 0:
            print(epoch, {name: round(loss.item(), 3) for name, loss in losses.items()})
    return model, opt


if __name__ == "__main__":
    dist.init_process_group("gloo")
    model, opt = train(checkpoint=os.environ.get("CHECKPOINT"))
    if dist.get_rank() == 0:
        print(opt.report)
    dist.destroy_process_group()
