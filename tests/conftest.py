"""Settings for all tests: one torch thread (two cores, several workers), repeatable hypothesis examples."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
