"""How long the imports take, beyond what they import anyway."""

import statistics
import subprocess
import sys

__all__ = ["IMPORTS", "startup_seconds"]

IMPORTS = {
    "import gradwise after numpy and scikit-learn": ("import numpy, sklearn", "import gradwise"),
    "import gradwise.torch after torch": ("import torch", "import gradwise.torch"),
}


def startup_seconds(repeats: int) -> dict[str, list[float]]:
    """Seconds of each import, every time in a process of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(repeats):
        for name, (before, timed) in IMPORTS.items():
            code = f"import time\n{before}\nstart = time.perf_counter()\n{timed}\nprint(time.perf_counter() - start)"
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            seconds[name].append(float(run.stdout))
    return seconds


if __name__ == "__main__":
    for name, values in startup_seconds(5).items():
        print(f"{name}: {statistics.median(values):.3f} s")
