"""gradwise for Hugging Face Transformers: a mixin for its Trainer."""

try:
    from gradwise_torch._transformers import PopulationTrainerMixin
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    msg = 'gradwise.torch.transformers needs transformers; install it with: pip install "gradwise[transformers]"'
    raise ModuleNotFoundError(msg, name="transformers") from error

__all__ = ["PopulationTrainerMixin"]

PopulationTrainerMixin.__module__ = __name__  # where users find it: in reprs and pickles too
