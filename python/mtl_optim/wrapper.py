"""The part of an optimizer wrapper that has nothing to do with several losses."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_AMP_ATTRIBUTES = ("grad_scale", "found_inf")


class JoinedState(MutableMapping[Any, Any]):
    """The states of several optimizers as one mapping; what is set goes to the optimizer that holds the parameter."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, key: Any) -> Any:
        for optimizer in self._optimizers:
            if key in optimizer.state or any(key is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        return self._optimizers[0].state

    def __getitem__(self, key: Any) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._of(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(optimizer.state for optimizer in self._optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


class OptimizerWrapper(Optimizer):
    """A `torch.optim.Optimizer` whose param groups, state, defaults and step hooks are those of others.

    Args:
        optimizers: the wrapped ones, which step one after the other; every change made through either shows in both.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Optimizer.__init__ would build param groups of its own.
        self.optimizers = tuple(optimizers)
        self._share()

    def _share(self) -> None:
        self._optimizer_step_pre_hooks = self.optimizers[0]._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = self.optimizers[-1]._optimizer_step_post_hooks
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer, where it is one."""
        if len(self.optimizers) != 1:
            raise AttributeError(f"{len(self.optimizers)} optimizers are wrapped; they are in .optimizers")
        return self.optimizers[0]

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizers' param groups, one list after the other."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].param_groups
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        given = iter(value)
        for optimizer in self.optimizers[:-1]:
            optimizer.param_groups = list(itertools.islice(given, len(optimizer.param_groups)))
        self.optimizers[-1].param_groups = value if len(self.optimizers) == 1 else list(given)

    @property  # type: ignore[override]
    def state(self) -> Any:
        """The wrapped optimizers' state."""
        return self.optimizers[0].state if len(self.optimizers) == 1 else JoinedState(self.optimizers)

    @state.setter
    def state(self, value: Any) -> None:
        if len(self.optimizers) == 1:
            self.optimizers[0].state = value
        else:
            JoinedState(self.optimizers).update(value)

    @property  # type: ignore[override]
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizers' defaults: of several, what all of them have, with the values of the first."""
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        if not others:
            return first
        return {key: value for key, value in first.items() if all(key in defaults for defaults in others)}

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            optimizer.defaults = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.optimizers)

    def _step_wrapped(self, closure: Callable[[], Any] | None) -> Any:
        """Steps the wrapped optimizers, the first with the closure; what it returns."""
        forwarded = {name: self.__dict__[name] for name in _AMP_ATTRIBUTES if name in self.__dict__}
        result = None
        for n, optimizer in enumerate(self.optimizers):
            for name, value in forwarded.items():
                setattr(optimizer, name, value)
            try:
                found = optimizer.step() if closure is None or n > 0 else optimizer.step(closure)
            finally:
                for name in forwarded:
                    delattr(optimizer, name)
            result = found if n == 0 else result
        return result

    def _state_dict_wrapped(self) -> dict[str, Any]:
        """The wrapped optimizers' state dicts as one, as if all param groups were of one optimizer."""
        joined: dict[str, Any] = {"state": {}, "param_groups": []}
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            if len(self.optimizers) == 1:
                return own
            first = sum(len(group["params"]) for group in joined["param_groups"])
            joined["state"] |= {first + p: state for p, state in own["state"].items()}
            for group in own["param_groups"]:
                joined["param_groups"].append(group | {"params": [first + p for p in group["params"]]})
        return joined

    def _load_state_dict_wrapped(self, state_dict: dict[str, Any]) -> None:
        """Loads what `_state_dict_wrapped` returned; a group that says nothing of ``mtl`` leaves ours as it is."""
        before = [group.get("mtl") for group in self.param_groups]
        self._load_each(state_dict)
        for group, mtl in zip(self.param_groups, before, strict=True):
            if mtl is not None:
                group.setdefault("mtl", mtl)

    def _load_each(self, state_dict: dict[str, Any]) -> None:
        if len(self.optimizers) == 1:
            self.optimizers[0].load_state_dict(state_dict)
            return
        expected = [len(optimizer.param_groups) for optimizer in self.optimizers]
        groups = list(state_dict["param_groups"])
        if len(groups) != sum(expected):
            raise ValueError(f"this state dict has {len(groups)} param groups, the optimizers have {expected}")
        before = [optimizer.state_dict() for optimizer in self.optimizers]
        given, first = iter(groups), 0
        try:
            for optimizer, count in zip(self.optimizers, expected, strict=True):
                own = list(itertools.islice(given, count))
                size = sum(len(group["params"]) for group in own)
                state = {p - first: s for p, s in state_dict["state"].items() if first <= p < first + size}
                own = [group | {"params": [p - first for p in group["params"]]} for group in own]
                optimizer.load_state_dict({"state": state, "param_groups": own})
                first += size
        except BaseException:
            for optimizer, kept in zip(self.optimizers, before, strict=True):
                optimizer.load_state_dict(kept)
            raise

    def train(self, mode: bool = True) -> None:
        """Calls ``train()`` or ``eval()`` of the wrapped optimizers that have it (schedule-free ones do)."""
        for optimizer in self.optimizers:
            if callable(switch := getattr(optimizer, "train" if mode else "eval", None)):
                switch()

    def eval(self) -> None:
        """``train(False)``."""
        self.train(False)

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Runs ``hook(self, args, kwargs)`` before the wrapped optimizers step, after the combination."""
        return self.optimizers[0].register_step_pre_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Runs ``hook(self, args, kwargs)`` after the wrapped optimizers have stepped."""
        return self.optimizers[-1].register_step_post_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def _patch_step_function(self) -> None:
        # The wrapped optimizer's step already runs the hooks and the profiler mark: once is enough.
        self._zero_grad_profile_name = "Optimizer.zero_grad#MultiTaskOptimizer.zero_grad"
