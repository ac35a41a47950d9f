"""Rebuild the inputs of a network from its activations: `invert_layers`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from retrainscope.batches import Batch, Batches, as_batches
from retrainscope.checks import check_device
from retrainscope.descent import Descent, NoGradientError
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.features import Features, features_up_to, keeping_padding, real_inputs, token_axes_of, true_inputs
from retrainscope.lending import autograd_on, borrow, gradients_in_evaluation, model_place, random_from, seed_of
from retrainscope.memory import Halving
from retrainscope.padding import broad_mask, joined_tokens
from retrainscope.processes import in_turns
from retrainscope.progress import progress_bar
from retrainscope.rebuilding import InputSpace, Inversion, invert
from retrainscope.tracing import check_calls, gradient_break, named_layers, run_layers

__all__ = ["invert_batches", "invert_each", "invert_layers"]

T = TypeVar("T")


def invert_layers(
    model: nn.Module,
    X: Any,
    layers: Iterable[str],
    *,
    descent: Descent | None = None,
    low: float | None = None,
    high: float | None = None,
    input_layer: str | None = None,
    calls: str | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    random_state: int | np.random.RandomState | None = None,
    progress: bool | None = None,
) -> dict[str, Inversion]:
    """Rebuild inputs from the activations of several layers, all samples of a batch at once.

    Parameters
    ----------
    model : nn.Module
        It is only borrowed; it is run up to the layer, no further.
    X : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        The true inputs: they give the activations, the range, and the errors.
    layers : iterable of str
    descent : Descent, optional
        How to search; None: L-BFGS, 100 passes, no priors.
    low, high : float, optional
        The range of the input; None: the lowest and the highest value of X.
    input_layer : str, optional
        The module whose output is rebuilt instead of the model's input.
    calls : {"first", "last", "sum"}, optional
        What counts of a layer that runs several times; see `find_layers`.
    batch_size : int
        Samples inverted at once. It does not change the result.
    device : device, optional
        Where to compute; None: where the model lies.
    random_state : int, RandomState or None
        For the starts and the jitter.
    progress : bool or None
        None shows a bar on a terminal only.

    Returns
    -------
    dict of str to Inversion
        By layer; samples in the order of X.

    Raises
    ------
    InvalidDataError, LayerNotFoundError
        Before any work, where data, range or layers do not fit.
    UnsupportedModelError
        If no gradient flows from a layer to the input, with the module where it ends.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    >>> X = torch.rand(5, 4)
    >>> found = rs.invert_layers(model, X, ["0", "2"], low=0, high=1, random_state=0)
    >>> bool(found["2"].input_error.max() < 0.001)
    True
    """
    check_calls(calls)
    descent = Descent() if descent is None else descent
    seed = seed_of(random_state)
    home, dtype = model_place(model)
    place = home if device is None else check_device(device)
    names = [layers] if isinstance(layers, str) else list(dict.fromkeys(layers))
    named_layers(model, names if input_layer is None else [*names, input_layer])
    batches = as_batches(X, name="given", batch_size=batch_size, device=place, dtype=dtype, seed=seed % 2**32)
    with (
        autograd_on(follow_autocast=False),
        borrow(model, device=device, seed=seed) as lent,
        gradients_in_evaluation(lent),
    ):
        token_axes = token_axes_of(lent, batches.few(), names, input_layer, calls)
        axis = token_axes.get(input_layer or "")
        space = InputSpace.of(
            real_inputs(true_inputs(lent, batch.inputs, input_layer, calls, token_axes), batch, axis)
            for batch in batches
        )
        low, high = space.low if low is None else float(low), space.high if high is None else float(high)
        if not low < high:
            raise InvalidDataError(f"The range of the input must have low < high. Got {low:g} and {high:g}.")
        space = InputSpace(low, high, space.mean, space.std, space.variance)
        return invert_batches(
            lent,
            batches,
            names,
            space=space,
            descent=descent,
            seed=seed,
            input_layer=input_layer,
            calls=calls,
            token_axes=token_axes,
            progress=progress,
        )


def invert_batches(
    network: nn.Module, batches: Iterable[Batch] | Batches, layers: Sequence[str], **options: Any
) -> dict[str, Inversion]:
    """Invert every batch at every layer; parameters as in `invert_each`."""
    parts: dict[str, list[Inversion]] = {layer: [] for layer in layers}
    for _, layer, found in invert_each(network, batches, layers, take=lambda inversion: inversion, **options):
        parts[layer].append(found)
    return {layer: _joined(found) for layer, found in parts.items()}


def invert_each(
    network: nn.Module,
    batches: Iterable[Batch] | Batches,
    layers: Sequence[str],
    *,
    take: Callable[[Inversion], T],
    space: InputSpace,
    descent: Descent,
    seed: int,
    input_layer: str | None,
    calls: str | None,
    token_axes: Mapping[str, int],
    progress: bool | None,
    what: str = "inverting",
    halving: Halving | None = None,
    done: Callable[[int, str], bool] = lambda *_: False,
    shared: bool = False,
) -> Iterator[tuple[int, str, T]]:
    """Invert with a borrowed network; yield what is taken of each batch, by its number, and layer.

    Parameters as in `invert_layers`; `take` tells what is wanted of an inversion, and `done` of the number of a batch
    and a layer whether to leave them out. If `shared`, the processes take batches and layers in turn.
    """
    for parameter in network.parameters():  # so that nothing is kept for gradients that nobody wants
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    halving = Halving() if halving is None else halving
    n_batches = batches.n_batches if isinstance(batches, Batches) else len(list(batches))
    steps = descent.max_iter * descent.n_init
    total = None if n_batches is None else n_batches * len(layers) * steps
    with progress_bar(what=what, progress=progress, total=total) as bar:

        def report(n_steps: int, losses: Tensor) -> None:
            bar.update(n_steps)
            if not bar.disable:
                bar.set_postfix(error=f"{float(losses.nanmean()):.2g}", refresh=False)

        def check(batch: Batch) -> None:
            with torch.no_grad():
                # All are finite, and all run.
                run_layers(network, batch.inputs, layers, lambda *_: None, calls=calls, token_axes=token_axes)

        def left() -> Iterator[tuple[int, str, Batch]]:
            for number, batch in enumerate(batches):
                names = [layer for layer in layers if not done(number, layer)]
                if names:
                    for _ in halving.run(batch, check):
                        pass
                yield from ((number, layer, batch) for layer in names)

        def inverted(batch: Batch, layer: str) -> Inversion:
            true = true_inputs(network, batch.inputs, input_layer, calls, token_axes)
            axis, mask = token_axes.get(input_layer or ""), batch.mask
            real = None if axis is None or mask is None else broad_mask(true, axis, mask)
            features_of = features_up_to(
                network, batch.inputs, layer, input_layer, calls=calls, axis=token_axes.get(layer)
            )
            if real is not None:
                features_of = keeping_padding(features_of, true, real)
            starts = (
                space.start(true.shape[1:], batch.positions, seed, restart).to(true.device)
                for restart in range(descent.n_init)
            )
            try:
                with random_from(seed):  # so that nothing depends on what was inverted before, or on the process
                    return invert(
                        features_of, true, starts, space=space, descent=descent, seed=seed, real=real, report=report
                    )
            except NoGradientError as error:
                raise _refusal(network, layer, features_of, true) from error

        def work(one: tuple[int, str, Batch]) -> tuple[int, str, T]:
            number, layer, batch = one
            pieces = [piece for _, piece in halving.run(batch, partial(inverted, layer=layer))]
            return number, layer, take(_joined(pieces))

        for number, layer, taken in in_turns(what, left(), work) if shared else map(work, left()):
            bar.update(steps * (number * len(layers) + layers.index(layer) + 1) - bar.n)
            yield number, layer, taken


def _refusal(network: nn.Module, layer: str, features_of: Features, true: Tensor) -> UnsupportedModelError:
    every = torch.arange(len(true), device=true.device)
    where = gradient_break(network, layer, lambda x: features_of(x, every), true)
    return UnsupportedModelError(
        f"No gradient flows from the layer {layer!r} to the input: {where}. Leave the layer out, or use another "
        "estimator."
    )


def _joined(parts: Sequence[Inversion]) -> Inversion:
    return Inversion(
        **{field.name: joined_tokens([getattr(part, field.name) for part in parts]) for field in fields(Inversion)}
    )
