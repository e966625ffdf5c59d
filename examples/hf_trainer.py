"""Hugging Face Trainer: `python examples/hf_trainer.py`, or with `torchrun --standalone --nproc-per-node 2`.

Tested with transformers 5.24, accelerate 1.15 and torch 2.13 on 1 and 2 ranks. The Trainer builds its optimizer before
it wraps the model; `MultiTaskTrainer` wraps it first. Clipping, micro-batches and checkpoints are the Trainer's.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from problem import Net, Points
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mtl_optim import MultiTaskOptimizer, PCGrad
from mtl_optim.trainers import joint_loss


class MultiTaskTrainer(Trainer):
    """For models that return a dict of losses, each the mean over a batch."""

    loss_is_scaled_for_ga = False  # the Trainer divides by the number of micro-batches

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        losses = model(**inputs)
        loss = joint_loss(self.optimizer, losses)
        return (loss, losses) if return_outputs else loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.model_wrapped = self.accelerator.prepare(self.model)
            parallel = self.model_wrapped if isinstance(self.model_wrapped, DistributedDataParallel) else None
            self.optimizer = MultiTaskOptimizer(super().create_optimizer(model), PCGrad(), data_parallel=parallel)
        return self.optimizer


def train(epochs: int = 3, micro: int = 1, checkpoint: str | None = None) -> tuple[torch.nn.Module, MultiTaskOptimizer]:
    """Trains, from the last checkpoint in a folder if there is one, and saves more; steps of ``micro`` batches."""
    folder = checkpoint or tempfile.mkdtemp()
    arguments = TrainingArguments(
        folder, use_cpu=True, seed=0, num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=1e-2,
        gradient_accumulation_steps=micro, max_grad_norm=1.0, logging_steps=4, disable_tqdm=True, report_to=[],
        save_strategy="epoch" if checkpoint else "no", remove_unused_columns=False,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = MultiTaskTrainer(Net(), arguments, train_dataset=Points())
    found = get_last_checkpoint(checkpoint) if checkpoint and os.path.isdir(checkpoint) else None
    trainer.train(resume_from_checkpoint=found)
    return trainer.model, trainer.optimizer.optimizer


if __name__ == "__main__":
    model, opt = train(checkpoint=os.environ.get("CHECKPOINT"))
    print(opt.report)
