"""How alike a layer of two networks is: `compare_layers` by centred kernel alignment."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from retrainscope.batches import Batch, Inputs, as_batches
from retrainscope.checks import check_device
from retrainscope.exceptions import InvalidDataError
from retrainscope.layers import layers_of
from retrainscope.lending import autograd_on, borrow, model_place
from retrainscope.padding import mean_over_tokens
from retrainscope.precision import asked_precision
from retrainscope.processes import in_step, n_processes, rank
from retrainscope.progress import progress_bar
from retrainscope.saving import import_pandas, load_json, save_json
from retrainscope.shares import check_same, in_order, together
from retrainscope.tables import Shown, Table, number_text
from retrainscope.tracing import named_layers, run_layers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LayerSimilarity", "compare_layers", "unbiased_hsic"]

_LEAST_SAMPLES = 4
_ROUNDING = 1e-12
_CHUNK = 2**24  # scalars in double precision at a time

Floats = NDArray[np.float64]


def unbiased_hsic(K: ArrayLike, L: ArrayLike) -> float:
    """Estimate the Hilbert-Schmidt independence criterion of two kernels, without bias.

    Parameters
    ----------
    K, L : array_like of shape (n_samples, n_samples)
        Kernel matrices of the same samples in the same order, such as X X' and Y Y'; their diagonals do not matter.

    Returns
    -------
    float
        In the units of K times those of L; 0 on average where the two are independent, so it may be negative.

    Raises
    ------
    InvalidDataError
        If they are not square and of one shape, or of fewer than four samples.

    Notes
    -----
    With zeroed diagonals, [ tr(KL) + sum(K) sum(L) / ((n-1)(n-2)) - 2 / (n-2) sum(KL) ] / (n (n-3)).

    References
    ----------
    L. Song et al., "Feature selection via dependence maximization", JMLR 13, 2012.
    T. Nguyen, M. Raghu, S. Kornblith, "Do wide and deep networks learn the same things?", ICLR 2021, arXiv 2010.15327.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((40, 3))
    >>> unbiased_hsic(X @ X.T, X @ X.T) > 10 * abs(unbiased_hsic(X @ X.T, X[::-1] @ X[::-1].T))
    True
    """
    first, second = (np.array(kernel, dtype=np.float64) for kernel in (K, L))
    if first.ndim != 2 or first.shape[0] != first.shape[1] or first.shape != second.shape:
        raise InvalidDataError(
            f"Two kernels of the same samples must have the same shape (n_samples, n_samples). Got {first.shape} and "
            f"{second.shape}. The samples of two data sets do not belong together in pairs: they cannot be compared so."
        )
    n = len(first)
    if n < _LEAST_SAMPLES:
        raise InvalidDataError(f"At least {_LEAST_SAMPLES} samples are needed. Got {n}.")
    np.fill_diagonal(first, 0.0)
    np.fill_diagonal(second, 0.0)
    sums, other_sums = first.sum(axis=0), second.sum(axis=0)
    products = np.vdot(first, second) + sums.sum() * other_sums.sum() / ((n - 1) * (n - 2))
    return float(products - 2 / (n - 2) * (sums @ other_sums)) / (n * (n - 3))


@dataclass(frozen=True, eq=False, repr=False)
class LayerSimilarity(Shown):
    """How alike each layer of two networks is, by centred kernel alignment (CKA).

    1: what the one puts out is the other's but for a rotation, a scale and a shift. 0 on average: the two have nothing
    to do with each other, so that single values may be slightly negative. NaN: not to be measured.

    Attributes
    ----------
    layers : tuple of str
        In the order of execution.
    values : ndarray of shape (n_layers,)
        CKA.
    reasons : tuple of n_layers str
        Why a value is NaN; empty where there is one.
    n_samples, n_batches : int
        That were measured.

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import compare_layers
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(compare_layers(model, model, torch.randn(100, 4)))
    Similarity of two networks: unbiased CKA, 1 is alike; 100 samples in 1 batch
    layer     CKA
    -----  ------
    0      1.0000
    """

    layers: tuple[str, ...]
    values: Floats
    reasons: tuple[str, ...]
    n_samples: int
    n_batches: int

    def to_frame(self) -> "pd.DataFrame":
        """Return one row a layer as a pandas DataFrame.

        Raises
        ------
        MissingExtraError
            If pandas is not installed.
        """
        columns = {"layer": list(self.layers), "cka": self.values, "reason": list(self.reasons)}
        frame: pd.DataFrame = import_pandas().DataFrame(columns)
        return frame

    def save(self, path: str | Path) -> None:
        """Write the result to a JSON file."""
        save_json(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result that `save` wrote.

        Raises
        ------
        ResultFormatError
            If the file holds something else, or was written by a newer version.
        """
        return load_json(cls, path)

    def as_table(self) -> Table:
        """Return the result as a table of one row a layer."""
        batches = f"{self.n_batches} batch{'' if self.n_batches == 1 else 'es'}"
        return Table(
            f"Similarity of two networks: unbiased CKA, 1 is alike; {self.n_samples} samples in {batches}",
            ["layer", "CKA"],
            [[layer, number_text(value, 4)] for layer, value in zip(self.layers, self.values, strict=True)],
            note="\n".join(f"{name}: {why}" for name, why in zip(self.layers, self.reasons, strict=True) if why),
        )


def compare_layers(
    model: nn.Module,
    other: nn.Module,
    X: Any,
    *,
    layers: Iterable[str | type[nn.Module]] | None = None,
    head: str | None = None,
    input_layer: str | None = None,
    calls: str | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> LayerSimilarity:
    """Tell how alike each layer of two networks sees the same samples, as before and after fine-tuning.

    It needs no labels and no gradients: one forward pass of each network. It is symmetric in the two, and does not
    depend on scale, shift or rotation of the features. What it cannot do: compare known with unknown data, as their
    samples do not belong together in pairs. That a layer has changed does not show that it had to. Values of layers of
    different width and depth are not on one scale, and a few samples that lie far out can dominate them.

    Parameters
    ----------
    model, other : nn.Module
        Two networks with layers of the same names. They are only borrowed.
    X : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        What both see. Labels are not used.
    layers : iterable of str or type, optional
        What to compare, of those below the head; see `find_layers`, which looks at `model`.
    head : str, optional
        The module that produces the output.
    input_layer : str, optional
        The module whose output stands for the input where that is discrete (an embedding).
    calls : {"first", "last", "sum"}, optional
        What counts of a layer that runs several times.
    batch_size : int
        Samples a forward pass, for data that is not batched. Kernels are of the samples of one batch: larger batches
        are surer, and cost more than in proportion. A batch of fewer than four samples is left out.
    device : device, optional
        Where to measure both; None: where each lies.
    progress : bool or None
        None shows a bar on a terminal only.

    Returns
    -------
    LayerSimilarity

    Raises
    ------
    InvalidDataError
        If no batch has four samples.
    LayerNotFoundError
        If one of the networks lacks a layer.

    Notes
    -----
    All features of a layer count, flattened (where the data tells what is padding, averaged over real tokens), with the
    linear kernel in double precision. With H the sum over batches of n_samples times `unbiased_hsic`, CKA is
    H(K, L) / sqrt(H(K, K) H(L, L)). Where H(K, K) is 0, as in a layer that says the same of every sample,
    there is no value.

    Memory is 8 bytes for each layer and pair of samples of a batch.

    References
    ----------
    T. Nguyen, M. Raghu, S. Kornblith, "Do wide and deep networks learn the same things?", ICLR 2021, arXiv 2010.15327.

    Examples
    --------
    >>> import copy, torch
    >>> from retrainscope.criteria import compare_layers
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), *[torch.nn.Linear(8, 8) for _ in "ab"])
    >>> changed = copy.deepcopy(model)
    >>> _ = torch.nn.init.normal_(changed[2].weight)
    >>> found = compare_layers(model, changed, torch.randn(100, 4))
    >>> found.layers, bool(found.values[0] > 0.999 > found.values[1])
    (('0', '2'), True)
    """
    (home, dtype), (other_home, other_dtype) = model_place(model), model_place(other)
    target = None if device is None else check_device(device)
    batches = as_batches(X, name="given", batch_size=batch_size, device=target or home, dtype=dtype)
    with (
        in_step(),
        autograd_on(),
        borrow(model, device=target) as one,
        borrow(other, device=target) as two,
        torch.no_grad(),
    ):
        settings = {"layers": layers, "head": head, "batch_size": batch_size}
        check_same(settings | {"torch.autocast": str(asked_precision(batches.device))}, model, batches)
        check_same({}, other)
        found = layers_of(one, batches.few(), layers=layers, head=head, input_layer=input_layer, calls=calls)
        named_layers(two, found.names)
        mine = list[tuple[int, Floats] | None]()  # of each batch the number of samples, and the sums
        total = None if batches.n_batches is None else -(-batches.n_batches // n_processes())
        steps = progress_bar(together(batches), what="similarity of layers", progress=progress, total=total)
        for step, (batch, _) in enumerate(steps):
            if batch is None or len(batch) < _LEAST_SAMPLES:
                mine.append(None)
                continue
            there, where = _placed(batch, target or other_home, other_dtype), f"batch {step * n_processes() + rank()}"
            kernels = [
                _kernels(network, inputs, found.names, found.token_axes, calls, where)
                for network, inputs in ((one, batch), (two, there))
            ]
            mine.append((len(batch), len(batch) * _sums(kernels, found.names)))
        counted = in_order("similarities", mine)
    n_samples, n_batches = sum(n for n, _ in counted), len(counted)
    if not n_batches:
        raise InvalidDataError(
            f"No batch of the given data has {_LEAST_SAMPLES} samples, which the comparison needs. Give more samples, "
            "or larger batches."
        )
    joint, *others = np.sum([each for _, each in counted], axis=0)
    own, strengths = np.array(others[:2]), np.array(others[2:])
    reasons = tuple(map(_reason, own.T, strengths.T))
    defined = np.array([not why for why in reasons])
    values = np.full(len(found.names), np.nan)
    values[defined] = joint[defined] / np.sqrt(own[0, defined] * own[1, defined])
    return LayerSimilarity(found.names, values, reasons, n_samples, n_batches)


def _kernels(
    network: nn.Module, batch: Batch, names: tuple[str, ...], token_axes: dict[str, int], calls: str | None, where: str
) -> dict[str, Floats]:
    """Return the linear kernel of the samples of a batch at every layer."""
    kernels: dict[str, Floats] = {}

    def keep(name: str, output: Tensor) -> None:
        axis = token_axes.get(name)
        features = output if axis is None or batch.mask is None else mean_over_tokens(output, axis, batch.mask)
        kernels[name] = _kernel(features.flatten(start_dim=1))

    run_layers(
        network, batch.inputs, names, keep, calls=calls, token_axes=token_axes, where=f"{where} of the given data"
    )
    return kernels


def _sums(kernels: Sequence[dict[str, Floats]], names: tuple[str, ...]) -> Floats:
    """Return the HSIC of both, that of each with itself, and the mean squares of each, of shape (5, n_layers)."""
    found = [
        [unbiased_hsic(K, L), unbiased_hsic(K, K), unbiased_hsic(L, L), np.square(K).mean(), np.square(L).mean()]
        for K, L in (tuple(side[name] for side in kernels) for name in names)
    ]
    return np.array(found).T


def _kernel(features: Tensor) -> Floats:
    """Compute X X' in double precision, of X less its mean, which HSIC does not depend on."""
    n = len(features)
    kernel = np.zeros((n, n))
    for part in torch.split(features, max(1, _CHUNK // n), dim=1):
        values = part.cpu().double()
        # Less the first row, features that do not vary are zero, and not what rounding makes of their mean.
        values = values - values[:1]
        values = values - values.mean(dim=0)
        kernel += (values @ values.T).numpy()
    return kernel


def _placed(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """Return a batch as another network takes it."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    inputs: Inputs = batch.inputs
    moved = place(inputs) if isinstance(inputs, Tensor) else {key: place(tensor) for key, tensor in inputs.items()}
    return Batch(moved, batch.labels, batch.positions)


def _reason(own: Floats, strengths: Floats) -> str:
    """Say why two layers cannot be compared, by the HSIC of each with itself; nothing if they can."""
    for which, value, strength in zip(("the first", "the other"), own, strengths, strict=True):
        if strength == 0:
            return f"{which} network says the same of every sample"
        if value <= _ROUNDING * strength:
            return f"to {which} network all samples of a batch are equally unlike; give more, or larger batches"
    return ""
