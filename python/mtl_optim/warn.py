"""Warnings that point at the line of the user's code that led to them."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_INNER = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, torch.__file__))


def warn_user(text: str) -> None:
    """Warns with a UserWarning at the nearest caller outside this package and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)
