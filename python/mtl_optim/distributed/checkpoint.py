"""Checkpoints of sharded runs, which may be loaded on another number of ranks."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import Module

from ..optimizer import MultiTaskOptimizer


class TrainingState:
    """A model and its optimizer, with the state of the method, for `torch.distributed.checkpoint`.

    ::

        dcp.save({"training": TrainingState(model, opt)}, checkpoint_id=path)
        dcp.load({"training": TrainingState(model, opt)}, checkpoint_id=path)  # fills both

    States of parameters go by their names and are sharded as the parameters are at that moment. What the method keeps
    is the same on all ranks, and travels as bytes. `torch.distributed.checkpoint.load` reads parameters in place,
    before it looks at the rest: after an error, of a checkpoint of another method say, load the right one.

    Args:
        model: with `fully_shard`, DistributedDataParallel, or neither.
        optimizer: over its parameters. Learned parameters of a transform are in no model: pass
            ``TrainingState(nn.ModuleList([model, opt.transform]), opt)``.

    Raises:
        ValueError: the optimizer has parameters that the model does not hold.
    """

    def __init__(self, model: Module, optimizer: MultiTaskOptimizer) -> None:
        known = set(map(id, model.parameters()))
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if unknown := [list(param.shape) for param in params if id(param) not in known]:
            raise ValueError(
                f"TrainingState: the optimizer holds {len(unknown)} parameter(s) that the model does not, of shape "
                f"{', '.join(map(str, unknown[:3]))}; pass a module of all, such as "
                "nn.ModuleList([model, opt.transform]) where they are those of a transform"
            )
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """ "model", "optimizer" and "mtl"."""
        model, inner = get_state_dict(self.model, list(self.optimizer.optimizers))
        mtl = io.BytesIO()
        torch.save(self.optimizer.state_dict()["mtl"], mtl)
        return {"model": model, "optimizer": inner, "mtl": mtl.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; see `MultiTaskOptimizer.load_state_dict` for errors."""
        mtl = torch.load(io.BytesIO(state_dict["mtl"]), weights_only=True)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "mtl": mtl})
        set_state_dict(
            self.model,
            list(self.optimizer.optimizers),
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
