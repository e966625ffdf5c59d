"""The part of an optimizer wrapper that has nothing to do with several losses."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class OptimizerWrapper(Optimizer):
    """A `torch.optim.Optimizer` whose param groups, state, defaults and step hooks are those of another one.

    Args:
        optimizer: the wrapped one; every change made through either shows in both.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ would build param groups of its own.
        self.optimizer = optimizer
        self._share()

    def _share(self) -> None:
        self._optimizer_step_pre_hooks = self.optimizer._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = self.optimizer._optimizer_step_post_hooks
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property  # type: ignore[override]
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property  # type: ignore[override]
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Runs ``hook(self, args, kwargs)`` before the wrapped optimizer steps, after the combination."""
        return self.optimizer.register_step_pre_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Runs ``hook(self, args, kwargs)`` after the wrapped optimizer has stepped."""
        return self.optimizer.register_step_post_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def _patch_step_function(self) -> None:
        # The wrapped optimizer's step already runs the hooks and the profiler mark: once is enough.
        self._zero_grad_profile_name = "Optimizer.zero_grad#MultiTaskOptimizer.zero_grad"
