"""The PyTorch side of gradwise; import it as `gradwise.torch`."""

from gradwise_torch._derivatives import jvp, teacher_jacobian, value_and_jacobian, vjp
from gradwise_torch._matching import GradientMatching
from gradwise_torch._population import PopulationGradient

__all__ = ["GradientMatching", "PopulationGradient", "jvp", "teacher_jacobian", "value_and_jacobian", "vjp"]

for _public in (GradientMatching, PopulationGradient, jvp, teacher_jacobian, value_and_jacobian, vjp):
    _public.__module__ = "gradwise.torch"  # where users find it: in reprs and pickles too
