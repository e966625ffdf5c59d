"""Networks with a shared trunk and K heads, each with a batch: what the passes of a step are measured on."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 10
LEARNED = 0.1
"""A mean loss at which many tasks conflict. Far below it gradients are differences of which rounding leaves little."""


class Shared(nn.Module):
    """A trunk and K linear heads with a cross entropy each. Parameters are in the order of the forward pass.

    Args:
        last: the module of the trunk that starts its last layers.
        width: of the features.

    Attributes:
        inputs: a batch. labels: ``[K, B]``, which the inputs determine.
    """

    inputs: Tensor
    labels: Tensor

    def __init__(self, num_tasks: int, trunk: nn.Module, last: nn.Module, width: int, inputs: Tensor) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(num_tasks))
        self.register_buffer("inputs", inputs)
        self.register_buffer("labels", _labels(inputs, num_tasks))
        self._last = next(name for name, module in trunk.named_modules() if module is last)

    @property
    def last_part(self) -> nn.Module:
        """The module that starts the last layers, as `gram_groups` takes it."""
        return self.trunk.get_submodule(self._last)

    def features(self) -> Tensor:
        """What the heads read."""
        found: Tensor = self.trunk(self.inputs)
        return found

    def losses(self, features: Tensor) -> list[Tensor]:
        return [nn.functional.cross_entropy(head(features), self.labels[k]) for k, head in enumerate(self.heads)]


def _labels(inputs: Tensor, num_tasks: int) -> Tensor:
    """Those of a random linear teacher for every task; what is not a number has a random vector."""
    generator = torch.Generator().manual_seed(1)
    if inputs.is_floating_point():
        seen = inputs.flatten(1)
    else:
        seen = torch.randn(int(inputs.max()) + 1, 32, generator=generator)[inputs].mean(1)
    teacher = torch.randn(seen.shape[1], num_tasks * CLASSES, generator=generator)
    return (seen @ teacher).view(len(seen), num_tasks, CLASSES).argmax(-1).T.contiguous()


def convolutional(num_tasks: int) -> Shared:
    """Two strided convolutions and two linear layers, 3.5 M parameters, 64 images of 28 x 28."""
    last = nn.Linear(64 * 49, 1024)
    convolutions = (nn.Conv2d(1, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten())
    trunk = nn.Sequential(*convolutions, last, nn.ReLU(), nn.Linear(1024, 256), nn.ReLU())
    return Shared(num_tasks, trunk, last, 256, torch.randn(64, 1, 28, 28))


def perceptron(num_tasks: int, batch: int) -> Shared:
    """Three linear layers, 2.4 M parameters."""
    last = nn.Linear(1024, 1024)
    trunk = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), last, nn.ReLU())
    return Shared(num_tasks, trunk, last, 1024, torch.randn(batch, 256))


class Positions(nn.Module):
    """Adds a learned vector for every position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.vectors


class Encoder(nn.Module):
    """Word embeddings, positions, transformer layers, and the mean over the positions."""

    def __init__(self, words: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = Positions(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, activation=nn.ReLU(), batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        x = self.positions(self.words(text))
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.norm(x).mean(1)
        return found


def encoder(num_tasks: int, batch: int, length: int) -> Shared:
    """Four transformer layers of width 256, 3.4 M parameters."""
    trunk = Encoder(1000, length, 256, 4)
    return Shared(num_tasks, trunk, trunk.layers[-1], 256, torch.randint(0, 1000, (batch, length)))


class Recommender(nn.Module):
    """A table of items, the ones of a user one beside the other, and three linear layers."""

    def __init__(self, items: int, per_user: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.layers = nn.Sequential(
            nn.Linear(per_user * width, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()
        )

    def forward(self, users: Tensor) -> Tensor:
        found: Tensor = self.layers(self.items(users).flatten(1))
        return found


def recommender(num_tasks: int) -> Shared:
    """100,000 items of width 32, 3.6 M parameters, 256 users with 16 items each."""
    trunk = Recommender(100_000, 16, 32)
    return Shared(num_tasks, trunk, trunk.layers, 128, torch.randint(0, 100_000, (256, 16)))


NETWORKS: dict[str, Callable[[int], Shared]] = {
    "convolutional": convolutional,
    "perceptron, 32": lambda num_tasks: perceptron(num_tasks, 32),
    "perceptron, 256": lambda num_tasks: perceptron(num_tasks, 256),
    "encoder, 16 x 64": lambda num_tasks: encoder(num_tasks, 16, 64),
    "encoder, 8 x 16": lambda num_tasks: encoder(num_tasks, 8, 16),
    "recommender": recommender,
}
"""By name, with the batch where there are several."""


def build(name: str, num_tasks: int) -> Shared:
    """A network, the same at every call."""
    torch.manual_seed(num_tasks)
    return NETWORKS[name](num_tasks)


def train(network: Shared, most_steps: int) -> None:
    """Plain steps until the tasks no longer agree, but not until little is left to learn."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(most_steps):
        optimizer.zero_grad()
        loss = torch.stack(network.losses(network.features())).mean()
        if float(loss.detach()) < LEARNED:
            break
        (loss * len(network.heads)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()


def exact_copy(network: Shared) -> Shared:
    """In float64, where a ReLU passes what it passes in the network.

    Rounding lets some differ that are next to zero, and then a gradient differs by far more than rounding.
    """
    exact = copy.deepcopy(network).double()
    with contextlib.ExitStack() as hooks:
        for own, other in zip(exact.modules(), network.modules(), strict=True):
            if isinstance(own, nn.ReLU) and isinstance(other, nn.ReLU):
                passed: list[Tensor] = []
                hook = functools.partial(_remember, passed)
                hooks.callback(other.register_forward_hook(hook).remove)
                own.register_forward_hook(functools.partial(_pass, passed))
        with torch.no_grad():
            network.features()
    return exact


def _remember(passed: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    passed.append(output > 0)


def _pass(passed: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return inputs[0] * passed[0]
