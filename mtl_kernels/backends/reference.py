"""The definitions behind the interface of a backend: any device, nothing compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import SolverCall
from ..definitions import elementwise, solving, sums
from .host import refuse_capture

_WITHOUT_FLOAT64 = ("mps",)


class ReferenceBackend:
    """Pure PyTorch; a solve on a GPU waits for it, and takes place on the host."""

    name = "reference"
    fused = False
    gram_into = staticmethod(sums.gram_into)
    combine_into = staticmethod(sums.combine_into)
    reduce_columns_into = staticmethod(elementwise.reduce_columns_into)
    update_state = staticmethod(elementwise.update_state)

    def missing(self) -> str | None:
        return None

    def refusal(self, device: torch.device) -> str | None:
        if device.type in _WITHOUT_FLOAT64:
            return f"it computes in float64, which {device.type} does not have; move them to the CPU with .cpu()"
        return None

    def automatic_on(self, device: torch.device) -> bool:
        return True

    def solve(self, call: SolverCall, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        if gram.is_meta:
            return gram.new_empty(gram.shape[:-1]), gram.new_empty((*gram.shape[:-2], 2))
        refuse_capture(gram.device, call.solver)
        return solving.solve(call, gram)
