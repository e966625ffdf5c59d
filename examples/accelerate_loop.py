"""Hugging Face Accelerate: `python examples/accelerate_loop.py`, or with `torchrun --standalone --nproc-per-node 2`.

Tested with accelerate 1.15 and torch 2.13 on 1 and 2 ranks. The model is prepared first, then the optimizer is built
and told of it, then prepared. `accelerator.backward(joint_loss(...))` knows of scalers and of micro-batches.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from problem import Net, Points
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from mtl_optim import MultiTaskOptimizer, PCGrad
from mtl_optim.trainers import joint_loss


def train(epochs: int = 3, micro: int = 1, checkpoint: str | None = None) -> tuple[torch.nn.Module, MultiTaskOptimizer]:
    """Trains, from a checkpoint where there is one, and saves one after every epoch; steps of ``micro`` batches."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
    model, loader = accelerator.prepare(Net(), DataLoader(Points(), 16, shuffle=True))
    parallel = model if isinstance(model, DistributedDataParallel) else None
    opt = MultiTaskOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), PCGrad(), data_parallel=parallel)
    optimizer = accelerator.prepare(opt)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)  # once an epoch: not prepared, but registered
    accelerator.register_for_checkpointing(scheduler)
    if checkpoint and os.path.exists(checkpoint):
        accelerator.load_state(checkpoint)
    for epoch in range(scheduler.last_epoch, epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            with accelerator.accumulate(model):
                losses = model(**batch)
                accelerator.backward(joint_loss(optimizer, losses))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        accelerator.print(epoch, {name: round(loss.item(), 3) for name, loss in losses.items()})
        if checkpoint:
            accelerator.save_state(checkpoint)
    return accelerator.unwrap_model(model), opt


if __name__ == "__main__":
    model, opt = train(checkpoint=os.environ.get("CHECKPOINT"))
    Accelerator().print(opt.report)
