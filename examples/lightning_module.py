"""PyTorch Lightning: `python examples/lightning_module.py`, or with `torchrun --standalone --nproc-per-node 2`.

Tested with pytorch-lightning 2.6.6 and torch 2.13 on 1 and 2 ranks. Automatic optimization: `training_step` returns
`joint_loss(...)`; micro-batches, clipping, precision plugins, schedulers and checkpoints are the Trainer's.
"""

from __future__ import annotations

import os
from typing import Any

import pytorch_lightning as pl
import torch
from problem import Net, Points
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from mtl_optim import MultiTaskOptimizer, PCGrad
from mtl_optim.trainers import joint_loss


class Module(pl.LightningModule):
    """The network with what Lightning asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        losses = self.net(**batch)
        self.log_dict(losses, prog_bar=True)
        return joint_loss(self.optimizers(), losses)

    def configure_optimizers(self) -> dict[str, Any]:
        parallel = self.trainer.model if isinstance(self.trainer.model, DistributedDataParallel) else None
        opt = MultiTaskOptimizer(torch.optim.AdamW(self.parameters(), lr=1e-2), PCGrad(), data_parallel=parallel)
        return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)}


def train(epochs: int = 3, micro: int = 1, checkpoint: str | None = None) -> tuple[torch.nn.Module, MultiTaskOptimizer]:
    """Trains, from a checkpoint where there is one, and saves one at the end; steps of ``micro`` batches."""
    pl.seed_everything(0, verbose=False)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=epochs, logger=False,
        gradient_clip_val=1.0, accumulate_grad_batches=micro, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    resume = checkpoint if checkpoint and os.path.exists(checkpoint) else None
    trainer.fit(module := Module(), DataLoader(Points(), 16, shuffle=True), ckpt_path=resume)
    if checkpoint:
        trainer.save_checkpoint(checkpoint)
    return module.net, trainer.optimizers[0]


if __name__ == "__main__":
    model, opt = train(checkpoint=os.environ.get("CHECKPOINT"))
    print(opt.report)
