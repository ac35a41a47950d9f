"""What decoders see of networks: the outputs of layers on a batch, and what stands for its input."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from retrainscope.batches import Batch
from retrainscope.exceptions import InvalidDataError
from retrainscope.padding import layer_mask, tokens_second
from retrainscope.precision import doubled
from retrainscope.reference import reference_inputs
from retrainscope.tracing import run_layers

__all__ = ["Observer", "Seen"]


@dataclass(frozen=True)
class Seen:
    """What a decoder sees or rebuilds.

    Attributes
    ----------
    values : Tensor of shape (n_samples, ...)
        With tokens (n_samples, n_tokens, n_features), and zero in the place of padding.
    real : Tensor of bool of shape (n_samples, n_tokens), or None
        Which tokens are no padding; None where there are no tokens, or nothing is said of padding.
    """

    values: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, output: Tensor, axis: int | None, mask: Tensor | None) -> "Seen":
        """Take an output, with its tokens along some axis."""
        if axis is None or mask is None:
            return cls(output, None)
        tokens = tokens_second(output, axis)
        real = layer_mask(mask, tokens.shape[1])
        return cls(torch.where(real[..., None], tokens, 0), real)

    @property
    def counted(self) -> Tensor:
        """All values that count, as if of one sample where there is padding."""
        return self.values if self.real is None else self.values[self.real][None]

    def error_of(self, rebuilt: Tensor) -> Tensor:
        """Return the squared error of each sample, summed; of tokens the mean of those that are real."""
        squares = doubled(rebuilt - self.values.float()).square()
        if self.real is None:
            return squares.flatten(1).sum(dim=1)
        return torch.where(self.real, squares.sum(dim=2), 0).sum(dim=1) / self.real.sum(dim=1)


@dataclass(frozen=True)
class Observer:
    """Runs networks and sorts their outputs.

    Attributes
    ----------
    layers : tuple of str
    input_layer : str or None
    calls : str or None
    token_axes : mapping of str to int
    one_length : (str, int), optional
        A layer whose decoder needs one number of tokens, and that number.
    """

    layers: tuple[str, ...]
    input_layer: str | None
    calls: str | None
    token_axes: Mapping[str, int]
    one_length: tuple[str, int] | None = None

    def run(
        self,
        networks: Mapping[str, nn.Module],
        batch: Batch,
        visit: Callable[[str, int, Seen], None],
        wanted: Sequence[tuple[str, int]] | None = None,
    ) -> Seen:
        """Run every network once, visit the outputs, and return what is to be rebuilt.

        Parameters
        ----------
        networks : mapping of str to nn.Module
            By kind.
        batch : Batch
        visit : callable (kind, place among the layers, Seen) -> None
        wanted : sequence of (kind, place), optional
            Which outputs to visit; networks of which none is wanted are not run. None: all.
        """
        mask = batch.mask
        if self.one_length is not None and mask is not None and mask.shape[1] != self.one_length[1]:
            layer, n_tokens = self.one_length
            raise InvalidDataError(
                f"The samples are padded to {n_tokens} tokens in one batch and to {mask.shape[1]} in another, but the "
                f"layer {layer!r} has not a token for each of the input, so its decoder needs one length. Pad "
                "all samples to the same length (padding='max_length'), or leave the layer out of layers=."
            )
        targets: list[Seen] = []
        for kind, network in networks.items():
            places = {
                name: place for place, name in enumerate(self.layers) if wanted is None or (kind, place) in wanted
            }

            def sort(name: str, output: Tensor, kind: str = kind, places: dict[str, int] = places) -> None:
                seen = Seen.of(output, self.token_axes.get(name), mask)
                if name in places:
                    visit(kind, places[name], seen)
                if name == self.input_layer and not targets:
                    targets.append(replace(seen, values=seen.values.clone()))

            names = [*places] if self.input_layer is None or targets else [self.input_layer, *places]
            if names:
                with torch.no_grad():
                    run_layers(network, batch.inputs, names, sort, calls=self.calls, token_axes=self.token_axes)
        return targets[0] if targets else Seen.of(reference_inputs(batch.inputs), self.token_axes.get(""), mask)
