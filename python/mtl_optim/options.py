"""What a `MultiTaskOptimizer` is built of, and the checks of it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from .capture import CAPTURES
from .losses import LossCombination, SumOfTerms
from .methods import Method, available
from .methods.base import check_choice
from .methods.rows import RowMethod

OWNER = "MultiTaskOptimizer"


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """The options of `MultiTaskOptimizer`, where they are described.

    Attributes:
        fixed_tasks: the names of ``tasks``; None if they are free.

    Raises:
        TypeError, ValueError: an option of another type, or an unknown one.
    """

    method: Method
    head_scaling: str = "none"
    granularity: str = "model"
    capture: str = "harvest"
    passes: str = "auto"
    refresh_every: int | None = None
    outside: str = "sum"
    share_every: int | None = None
    transform: Callable[[Any], Any] | None = None
    fixed_tasks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.method, LossCombination):
            raise TypeError(
                f"{OWNER}: {type(self.method).__name__} combines losses, not gradients; pass it as transform= in front "
                "of a method such as Sum(), or call backward() on its value and step the optimizer itself"
            )
        if not isinstance(self.method, Method):
            raise TypeError(
                f"{OWNER}: expected an instance of a method such as PCGrad(), found {self.method!r}; known methods: "
                f"{', '.join(available())}"
            )
        check_choice(OWNER, "head_scaling", self.head_scaling, ("none", "weights"))
        check_choice(OWNER, "granularity", self.granularity, ("model", "group", "parameter"))
        check_choice(OWNER, "capture", self.capture, tuple(CAPTURES))
        check_choice(OWNER, "passes", self.passes, ("auto", "loop", "batched"))
        if self.capture == "factored":
            _check_factored(self.method)
        elif self.passes != "auto":
            raise ValueError(
                f'{OWNER}: passes={self.passes!r} is for capture="factored", found capture={self.capture!r}; leave it '
                'at "auto"'
            )
        check_choice(OWNER, "outside", self.outside, ("sum", "keep"))
        _check_transform(self.transform)
        if self.share_every is not None:
            _check_period("share_every", self.share_every)
        every = self.every
        _check_period("refresh_every", every)
        if every > 1 and self.granularity != "model":
            raise ValueError(
                f"{OWNER}: refresh_every={every} reuses one weight per loss, which granularity={self.granularity!r} "
                'does not have; use granularity="model" or refresh_every=1'
            )
        if every > 1 and self.method.num_batches > 1:
            raise ValueError(
                f"{OWNER}: refresh_every={every} is for steps of one batch between those that compute weights, and "
                f"{type(self.method).__name__} takes {self.method.num_batches} in every step; use refresh_every=1"
            )
        if not self.method.weighs_rows and (every > 1 or self.head_scaling == "weights"):
            found, default = (f"refresh_every={every}", 1) if every > 1 else ('head_scaling="weights"', '"none"')
            raise ValueError(
                f"{OWNER}: {found} multiplies losses or gradients by the weights of the rows of a step, of which the "
                f"combination of {type(self.method).__name__} does not consist; leave it at {default}"
            )

    @property
    def every(self) -> int:
        """``refresh_every``, or the method's own."""
        return self.method.refresh_every if self.refresh_every is None else self.refresh_every

    def __repr__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if f.name != "fixed_tasks"]
        return ", ".join([repr(self.method), *shown[1:]])


def wrapped_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    """The optimizers to wrap, checked.

    Raises:
        TypeError, ValueError, RuntimeError: not optimizers, the same parameter in two of them, or param groups of which
            `check_param_groups` raises.
    """
    found = (optimizer,) if not isinstance(optimizer, (list, tuple)) else tuple(optimizer)
    if not found:
        raise ValueError(f"{OWNER}: expected at least one optimizer, found an empty list")
    owners: dict[int, int] = {}
    for n, one in enumerate(found):
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"{OWNER}: expected a torch.optim.Optimizer or a list of them, found {one!r}; build the optimizer first"
            )
        if not hasattr(one, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"{OWNER}: expected a torch.optim.Optimizer, found {type(one).__name__}, which stands in for one; wrap "
                "the optimizer itself, then hand the MultiTaskOptimizer to the trainer (accelerator.prepare)"
            )
        for group in one.param_groups:
            for param in group["params"]:
                if owners.setdefault(id(param), n) != n:
                    raise ValueError(
                        f"{OWNER}: optimizers {owners[id(param)]} and {n} share a parameter of shape "
                        f"{list(param.shape)}, which both would step; leave it to one of them"
                    )
    check_param_groups(group for one in found for group in one.param_groups)
    return found


def check_param_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise for a param group whose ``mtl`` is not a bool."""
    for g, group in enumerate(groups):
        mtl = group.get("mtl", True)
        if not isinstance(mtl, bool):
            raise TypeError(f"param group {g} has mtl={mtl!r}; expected True (combined) or False (plain sum)")


def _check_factored(method: Method) -> None:
    name = type(method).__name__
    if not method.weighs_rows or isinstance(method, RowMethod):
        raise ValueError(
            f'{OWNER}: capture="factored" holds rows as coordinates, with the lengths and angles of the gradients '
            f'but not their elements, and {name} combines elements; use capture="harvest"'
        )
    if method.num_batches > 1:
        raise ValueError(
            f'{OWNER}: capture="factored" is for steps of one batch, whose inputs all rows share, and {name} takes '
            f'{method.num_batches}; use capture="harvest"'
        )


def _check_period(option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{OWNER}: expected {option} as an integer, found {value!r}")
    if value < 1:
        raise ValueError(f"{OWNER}: expected {option} >= 1, found {value}")


def _check_transform(transform: object) -> None:
    if transform is None:
        return
    if isinstance(transform, type) or not callable(transform):
        raise TypeError(
            f"{OWNER}: expected transform as an instance of a combination of mtl_optim.losses, such as LogSum(), or a "
            f"function from the losses to as many losses, found {transform!r}"
        )
    if isinstance(transform, LossCombination) and not isinstance(transform, SumOfTerms):
        raise TypeError(f"{OWNER}: {transform.coupling()}")


def check_saved(saved: Any, version: int, options: Options, transform: Mapping[str, Any] | None) -> None:
    """Raise ValueError unless the ``"mtl"`` entry of a state dict fits; warn about options that differ.

    Args:
        transform: what the entry would say of the transform now.
    """
    if not isinstance(saved, dict) or saved.get("version") != version:
        raise ValueError('the "mtl" entry of this state dict is of an unknown version; update mtl-kernels')
    method = options.method
    if saved["method"] != type(method).__name__:
        raise ValueError(
            f"this state dict was saved with {saved['method']}, this optimizer uses {type(method).__name__}; "
            'build it with the same method, or drop the "mtl" entry to load the optimizer\'s part alone'
        )
    if options.fixed_tasks is not None and list(saved["tasks"]) != list(options.fixed_tasks):
        raise ValueError(
            f"this state dict has the tasks {saved['tasks']}, this optimizer {list(options.fixed_tasks)}; build it "
            "with the same tasks in the same order"
        )
    types = [None if one is None else one["type"] for one in (saved.get("transform"), transform)]
    if types[0] != types[1]:
        raise ValueError(
            f"this state dict was saved with transform {types[0]}, this optimizer uses {types[1]}; build it with the "
            'same transform, or drop the "mtl" entry to load the optimizer\'s part alone'
        )
    if saved["config"] != method.config():
        warnings.warn(
            f"this state dict was saved with {saved['method']} options {saved['config']}; going on with "
            f"{method.config()}",
            UserWarning,
            stacklevel=3,
        )
