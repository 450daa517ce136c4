"""Settings for all tests: one torch thread (two cores, several workers), repeatable hypothesis examples."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # `make unit` also runs the Keras tests on the others
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else TensorFlow reports on its start-up

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
