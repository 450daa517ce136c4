"""Unit noise as tensors: the core's own streams on CPU, the device's generator elsewhere."""

import torch
from torch import Tensor

from gradwise._population import Population

__all__ = ["unit_noise"]


def unit_noise(
    population: Population, like: Tensor, *, step: int, member: int, tensor: int, rank: int, paired: bool
) -> Tensor:
    """Unit noise with the shape and device of `like`, in float64 for float64 and in float32 for everything narrower.

    Half precision gets float32 noise so that the perturbed weight is rounded once, after the sum.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if like.device.type == "cpu":
        # Not torch's CPU generator: its Mersenne Twister keeps 32 bits of a seed, so keys would collide.
        noise = population.unit_noise(
            tuple(like.shape),
            step=step,
            member=member,
            tensor=tensor,
            rank=rank,
            paired=paired,
            dtype="float64" if dtype == torch.float64 else "float32",
        )
        return torch.from_numpy(noise)
    stream, sign = population.stream_of(member, paired=paired)
    generator = torch.Generator(device=like.device)
    generator.manual_seed(population.device_seed(step=step, stream=stream, tensor=tensor, rank=rank))
    if population.noise == "rademacher":
        noise = torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(dtype).mul_(2).sub_(1)
    else:
        noise = torch.randn(like.shape, generator=generator, device=like.device, dtype=dtype)
    return noise if sign > 0 else noise.neg_()
