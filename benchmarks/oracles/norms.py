"""What goes by the norms of gradients, in whole training steps whose gradients are known: the losses are linear."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mtl_optim import MultiTaskOptimizer, ReNorm, Sum
from mtl_optim.losses import GradNorm

from . import agrees
from .draw import draw_rows


@agrees("renorm", oracle="rows of a step, rescaled one by one", tolerance=1e-12)
def renorm(generator: np.random.Generator) -> float:
    """How far the gradients of the shared parameters are apart, relative to the lengths of the rescaled rows.

    The loss of task k is g_k . shared + f_k . head_k, so that its gradients are g_k and f_k.
    """
    rows = draw_rows(generator, min_tasks=2)
    heads = [
        generator.standard_normal(size) * 10.0 ** generator.integers(-6, 7) for size in generator.integers(1, 9, 8)
    ]
    shared = nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    own = [nn.Parameter(torch.zeros(len(head), dtype=torch.float64)) for head in heads]
    opt = MultiTaskOptimizer(torch.optim.SGD([shared, *own], lr=1.0), ReNorm())
    terms = zip(rows, heads, own, strict=False)
    opt.backward([torch.from_numpy(g) @ shared + torch.from_numpy(f) @ head for g, f, head in terms])
    expected, scale = np.zeros(rows.shape[1]), 0.0
    for g, f in zip(rows, heads, strict=False):
        length = np.linalg.norm(g)
        factor = np.linalg.norm(f) / length if length > 0 else 0.0
        expected += factor * g
        scale += factor * length
    found = shared.grad.numpy() if shared.grad is not None else np.zeros_like(expected)
    off = float(np.linalg.norm(found - expected))
    return off / scale if scale > 0 else off


@agrees("gradnorm", oracle="Algorithm 1 on the unweighted gradients", tolerance=1e-10)
def gradnorm(generator: np.random.Generator) -> float:
    """How far the weights are apart after some steps in front of a sum, relative to their mean, which is 1.

    Steps in which a weight comes near the kink of its objective end a case: there the two may go different ways.
    """
    num_tasks, size = int(generator.integers(2, 9)), int(generator.integers(1, 12))
    alpha, lr = float(generator.uniform(0, 2)), 10.0 ** generator.uniform(-3, -1)
    module = GradNorm(num_tasks, alpha=alpha, lr=lr).double()
    shared = nn.Parameter(torch.ones(size, dtype=torch.float64))
    opt = MultiTaskOptimizer(torch.optim.SGD([shared], lr=0.0), Sum(), transform=module)
    w, initial, off = np.ones(num_tasks), None, 0.0
    for _ in range(int(generator.integers(1, 6))):
        rows = generator.standard_normal((num_tasks, size)) * 10.0 ** generator.uniform(-2, 2, (num_tasks, 1))
        values = generator.lognormal(0, 1, num_tasks)
        constants = values - rows.sum(axis=1)
        opt.zero_grad()
        opt.backward([torch.from_numpy(g) @ shared + c for g, c in zip(rows, constants, strict=True)])
        norms = np.linalg.norm(rows, axis=1)
        initial = values if initial is None else initial
        ratio = values / initial
        distance = w * norms - np.mean(w * norms) * (ratio / ratio.mean()) ** alpha
        if np.abs(distance).min() < 1e-9 * np.abs(w * norms).max():
            break
        w = np.maximum(w - lr * np.sign(distance) * norms, 1e-3)
        w *= num_tasks / w.sum()
        off = max(off, float(np.abs(module.w.numpy() - w).max()))
    return off
