"""The PyTorch side of gradwise; import it as `gradwise.torch`."""

from gradwise_torch._population import PopulationGradient

__all__ = ["PopulationGradient"]

for _public in (PopulationGradient,):
    _public.__module__ = "gradwise.torch"  # where users find it: in reprs and pickles too
