"""Sharded parameters (FSDP2): `torchrun --standalone --nproc-per-node 2 examples/torchrun_fsdp2.py`.

Tested with torch 2.13 on 1 and 2 ranks. `fully_shard` first; the optimizer sees by itself that gradients are shards."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from problem import Net, Points
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from mtl_optim import MultiTaskOptimizer, PCGrad


def train(epochs: int = 3, micro: int = 1, checkpoint: str | None = None) -> tuple[torch.nn.Module, MultiTaskOptimizer]:
    """Trains, from a checkpoint where there is one, and saves one after every epoch; steps of ``micro`` batches."""
    torch.manual_seed(0)
    fully_shard((model := Net()).trunk)
    fully_shard(model)
    opt = MultiTaskOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), PCGrad())
    sampler, saved = DistributedSampler(dataset := Points()), {"epoch": 0}
    loader = DataLoader(dataset, 16, sampler=sampler)
    if checkpoint and os.path.exists(f"{checkpoint}/rest"):
        saved = torch.load(f"{checkpoint}/rest", weights_only=True)
        model_state, opt_state = get_state_dict(model, opt.optimizer)
        dcp.load({"model": model_state, "opt": opt_state}, checkpoint_id=checkpoint)
        set_state_dict(model, opt.optimizer, model_state_dict=model_state, optim_state_dict=opt_state)
        opt.load_state_dict({**opt.optimizer.state_dict(), "mtl": saved["mtl"]})
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
            model_state, opt_state = get_state_dict(model, opt.optimizer)
            dcp.save({"model": model_state, "opt": opt_state}, checkpoint_id=checkpoint)
        if dist.get_rank() == 0:
            print(epoch, {name: round(loss.item(), 3) for name, loss in losses.items()})
            if checkpoint:  # what the method remembers, the same on all ranks
                torch.save({"mtl": opt.state_dict()["mtl"], "epoch": epoch + 1}, f"{checkpoint}/rest")
    return model, opt


if __name__ == "__main__":
    dist.init_process_group("gloo")
    model, opt = train(checkpoint=os.environ.get("CHECKPOINT"))
    if dist.get_rank() == 0:
        print(opt.report)
    dist.destroy_process_group()
