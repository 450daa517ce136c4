"""The PyTorch side of gradwise; import it as `gradwise.torch`."""
