"""Distributed checkpoints of sharded models: more cases for torch_shard_cells.py, with the checkpoint's folder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch_shard_cells import Sharded, batch, gradients, moved, mse, weights

from gradwise.torch import PopulationGradient

HALF, ALL, GROUPS = 5, 10, 4


def setting(here: Sharded, seed: int, noise_seed: int) -> tuple[Any, PopulationGradient, Any]:
    """Two groups, the second without weight decay; a learning-rate schedule; a sigma schedule."""
    model = here.net(seed)
    first, *others = model.parameters()
    inner = torch.optim.AdamW([{"params": [first]}, {"params": others, "weight_decay": 0.0}], lr=0.02)
    optimizer = PopulationGradient(inner, model, sigma=lambda step: 0.2 + 0.01 * step, seed=noise_seed)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def rows(here: Sharded, step: int) -> tuple[Tensor, Tensor]:
    """The same rows in all, whatever the number of processes: four groups of them, one or more for each process."""
    own = range(here.rank * GROUPS // here.world, (here.rank + 1) * GROUPS // here.world)
    x, y = zip(*(batch(step, group) for group in own), strict=True)
    return torch.cat(x), torch.cat(y)


def train(here: Any, model: nn.Module, optimizer: PopulationGradient, schedule: Any, steps: range) -> None:
    for step in steps:
        x, y = rows(here, step)
        mse(model(x), y).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def save(here: Any, folder: str) -> dict[str, Any]:
    """Train, save between a forward and its backward, train on; then resume in the same processes."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_all

    model, optimizer, schedule = setting(here, seed=0, noise_seed=5)
    train(here, model, optimizer, schedule, range(HALF))
    mean = weights(model)
    model(rows(here, HALF)[0])
    member_in_place = not any(map(torch.equal, [m for m in moved(optimizer) if m.ndim > 1], mean[::2]))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save_all({"model": model_state, "optimizer": optimizer_state, "schedule": schedule}, checkpoint_id=folder)
    train(here, model, optimizer, schedule, range(HALF, ALL))
    resumed = load(here, folder)
    return {
        "member_in_place": member_in_place,
        "mean": mean,
        "weights": weights(model),
        "moments": moments(optimizer),
        "resumed": resumed,
        "untouched": fresh(here),
    }


def load(here: Any, folder: str) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_all

    model, optimizer, schedule = setting(here, seed=1, noise_seed=99)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    load_all({"model": model_state, "optimizer": optimizer_state, "schedule": schedule}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    loaded = weights(model)
    train(here, model, optimizer, schedule, range(HALF, ALL))
    return {"loaded": loaded, "weights": weights(model), "moments": moments(optimizer)}


def moments(optimizer: PopulationGradient) -> list[Tensor]:
    """The inner optimizer's."""
    state = optimizer.inner_optimizer.state
    for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
        parameter.grad = state[parameter]["exp_avg_sq"]
    return gradients(optimizer)


def fresh(here: Any) -> dict[str, list[Tensor]]:
    """Asking for a state before the first step, which makes one of an optimizer without state, changes no member."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    result: dict[str, list[Tensor]] = {}
    for name in ("asked", "not asked"):
        model = here.net()
        optimizer = PopulationGradient(torch.optim.SGD(model.parameters(), lr=0.1), model, sigma=0.2, seed=5)
        if name == "asked":
            get_state_dict(model, optimizer)
        train(here, model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), range(3))
        result[name] = weights(model)
    return result
