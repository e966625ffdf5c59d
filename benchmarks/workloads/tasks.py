"""What a task is: a loss to train on, and a metric on held-out data with the direction in which it is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Kind(NamedTuple):
    """How outputs of a kind are compared with labels.

    Attributes:
        metric: the name of the score. higher: whether more of it is better.
        loss, score: of outputs and labels, scalars.
    """

    metric: str
    higher: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


class Task(NamedTuple):
    """One of the things that a network learns: its name, the kind of `KINDS`, and how many numbers it puts out."""

    name: str
    kind: str
    outputs: int = 1

    @property
    def metric(self) -> str:
        return KINDS[self.kind].metric

    @property
    def higher(self) -> bool:
        """Whether more of the metric is better."""
        return KINDS[self.kind].higher

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return KINDS[self.kind].loss(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> float:
        return float(KINDS[self.kind].score(outputs, labels))


def _classes_score(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(1) == labels).double().mean()


def _binary_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs.squeeze(1), labels)


def _binary_score(outputs: Tensor, labels: Tensor) -> Tensor:
    return ((outputs.squeeze(1) > 0) == (labels > 0.5)).double().mean()


def _value_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.mse_loss(outputs.squeeze(1), labels)


def _value_score(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.squeeze(1) - labels).double().square().mean().sqrt()


def _segments_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, ignore_index=-1)


def _segments_score(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean over the classes that are there of intersection over union."""
    known = labels >= 0
    classes = outputs.shape[1]
    pairs = torch.bincount((labels[known] * classes + outputs.argmax(1)[known]), minlength=classes**2)
    table = pairs.view(classes, classes).double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return (table.diagonal() / union.clamp(min=1))[table.sum(1) > 0].mean()


def _depth_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    known = labels > 0
    return ((outputs - labels).abs() * known).sum() / known.sum().clamp(min=1)


def _normals_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    known = labels.square().sum(1) > 0
    cosines = functional.cosine_similarity(outputs, labels, dim=1)
    return ((1 - cosines) * known).sum() / known.sum().clamp(min=1)


def _normals_score(outputs: Tensor, labels: Tensor) -> Tensor:
    known = labels.square().sum(1) > 0
    cosines = functional.cosine_similarity(outputs, labels, dim=1)[known].double()
    return torch.rad2deg(torch.acos(cosines.clamp(-1, 1))).mean()


KINDS = {
    "classes": Kind("accuracy", True, functional.cross_entropy, _classes_score),
    "binary": Kind("accuracy", True, _binary_loss, _binary_score),
    "value": Kind("RMSE", False, _value_loss, _value_score),
    "segments": Kind("mean IoU", True, _segments_loss, _segments_score),
    "depth": Kind("mean absolute error", False, _depth_loss, _depth_loss),
    "normals": Kind("mean angle", False, _normals_loss, _normals_score),
}
"""Labels ``[N]``: int64, float of 0 or 1, float.

By pixel int64 ``[N, H, W]``, float ``[N, 1, H, W]``, ``[N, C, H, W]``.
"""
