"""The solvers, one file each: a public function and its definition in PyTorch.

A file in this folder is all that Python needs to know of a solver: what it lists in ``__all__`` is public here and in
`mtl_kernels`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

__all__: list[str] = []

for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    __all__ += _module.__all__
    globals().update({_name: getattr(_module, _name) for _name in _module.__all__})

if TYPE_CHECKING:  # what a loop finds, type checkers do not

    def __getattr__(name: str) -> Any: ...
