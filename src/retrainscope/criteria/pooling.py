"""Maps and sequences of a layer averaged to one vector a sample."""

from torch import Tensor, nn

__all__ = ["channel_axis", "pooled"]

# What tells how many channels a module puts out, and whether torch has them after the samples or last.
_CHANNELS = {
    "out_channels": 1,
    "num_channels": 1,
    "num_features": 1,
    "out_features": -1,
    "normalized_shape": -1,
    "embedding_dim": -1,
    "embed_dim": -1,
    "hidden_size": -1,
}


def channel_axis(model: nn.Module, layer: str, shape: tuple[int, ...]) -> int | None:
    """Tell along which axis of a layer's output its channels (features) lie; the others are places.

    Torch has channels after the samples in a convolutional network, last in a transformer, and some networks change
    between the two. So the last module in the layer (or before it) that has as many outputs as one of these axes is
    long decides; if both are, the kind of module does.

    Parameters
    ----------
    model : nn.Module
    layer : str
    shape : tuple of int
        Of the output, samples first.

    Returns
    -------
    int or None
        None if no module fits.
    """
    names, modules = zip(*model.named_modules(remove_duplicate=False), strict=True)
    end = max(i for i, name in enumerate(names) if name == layer or name.startswith(f"{layer}."))
    last = len(shape) - 1
    for module in reversed(modules[: end + 1]):
        for attribute, usual in _CHANNELS.items():
            n = getattr(module, attribute, None)
            n = n[-1] if isinstance(n, tuple) and n else n
            fitting = [axis for axis in (1, last) if isinstance(n, int) and shape[axis] == n]
            if fitting:
                return fitting[0] if len(fitting) == 1 else usual % len(shape)
    return None


def pooled(output: Tensor, axis: int) -> Tensor:
    """Average an output of shape (n_samples, ...) over all axes but the channels, to (n_samples, n_channels)."""
    return output.movedim(axis, 1).flatten(start_dim=2).mean(dim=2)
