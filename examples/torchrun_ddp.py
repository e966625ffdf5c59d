"""DistributedDataParallel: `torchrun --standalone --nproc-per-node 2 examples/torchrun_ddp.py`.

Tested with torch 2.13 on 1 and 2 ranks. The model first, then the optimizer, which is told of it.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from problem import Net, Points
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from mtl_optim import MultiTaskOptimizer, PCGrad


def train(epochs: int = 3, micro: int = 1, checkpoint: str | None = None) -> tuple[torch.nn.Module, MultiTaskOptimizer]:
    """Trains, from a checkpoint where there is one, and saves one after every epoch; steps of ``micro`` batches."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    opt = MultiTaskOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), PCGrad(), data_parallel=model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
    sampler = DistributedSampler(dataset := Points())
    loader = DataLoader(dataset, 16, sampler=sampler)
    first = 0
    if checkpoint and os.path.exists(checkpoint):
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["epoch"]
    for epoch in range(first, epochs):
        sampler.set_epoch(epoch)
        for i, batch in enumerate(loader, start=1):
            losses = model(**batch)
            last = i % micro == 0 or i == len(loader)
            opt.backward({name: loss / micro for name, loss in losses.items()}, accumulate=not last)
            if last:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
        scheduler.step()
        if dist.get_rank() == 0:
            print(epoch, {name: round(loss.item(), 3) for name, loss in losses.items()})
            if checkpoint:
                saved = {"model": model.state_dict(), "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}
                torch.save({**saved, "epoch": epoch + 1}, checkpoint)
    return model.module, opt


if __name__ == "__main__":
    dist.init_process_group("gloo")
    model, opt = train(checkpoint=os.environ.get("CHECKPOINT"))
    if dist.get_rank() == 0:
        print(opt.report)
    dist.destroy_process_group()
