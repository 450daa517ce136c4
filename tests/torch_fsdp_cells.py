"""Models and loops that run twice: whole in one process (the oracle), and sharded by FSDP2 over several.

``python torch_fsdp_cells.py FOLDER RANK WORLD CASE...`` runs cases in one process of several.
"""

import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchrun_cells import leave

from gradwise.torch import GradientMatching, PopulationGradient, jvp, teacher_jacobian, value_and_jacobian, vjp

ROWS = 8
mse = nn.functional.mse_loss


class Whole:
    """One process with all rows and the plain model."""

    rank, world = 0, 1

    def shard(self, model: nn.Module, **options: Any) -> nn.Module:
        del options
        return model

    def own(self, *tensors: Tensor) -> list[Tensor]:
        """The rows of this process."""
        return list(tensors)

    def put(self, *tensors: Tensor) -> list[Tensor]:
        """All rows, where this process computes."""
        return list(tensors)

    def call(self, model: nn.Module, setter: str, *args: bool) -> None:
        """Call a setter of FSDP2."""


class Sharded(Whole):
    """One process of several with its rows and its shards: every block by itself, and the rest at the root."""

    def __init__(self, rank: int, world: int, mesh: Any) -> None:
        self.rank, self.world, self.mesh = rank, world, mesh

    def shard(self, model: nn.Module, **options: Any) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        model.to(self.mesh.device_type)
        for block in model.children():
            if isinstance(block, nn.Sequential | nn.TransformerEncoderLayer):
                fully_shard(block, mesh=self.mesh, **options)
        fully_shard(model, mesh=self.mesh, **options)
        return model

    def own(self, *tensors: Tensor) -> list[Tensor]:
        share = ROWS // self.world
        return self.put(*[tensor[self.rank * share : (self.rank + 1) * share] for tensor in tensors])

    def put(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.mesh.device_type) for tensor in tensors]

    def call(self, model: Any, setter: str, *args: bool) -> None:
        getattr(model, setter)(*args)


def mlp(*norms: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *[norm(4) for norm in norms], nn.Linear(4, 4)) for _ in range(2)
    ]
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *blocks, nn.Linear(4, 2)).double()


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y, target = (
        torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64) for shape in [(3,), (2,), (2, 3)]
    )
    target[0] = torch.nan  # processes have unequal numbers of known entries
    target[5, 1, 2] = torch.nan
    return x, y, target


def whole_tensor(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    # Where one process has no gradient at all, several may have zeros.
    return {
        name: torch.zeros(parameter.shape, dtype=parameter.dtype)
        if parameter.grad is None
        else whole_tensor(parameter.grad)
        for name, parameter in model.named_parameters()
    }


def fitted(**options: Any) -> GradientMatching:
    return GradientMatching(**options).fit(*data())


def training(run: Whole) -> dict[str, Tensor]:
    """Three steps of Adam, the second without derivatives; every step must see the weights of the last."""
    model = run.shard(mlp(nn.LayerNorm))
    matching = fitted(interval=2, loss="huber")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y, target = run.own(*data())
    for _ in range(3):
        prediction, loss = matching.with_values(model, x, target)
        (mse(prediction, y) + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole_tensor(parameter) for name, parameter in model.named_parameters()}


def derivatives_only(run: Whole) -> dict[str, Tensor]:
    model = run.shard(mlp())
    x, _, target = run.own(*data())
    fitted()(model, x, target).backward()
    return gradients(model)


def linear(run: Whole) -> dict[str, Tensor]:
    """The loss does not reach the outputs of the model, where FSDP2 has its hooks."""
    torch.manual_seed(0)
    model = run.shard(nn.Linear(3, 2, dtype=torch.float64))
    x, _, target = run.own(*data())
    fitted()(model, x, target).backward()
    return gradients(model)


def precision(run: Whole) -> dict[str, Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    model = run.shard(mlp(), mp_policy=policy)
    x, y, target = run.own(*data())
    prediction, loss = fitted().with_values(model, x, target)
    (mse(prediction, y) + loss).backward()
    return gradients(model)


def accumulation(run: Whole) -> dict[str, Tensor]:
    """Gradients of the first micro-batch wait, unreduced, while derivatives of the second are taken."""
    model = run.shard(mlp())
    matching = fitted()
    for last in (False, True):
        run.call(model, "set_requires_gradient_sync", last)
        run.call(model, "set_is_last_backward", last)
        x, y, target = run.own(*data())
        before = flags(model)
        prediction, loss = matching.with_values(model, x + last, target)
        assert flags(model) == before
        # Taking derivatives has reduced nothing that waits.
        assert run.world == 1 or all(parameter.grad is None for parameter in model.parameters())
        (mse(prediction, y) + loss).backward()
    return gradients(model)


def flags(model: nn.Module) -> list[Any]:
    modules: list[Any] = list(model.modules())
    groups = [m._get_fsdp_state()._fsdp_param_group for m in modules if hasattr(m, "_get_fsdp_state")]
    return [(g.reduce_grads, g.all_reduce_grads, g.reshard_after_backward) for g in groups]


def kept_gathered(run: Whole) -> dict[str, Tensor]:
    """The user keeps parameters gathered between micro-batches."""
    model = run.shard(mlp(), reshard_after_forward=False)
    losses = {}
    for last in (False, True):
        run.call(model, "set_reshard_after_backward", last)
        losses[f"loss {last}"] = derivative_loss(run, model)
    return losses | gradients(model)


def derivative_loss(run: Whole, model: nn.Module) -> Tensor:
    x, _, target = run.own(*data())
    loss = fitted()(model, x, target)
    loss.backward()
    return summed(run, loss.detach())


def summed(run: Whole, tensor: Tensor) -> Tensor:
    """The mean over processes of something that each has averaged over its rows."""
    if run.world > 1:
        torch.distributed.all_reduce(tensor)
        tensor /= run.world
    return tensor


def outputs(run: Whole) -> dict[str, Tensor]:
    """Energies and forces, from a function of outputs, with values of their own."""
    model = run.shard(mlp(nn.LayerNorm))
    x, y, target = run.own(*data())
    positions = x.clone().requires_grad_()
    prediction = model(positions)
    energy = prediction.square().sum()
    loss = GradientMatching(scale="none").from_outputs(energy, wrt=positions, target=target[:, 0], sign=-1)
    (mse(prediction, y) + loss).backward()
    assert positions.grad is not None
    return gradients(model) | {"function": function(run)}


def function(run: Whole) -> Tensor:
    model = run.shard(mlp())
    x, _, target = run.own(*data())
    fitted()(lambda x: model(x) ** 2, x, target).backward()
    return torch.cat([gradient.flatten() for gradient in gradients(model).values()])


def thread(run: Whole) -> dict[str, Tensor]:
    """Another thread takes the derivatives, as on a GPU: the engine then prefers the graph of the forward pass."""
    model = run.shard(mlp())
    x, y, target = run.own(*data())
    leaf = x.clone().requires_grad_()
    prediction = model(leaf)
    losses: list[Tensor] = []
    matching = fitted()
    worker = threading.Thread(target=lambda: losses.append(matching.from_outputs(prediction, wrt=leaf, target=target)))
    worker.start()
    worker.join()
    (mse(prediction, y) + losses[0]).backward()
    return gradients(model)


def between(run: Whole) -> dict[str, Tensor]:
    """Other forward passes, with and without gradients, between a loss and its backward pass."""
    model = run.shard(mlp())
    x, y, target = run.own(*data())
    matching = fitted()
    early = model(x + 1)
    loss = matching(model, x, target)
    with torch.no_grad():
        model(x)
        matching(model, x, target)
    (mse(model(x), y) + mse(early, y) + loss).backward()
    return gradients(model)


def second_order(run: Whole) -> dict[str, Tensor]:
    model = run.shard(mlp(nn.LayerNorm))
    x, y, target = run.own(*data())
    tangents = torch.stack([x.cos(), x.sin()], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = GradientMatching(scale="none"), GradientMatching(0.1, scale="none")
        prediction, loss = first.with_values(model, x, tangents=x.cos(), target_jvp=y)
        curvature = second(model, x, tangents=tangents, target_hvp=target[:, :, None] * tangents[:, None])
    (mse(prediction, y) + loss + curvature).backward()
    return gradients(model)


def second_order_thread(run: Whole) -> dict[str, Tensor]:
    model = run.shard(mlp())
    x, y, target = run.own(*data())
    leaf = x.clone().requires_grad_()
    prediction = model(leaf)
    losses: list[Tensor] = []
    matching = GradientMatching(scale="none")
    worker = threading.Thread(
        target=lambda: losses.append(matching.from_outputs(prediction, wrt=leaf, tangents=x.cos(), target_hvp=target))
    )
    worker.start()
    worker.join()
    (mse(prediction, y) + 100 * losses[0]).backward()
    return gradients(model)


def attention(run: Whole) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), layer, nn.Flatten(), nn.Linear(12, 2)).double()
    model = run.shard(model)
    x, y, target = run.own(*data())
    prediction, loss = fitted().with_values(model, x, target)
    (mse(prediction, y) + loss).backward()
    return gradients(model)


def batch_norm(run: Whole) -> dict[str, Tensor]:
    """Two forward passes, one for the values, one with running statistics for the derivatives."""
    model = run.shard(mlp(nn.BatchNorm1d))
    x, y, target = run.put(
        *[tensor[: ROWS // 2] for tensor in data()]
    )  # everywhere, so that all have the same statistics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prediction, loss = fitted().with_values(model, x, target)
    (mse(prediction, y) + loss).backward()
    return gradients(model)


def derivatives(run: Whole) -> dict[str, Tensor]:
    """Trained through what `value_and_jacobian`, `vjp` and `jvp` return."""
    model = run.shard(mlp())
    x, y, _ = run.own(*data())
    prediction, jacobian = value_and_jacobian(model, x)
    _, product = vjp(model, x, y)
    _, forward = jvp(model, x, x.cos())
    (prediction + forward + product.sum(1, keepdim=True) + jacobian.sum(2)).square().mean().backward()
    return gradients(model)


def evaluation(run: Whole) -> dict[str, Tensor]:
    """Derivatives without gradients, before and after a step that no backward pass precedes."""
    model = run.shard(mlp())
    matching = fitted()
    x, _, target = run.put(*data())
    results = {}
    for step in range(2):
        with torch.no_grad():
            results[f"loss {step}"] = matching(model, x, target)
            results[f"jacobian {step}"] = value_and_jacobian(model, x)[1]
        results[f"teacher {step}"] = teacher_jacobian(model, x)
        matching(model, x, target)  # a training call that nobody differentiates
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
    return results


def population(run: Whole) -> dict[str, Tensor]:
    """Both ideas: the members are those of one process, and derivatives are taken at the member's weights."""
    model = run.shard(mlp())
    matching = fitted()
    inner = torch.optim.Adam(model.parameters(), lr=0.05)
    optimizer = PopulationGradient(inner, model, population_size=2, sigma=0.3, seed=5)
    x, y, target = run.own(*data())

    def closure() -> Tensor:
        optimizer.zero_grad()
        prediction, loss = matching.with_values(model, x, target)
        loss = mse(prediction, y) + loss
        loss.backward()
        return loss

    for _ in range(2):
        closure()
        optimizer.step()
        optimizer.step(closure)
    return {name: whole_tensor(parameter) for name, parameter in model.named_parameters()}


def flattened(run: Whole) -> dict[str, Tensor]:
    """FSDP1 is refused, also where it shards nothing and would be wrong silently."""
    if run.world == 1:
        return {"refused": torch.tensor(4)}
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    refused = 0
    x, _, target = run.own(*data())
    leaf = x.clone().requires_grad_()
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(
                mlp(), sharding_strategy=strategy, use_orig_params=True, device_id=torch.device("cpu")
            )
        for attempt in (
            lambda model=model: fitted()(model, x, target),
            lambda model=model: fitted().from_outputs(model(leaf), wrt=leaf, target=target),
        ):
            try:
                attempt()
            except TypeError as error:
                refused += "fully_shard" in str(error)
    return {"refused": torch.tensor(refused)}


CASES: dict[str, Callable[[Whole], dict[str, Tensor]]] = {
    case.__name__: case
    for case in (
        *(training, derivatives_only, linear, precision, accumulation, kept_gathered, outputs, thread, between),
        *(second_order, second_order_thread, attention, batch_norm, derivatives, evaluation, population, flattened),
    )
}


def main(folder: str, rank: int, world: int, names: list[str]) -> None:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    device, backend = ("cuda", "nccl") if folder.endswith("cuda") else ("cpu", "gloo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name in names:
        case, _, kind = name.partition("-")
        shape = (2, world // 2) if kind == "hsdp" else (world,)
        # Not the default mesh, which would be that of a GPU if there is one.
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        results = CASES[case](Sharded(rank, world, mesh))
        if rank == 0:
            torch.save({key: value.cpu() for key, value in results.items()}, f"{folder}/{name}.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
