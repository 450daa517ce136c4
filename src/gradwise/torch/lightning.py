"""gradwise for Lightning: a callback for the Trainer."""

try:
    from gradwise_torch._lightning import PopulationCallback
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    msg = 'gradwise.torch.lightning needs Lightning; install it with: pip install "gradwise[lightning]"'
    raise ModuleNotFoundError(msg, name="lightning") from error

__all__ = ["PopulationCallback"]

PopulationCallback.__module__ = __name__  # where users find it: in reprs and pickles too
