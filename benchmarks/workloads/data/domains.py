"""The same ten digits as four instruments would see them: tasks with batches of their own, and heads of one shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from .images import single_digits
from .splits import Part, Splits, split

DOMAINS = ("plain", "negative", "turned", "blurred")


def load(seed: int) -> Splits:
    """Inputs ``[N, 4, 64]``, one image a domain, of different handwritten digits; labels int64 ``[N]`` each."""
    single = single_digits(seed)
    number = len(single.images) // len(DOMAINS)
    images, labels = [], {}
    for k, domain in enumerate(DOMAINS):
        own = slice(k * number, (k + 1) * number)
        images.append(_seen(single.images[own], domain).flatten(1))
        labels[domain] = single.classes[own]
    return split(Part(torch.stack(images, 1), labels), seed, f"{single.source} in four domains")


def _seen(images: Tensor, domain: str) -> Tensor:
    """Images ``[N, 8, 8]`` in a domain."""
    if domain == "negative":
        return 1 - images
    if domain == "turned":
        return images.rot90(1, (1, 2))
    return avg_pool2d(pad(images, (1, 1, 1, 1)), 3, stride=1) if domain == "blurred" else images
