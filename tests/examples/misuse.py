"""What people will try with trainers first, and what they are told."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtl_optim import MultiTaskOptimizer, PCGrad
from mtl_optim.trainers import joint_loss


def told(attempts: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """The error of every attempt, "" where there is none."""
    found = {}
    for name, attempt in attempts.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                attempt()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def of_accelerate() -> dict[str, str]:
    return told({"summed": lambda: _accelerate(lambda opt, losses: sum(losses.values())),
                 "early": lambda: _accelerate(joint_loss)})  # fmt: skip


def of_lightning() -> dict[str, str]:
    return told({"summed": lambda: _lightning(lambda opt, losses: sum(losses.values())),
                 "dict": lambda: _lightning(lambda opt, losses: losses),
                 "plain": lambda: _lightning(joint_loss, wrapped=False),
                 "early": lambda: _lightning(joint_loss)})  # fmt: skip


def of_hf() -> dict[str, str]:
    return told({"summed": lambda: _hf(lambda opt, losses: sum(losses.values())),
                 "dict": lambda: _hf(lambda opt, losses: losses),
                 "plain": lambda: _hf(joint_loss, wrapped=False),
                 "early": lambda: _hf(joint_loss)})  # fmt: skip


def _optimizer(model: nn.Module, wrapped: bool = True) -> torch.optim.Optimizer:
    """One that knows nothing of ranks."""
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return MultiTaskOptimizer(plain, PCGrad()) if wrapped else plain


def _accelerate(loss: Callable[[Any, dict[str, Tensor]], Any]) -> None:
    from accelerate import Accelerator
    from problem import Net, Points

    accelerator, model = Accelerator(cpu=True), Net()
    model, optimizer, loader = accelerator.prepare(model, _optimizer(model), DataLoader(Points(), 64))
    for batch in loader:
        accelerator.backward(loss(optimizer, model(**batch)))
        optimizer.step()
        optimizer.zero_grad()


def _lightning(loss: Callable[[Any, dict[str, Tensor]], Any], wrapped: bool = True) -> None:
    import pytorch_lightning as pl
    from problem import Net, Points

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor], _: int) -> Any:
            return loss(self.optimizers(), self.net(**batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _optimizer(self, wrapped)

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=1,
                         enable_progress_bar=False, **quiet)  # fmt: skip
    trainer.fit(Module(), DataLoader(Points(), 64))


def _hf(loss: Callable[[Any, dict[str, Tensor]], Any], wrapped: bool = True) -> None:
    from problem import Net, Points
    from transformers import Trainer, TrainingArguments

    class Summing(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], **_: Any) -> Any:
            return loss(self.optimizer, model(**inputs))

    model = Net()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, num_train_epochs=1, per_device_train_batch_size=64, save_strategy="no",
            report_to=[], remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        Summing(model, arguments, train_dataset=Points(), optimizers=(_optimizer(model, wrapped), None)).train()
