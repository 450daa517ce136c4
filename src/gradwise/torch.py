"""gradwise for PyTorch: wrap an optimizer, or add a loss term."""

try:
    from gradwise_torch import (
        GradientMatching,
        PopulationGradient,
        jvp,
        teacher_jacobian,
        value_and_jacobian,
        vjp,
    )
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    msg = 'gradwise.torch needs PyTorch; install it with: pip install "gradwise[torch]"'
    raise ModuleNotFoundError(msg, name="torch") from error

__all__ = ["GradientMatching", "PopulationGradient", "jvp", "teacher_jacobian", "value_and_jacobian", "vjp"]
