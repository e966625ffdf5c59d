"""Trains a small network with an installed package, and fails where its losses do not fall."""

import torch

import mtl_optim

trunk, heads = torch.nn.Linear(16, 32), [torch.nn.Linear(32, 1) for _ in range(2)]
params = [p for module in (trunk, *heads) for p in module.parameters()]
opt = mtl_optim.MultiTaskOptimizer(torch.optim.Adam(params, lr=1e-2), mtl_optim.PCGrad())
x = torch.randn(64, 16)
history = []
for _ in range(50):
    z = trunk(x).relu()
    losses = [(head(z) - x[:, k : k + 1]).square().mean() for k, head in enumerate(heads)]
    opt.zero_grad()
    opt.backward(losses)
    opt.step()
    history.append([loss.item() for loss in losses])
print(opt.report)
print(f"losses {history[0]} -> {history[-1]}, of the package in {mtl_optim.__file__}")
if any(last > 0.5 * first for first, last in zip(history[0], history[-1], strict=True)):
    raise SystemExit("the losses did not fall")
