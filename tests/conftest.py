"""Settings for all tests: one thread each (two cores, several workers), repeatable hypothesis examples.

None of them changes what is computed; the processes that tests start have them too.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")  # `make unit` also runs the Keras tests on the others
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else TensorFlow reports on its start-up
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads, also numpy's, would wait for each other by spinning
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else torch starts processes, which import torch

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# Many tests compile the same programs; JAX can find them by what they are. A directory for this run alone, which the
# workers of xdist, started from here, share.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gradwise-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
