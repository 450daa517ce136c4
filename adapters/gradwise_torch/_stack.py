"""A model's members as what goes into one program: means, noise, and the names they have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradwise_torch._buffers import AVERAGED
from gradwise_torch._noise import StackedNoise
from gradwise_torch._perturbation import Perturbation

__all__ = ["Holder", "Members"]

COUNTED = (*AVERAGED, "num_batches_tracked")  # buffers that normalisation layers write to in a training-mode forward


class Holder(nn.Module):
    """Makes a loss function of a model a module, whose parameters can be exchanged for the whole of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``loss_fn(model, *args, **kwargs)``."""
        return loss_fn(self.model, *args, **kwargs)


@dataclass(frozen=True)
class Members:
    """A model's members as what goes into one program: means, noise, and the names they have in a `Holder`.

    Attributes
    ----------
    parameters : list of Tensor
        The model's trainable parameters, each once, those that are perturbed first.
    scales : list of Tensor
        For each that is perturbed, the standard deviations of the perturbation.
    noise : StackedNoise
        The unit noise of those, for all members.
    names : dict
        All the names of the parameters, so that nobody need look for tied ones, to their places.
    buffers : dict
        Those that normalisation layers in training mode write to, by name.
    """

    parameters: list[Tensor]
    scales: list[Tensor]
    noise: StackedNoise
    names: dict[str, int]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, of_model: Sequence[Tensor], perturbation: Perturbation, members: int) -> "Members":
        """The members of a model; memory is that of all of them."""
        moved, scales, noise = perturbation.stacked(members)
        ids = set(map(id, moved))
        parameters = [*moved, *(p for p in of_model if p.requires_grad and id(p) not in ids)]
        places = {id(parameter): place for place, parameter in enumerate(parameters)}
        names: dict[str, int] = {}
        buffers: dict[str, Tensor] = {}
        for prefix, module in model.named_modules(prefix="model"):
            for name, parameter in module._parameters.items():
                if id(parameter) in places:
                    names[f"{prefix}.{name}"] = places[id(parameter)]
            for name, buffer in module._buffers.items() if module.training else ():
                if buffer is not None and name in COUNTED:
                    buffers[f"{prefix}.{name}"] = buffer
        return cls(parameters, scales, noise, names, buffers)
