"""Models whose autograd graphs are easy to get wrong: how a weight is used, and how the losses share what is below."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from mtl_optim.capture.compiled import keep_buffers

TASKS, BATCH, WIDTH = 4, 8, 64

Losses = Callable[[Tensor], list[Tensor]]
"""From inputs ``[BATCH, WIDTH]`` to the losses."""

GRAPHS: dict[str, tuple[Callable[[nn.Module], Losses], int | None]] = {}
"""By name, what adds parameters to a module and returns its losses, and how many weights are factored: -1 where rows
are whole because parameters are hidden, None where that depends on the build of torch."""


def graph(factored: int | None) -> Callable[[Callable[[nn.Module], Losses]], None]:
    """Adds a graph to the list."""

    def add(build: Callable[[nn.Module], Losses]) -> None:
        GRAPHS[build.__name__] = build, factored

    return add


def heads(model: nn.Module, width: int = WIDTH) -> Losses:
    """A linear head and a cross entropy per task."""
    model.heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(TASKS))
    targets = torch.randint(0, 3, (TASKS, BATCH))

    def losses(z: Tensor) -> list[Tensor]:
        return [cross_entropy(head(z), target) for head, target in zip(model.heads, targets, strict=True)]

    return losses


def perceptron(model: nn.Module, *between: nn.Module) -> nn.Module:
    model.trunk = nn.Sequential(nn.Linear(WIDTH, 80), *(between or (nn.ReLU(),)), nn.Linear(80, WIDTH))
    return model.trunk


@graph(2)
def plain(model: nn.Module) -> Losses:
    trunk, end = perceptron(model), heads(model)
    return lambda x: end(trunk(x))


@graph(1)
def no_heads(model: nn.Module) -> Losses:
    model.layer = nn.Linear(WIDTH, TASKS * 8)
    return lambda x: [part.square().mean() for part in model.layer(x).tanh().chunk(TASKS, 1)]


@graph(1)
def one_loss_vector(model: nn.Module) -> Losses:
    model.layer = nn.Linear(WIDTH, WIDTH)
    end = heads(model)
    return lambda x: list(torch.stack(end(model.layer(x).relu())).unbind())


@graph(1)
def tied(model: nn.Module) -> Losses:
    model.layer = nn.Linear(128, 128)
    end = heads(model, 128)
    return lambda x: end(model.layer(model.layer(model.layer(x.repeat(1, 2)).relu()).relu()).relu())


@graph(0)
def as_such_and_transposed(model: nn.Module) -> Losses:
    model.layer = nn.Linear(WIDTH, WIDTH)
    end = heads(model)
    return lambda x: end((model.layer(x).relu() @ model.layer.weight).relu())


@graph(4)
def ways_to_multiply(model: nn.Module) -> Losses:
    """W times inputs, inputs times W, W' as a permutation and as a transposition."""
    model.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 6 for _ in range(4))
    end = heads(model)

    def losses(x: Tensor) -> list[Tensor]:
        a, b, c, d = model.weights
        z = (a @ x.T).T.tanh() @ b
        return end(torch.addmm(z, z.tanh(), c.T).tanh() @ d.mT)

    return losses


@graph(1)
def scaled_product(model: nn.Module) -> Losses:
    """``alpha`` other than 1, which is not for factors."""
    model.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 6 for _ in range(2))
    end = heads(model)
    return lambda x: end(torch.addmm(x, (x @ model.weights[0]).tanh(), model.weights[1], alpha=0.5))


@graph(2)
def batch_norm(model: nn.Module) -> Losses:
    trunk, end = perceptron(model, nn.BatchNorm1d(80), nn.ReLU()), heads(model)
    return lambda x: end(trunk(x))


@graph(2)
def dropout(model: nn.Module) -> Losses:
    trunk, end = perceptron(model, nn.ReLU(), nn.Dropout(0.5)), heads(model)
    return lambda x: end(trunk(x))


@graph(2)
def in_place(model: nn.Module) -> Losses:
    trunk, end = perceptron(model, nn.ReLU(inplace=True)), heads(model)
    return lambda x: end(trunk(x).relu_())


@graph(2)
def equal_and_zero_inputs(model: nn.Module) -> Losses:
    """Inputs of rank 4, and units that no input reaches."""
    trunk, end = perceptron(model), heads(model)
    rows = torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1]).unsqueeze(1)
    return lambda x: end(trunk(x[[0, 0, 0, 1, 2, 2, 3, 4]] * rows))


@graph(1)
def checkpointed(model: nn.Module) -> Losses:
    trunk, end = perceptron(model), heads(model)
    return lambda x: end(checkpoint(trunk, x, use_reentrant=False))


@graph(2)
def partly_checkpointed(model: nn.Module) -> Losses:
    model.last = nn.Linear(WIDTH, WIDTH)
    trunk, end = perceptron(model, nn.ReLU(), nn.Dropout(0.3)), heads(model)
    return lambda x: end(model.last(checkpoint(trunk, x, use_reentrant=False)))


@graph(-1)
def checkpointed_reentrantly(model: nn.Module) -> Losses:
    trunk, end = perceptron(model), heads(model)
    return lambda x: end(checkpoint(trunk, x.clone().requires_grad_(), use_reentrant=True))


@graph(2)
def convolutions(model: nn.Module) -> Losses:
    model.trunk = nn.Sequential(
        nn.Conv2d(4, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()
    )
    model.last = nn.Linear(384, WIDTH)
    end = heads(model)
    return lambda x: end(model.last(model.trunk(x.reshape(BATCH, 4, 4, 4))))


@graph(1)
def channels_last(model: nn.Module) -> Losses:
    model.trunk = nn.Conv2d(WIDTH, 128, 3, padding=1).to(memory_format=torch.channels_last)
    end = heads(model, 128)
    images = torch.randn(BATCH, WIDTH, 2, 2)
    return lambda x: end(model.trunk(images.to(x) * x[:, :, None, None]).relu().mean((2, 3)))


@graph(1)
def convolution_of_sequences(model: nn.Module) -> Losses:
    model.trunk = nn.Sequential(nn.Conv1d(32, 128, 3, stride=2, dilation=2, padding=2), nn.ReLU())
    model.grouped = nn.Conv1d(128, WIDTH, 1, groups=4)
    end = heads(model)
    signal = torch.randn(BATCH, 32, 4)
    return lambda x: end(model.grouped(model.trunk(signal.to(x) * x[:, :32, None])).mean(2))


@graph(1)
def three_dims(model: nn.Module) -> Losses:
    model.layer = nn.Linear(WIDTH, WIDTH, bias=False)
    end = heads(model)
    return lambda x: end(model.layer(x.reshape(BATCH // 4, 4, WIDTH)).tanh().reshape(BATCH, -1))


@graph(2)
def experts(model: nn.Module) -> Losses:
    """Weights ``[E, d_in, d_out]``."""
    model.first = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 6)
    model.second = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 6)
    model.bias = nn.Parameter(torch.zeros(3, 1, WIDTH))
    end = heads(model)

    def losses(x: Tensor) -> list[Tensor]:
        z = torch.bmm(x.expand(3, BATCH, WIDTH), model.first).relu()
        return end(torch.baddbmm(model.bias, z, model.second.mT).sum(0))

    return losses


@graph(2)
def recurrent(model: nn.Module) -> Losses:
    """A cell that three steps use."""
    model.cell = nn.LSTMCell(128, 128)
    end = heads(model, 128)
    steps = torch.randn(3, BATCH, 128)

    def losses(x: Tensor) -> list[Tensor]:
        state = None
        for step in steps.to(x) * x.mean(1, keepdim=True):
            state = model.cell(step, state)
        return end(state[0])

    return losses


@graph(None)
def recurrent_layer(model: nn.Module) -> Losses:
    """One operator, or steps of another size for inputs than for the state."""
    model.layer = nn.LSTM(24, WIDTH)
    end = heads(model)
    steps = torch.randn(3, BATCH, 24)
    return lambda x: end(model.layer(steps.to(x) * x.mean(1, keepdim=True))[0][-1])


@graph(4)
def attention(model: nn.Module) -> Losses:
    model.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
    end = heads(model)

    def losses(x: Tensor) -> list[Tensor]:
        q, k, v = (part(x.reshape(2, 4, WIDTH)).reshape(2, 4, 2, WIDTH // 2) for part in model.parts[:3])
        found = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return end(model.parts[3](found.transpose(1, 2).reshape(BATCH, WIDTH)))

    return losses


@graph(4)
def encoder_layer(model: nn.Module) -> Losses:
    model.layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True)
    end = heads(model)
    return lambda x: end(model.layer(x.reshape(2, 4, WIDTH)).reshape(BATCH, WIDTH))


@graph(2)
def skips(model: nn.Module) -> Losses:
    """Each task reads another depth, so that some frontiers lie below others."""
    model.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    model.heads = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(TASKS))
    targets = torch.randint(0, 3, (TASKS, BATCH))

    def losses(x: Tensor) -> list[Tensor]:
        a, b, c = model.parts
        first = a(x).relu()
        second = b(first).relu()
        third = c(second) + first
        read = (first, second, third, second + third)
        return [cross_entropy(head(z), y) for head, z, y in zip(model.heads, read, targets, strict=True)]

    return losses


@graph(1)
def partly_shared(model: nn.Module) -> Losses:
    model.first, model.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    end = heads(model)

    def losses(x: Tensor) -> list[Tensor]:
        near = model.first(x).relu()
        return [*end(near)[:2], *end(model.second(near).relu())[2:]]

    return losses


@graph(1)
def losses_of_losses(model: nn.Module) -> Losses:
    model.layer = nn.Linear(WIDTH, WIDTH)
    end = heads(model)

    def losses(x: Tensor) -> list[Tensor]:
        a, b, c, d = end(model.layer(x).relu())
        return [a, b, a + b, 2 * c + d]

    return losses


@graph(1)
def decay_in_a_loss(model: nn.Module) -> Losses:
    trunk, end = perceptron(model), heads(model)
    return lambda x: [loss + 0.1 * trunk[0].weight.square().sum() for loss in end(trunk(x))]


@graph(0)
def spectral_norm(model: nn.Module) -> Losses:
    model.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)).eval()
    end = heads(model)
    return lambda x: end(model.layer(x).relu())


@graph(0)
def own_inputs(model: nn.Module) -> Losses:
    """A pass through the trunk for every task."""
    trunk, end = perceptron(model), heads(model)
    return lambda x: [end(trunk(x * (k + 1)))[k] for k in range(TASKS)]


@graph(1)
def own_inputs_at_the_end(model: nn.Module) -> Losses:
    model.first, model.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    end = heads(model)

    def losses(x: Tensor) -> list[Tensor]:
        z = model.first(x).relu()
        return [end(model.second(z * (k + 1)).relu())[k] for k in range(TASKS)]

    return losses


@graph(1)
def embeddings(model: nn.Module) -> Losses:
    model.table = nn.Embedding(200, WIDTH, padding_idx=0)
    end = heads(model)
    index = torch.randint(0, 20, (BATCH, 6))
    return lambda x: end((model.table(index).mean(1) * x).tanh())


@graph(1)
def embeddings_read_twice(model: nn.Module) -> Losses:
    model.table = nn.Parameter(torch.randn(200, WIDTH))
    end = heads(model)
    first, second = torch.randint(0, 30, (BATCH, 4)), torch.randint(20, 60, (BATCH,))

    def losses(x: Tensor) -> list[Tensor]:
        counted = embedding(first, model.table, scale_grad_by_freq=True).mean(1)
        return end((counted * x).tanh() + embedding(second, model.table))

    return losses


@graph(0)
def embeddings_tied_to_the_output(model: nn.Module) -> Losses:
    model.table = nn.Embedding(50, WIDTH)
    end = heads(model, 50)
    index = torch.randint(0, 50, (BATCH, 2))
    return lambda x: end(linear((model.table(index).mean(1) * x).tanh(), model.table.weight))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


@graph(1)
def custom_function(model: nn.Module) -> Losses:
    model.layer = nn.Linear(WIDTH, WIDTH)
    end = heads(model)
    return lambda x: end(Cube.apply(model.layer(x)))


@graph(2)
def module_hook(model: nn.Module) -> Losses:
    trunk, end = perceptron(model), heads(model)
    trunk[0].register_full_backward_hook(lambda *_: None)
    return lambda x: end(trunk(x))


@graph(1)
def parameter_hooks(model: nn.Module) -> Losses:
    trunk, end = perceptron(model), heads(model)
    trunk[0].weight.register_hook(lambda grad: 2 * grad)
    return lambda x: end(trunk(x))


@graph(1)
def frozen_parts(model: nn.Module) -> Losses:
    trunk, end = perceptron(model), heads(model)
    trunk[0].requires_grad_(False)
    trunk[2].bias.requires_grad_(False)
    return lambda x: end(trunk(x))


@graph(1)
def compiled(model: nn.Module) -> Losses:
    trunk, end = perceptron(model), heads(model)
    model.last = nn.Linear(WIDTH, WIDTH)
    keep_buffers()  # before the optimizer that reads the graph is built
    fast = torch.compile(trunk, backend="aot_eager")
    return lambda x: end(model.last(fast(x)).relu())


@graph(2)
def halved_by_hand(model: nn.Module) -> Losses:
    """Weights cast outside autocast, as a copy of them in another dtype."""
    trunk, end = perceptron(model), heads(model)

    def losses(x: Tensor) -> list[Tensor]:
        z = linear(x.bfloat16(), trunk[0].weight.bfloat16()).relu()
        return end(linear(z, trunk[2].weight.bfloat16()).to(x))

    return losses


@functools.cache
def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], list[Tensor]]]:
    """A model of the list and what runs it, the same for every dtype."""
    torch.manual_seed(0)
    model = nn.Module()
    losses = GRAPHS[name][0](model)
    model.to(dtype)
    x = torch.randn(BATCH, WIDTH).to(dtype)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        return losses(x)

    return model, run
