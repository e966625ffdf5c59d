"""torch.compile: backward passes that leave what they need for the next one."""

from __future__ import annotations

from typing import Any

import torch

_TAG = "mtl_optim keeps buffers"

OVERWRITES = (
    "a torch.compile graph takes one backward pass, and several losses over one graph need more: it was compiled to "
    "overwrite what it has saved (donated buffers). Build MultiTaskOptimizer before the first backward pass of the "
    "model, in the same thread; or call torch.compiler.reset() once after it was built, and run the forward pass again"
)
"""What to do about a graph that was compiled for one backward pass."""


def keep_buffers() -> None:
    """Makes torch.compile fit graphs for several backward passes from now on.

    Several losses over one graph retain it, and by default a compiled backward pass overwrites what was saved for it.
    Changed are, for the process (for the thread, where torch's configuration is one of threads):

    - ``torch._functorch.config.donated_buffer`` is off, which costs compiled backward passes some memory;
    - ``torch.compiler.config.cache_key_tag`` is longer: the key under which torch caches a kernel does not tell whether
      it overwrites, so that one from an earlier run would go on doing so;
    - graphs compiled before that overwrite go on raising in a retained pass: torch's own check goes by the
      configuration of the moment.
    """
    from torch._functorch import config
    from torch.compiler import config as compiler

    if config.donated_buffer:
        for function in torch.autograd.Function.__subclasses__():
            if function.__name__ == "CompiledFunction" and function.__module__.startswith("torch._functorch."):
                _refuse_retaining(function)
        config.donated_buffer = False
    if _TAG not in compiler.cache_key_tag:
        compiler.cache_key_tag = f"{compiler.cache_key_tag} {_TAG}".strip()


def _refuse_retaining(function: Any) -> None:
    """Makes the backward pass of a compiled graph raise where it would overwrite what another pass needs."""
    run = function._backward_impl

    def checked(ctx: Any, args: list[Any]) -> Any:
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        # What was not compiled before is compiled in the pass, which then does not overwrite.
        if retained and function.compiled_bw is not None and function.metadata.bw_donated_idxs:
            raise RuntimeError(OVERWRITES)
        return run(ctx, args)

    function._backward_impl = staticmethod(checked)
