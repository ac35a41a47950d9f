"""A published criterion on the weights alone as an estimator: which layers stand out by their singular values."""

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.base import LayerEstimator
from retrainscope.batches import Batches
from retrainscope.processes import in_turns
from retrainscope.scores import LayerScores

__all__ = ["SpectrumSNR", "spectrum_snr"]

_NORMAL_IQR = 1.349  # interquartile range of a normal distribution of standard deviation 1
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)

Floats = NDArray[np.float64]


def spectrum_snr(weight_matrix: NDArray[Any]) -> float:
    """Compute the signal to noise ratio of a weight matrix from its singular values.

    Noise are the singular values S up to ε = σ (1 + √b), the edge of the Marchenko-Pastur law, with σ the interquartile
    range of S over 1.349 and b the ratio of the shorter side to the longer:

        (sum of S > ε) / (sum of S <= ε) / max S.

    Parameters
    ----------
    weight_matrix : ndarray of shape (n_outputs, n_inputs)

    Returns
    -------
    float
        Unit: one over that of the weights. 0 where all is noise, infinite where nothing is, NaN for a matrix of zeros.

    References
    ----------
    E. Hartford et al., "Spectrum: targeted training on signal to noise ratio" (arXiv 2406.06623).

    Examples
    --------
    Singular values 5, 2, 1 and 0: their quartiles are 0.75 and 2.75, so ε = 2.97.

    >>> import numpy as np
    >>> round(spectrum_snr(np.diag([5.0, 2.0, 1.0, 0.0])), 4)
    0.3333
    """
    values = np.linalg.svd(np.asarray(weight_matrix, dtype=np.float64), compute_uv=False)
    if not values.size or values[0] == 0:
        return float("nan")
    low, high = np.quantile(values, [0.25, 0.75])
    edge = (high - low) / _NORMAL_IQR * (1 + np.sqrt(min(weight_matrix.shape) / max(weight_matrix.shape)))
    signal, noise = values[values > edge].sum(), values[values <= edge].sum()
    return float(signal / noise / values[0]) if noise > 0 else float("inf")


class SpectrumSNR(LayerEstimator):
    """Score layers by the signal to noise ratio of their weight matrices (Spectrum), whatever the data.

    Measured is `spectrum_snr` of each weight matrix, convolutions reshaped to (n_outputs, n_inputs * kernel size). As
    matrices of different kinds of module differ by themselves, each is compared with its own kind (convolution, linear
    layer, other): the need is its log less the median of the logs of that kind. Of a layer with several matrices it is
    the mean over them. The source trains the layers of the highest ratio.

    - Needs: nothing but the weights. Known and unknown data serve only to find the layers and are not looked at
      further, so all unknown data has the same answer; there are no needs by class, and ``n_samples`` is 0.
    - Cost: one singular value decomposition in double precision for each weight matrix.
    - Sign and unit: need in nats, larger is more to tune. ``scores.unknown`` holds the raw ratios of the layers (the
      geometric mean over their matrices), one over the unit of the weights; ``scores.known`` holds what they are
      compared with. The published ranking is that of the raw values among layers of one kind.
    - It cannot tell what any data needs. Weights twice as large have half the ratio, and a stronger single direction
      lowers it, as the largest singular value divides it. It was made for the nearly square matrices of language
      models: where one side is much longer (most convolutions, first layers) no singular value counts as noise, and
      the need is NaN. A layer that is alone of its kind has the need 0.

    Weights have no sampling error, so each interval is the need itself, twice; that does not make it certain.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    layers, head, input_layer, calls, batch_size, device, random_state, progress
        As those of `ActivationSpread`; the last three do not matter.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.
    ratios_ : dict of str to float
        By the name of the weight (of one that is parametrised, what is made from its parameters), for all matrices of
        the layers.

    References
    ----------
    E. Hartford et al., "Spectrum: targeted training on signal to noise ratio" (arXiv 2406.06623).

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import SpectrumSNR
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    >>> X = torch.randn(10, 8)
    >>> scores = SpectrumSNR(model).fit(X).score_layers(X)
    >>> scores.layers, int((scores.values > 0).sum())
    (('0', '1', '2'), 1)
    """

    _takes_shares: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.head = head
        self.input_layer = input_layer
        self.calls = calls
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        del batches  # the weights alone count
        self._owned = {
            layer: [*dict.fromkeys(map(_as_computed, self.layers_.parameters[layer]))] for layer in self.layers_.names
        }
        owned = [name for names in self._owned.values() for name in names]
        users = {name: model.get_submodule(name.rpartition(".")[0]) for name in owned}
        with torch.no_grad():
            weights = {name: getattr(users[name], name.rpartition(".")[2]) for name in owned}
        names = [name for name in owned if weights[name].ndim > 1 and weights[name].is_floating_point()]
        self._kinds = {name: _kind(users[name]) for name in names}
        ratios = in_turns("the spectra", names, lambda name: spectrum_snr(_matrix(weights[name], users[name])))
        self.ratios_ = dict(zip(names, ratios, strict=True))

    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> LayerScores:
        del model, batches, rng  # all is known from the weights, and nothing is drawn
        with np.errstate(divide="ignore"):
            logs = {name: float(np.log(ratio)) for name, ratio in self.ratios_.items()}
        logs = {name: log for name, log in logs.items() if np.isfinite(log)}
        medians = {
            kind: float(np.median([log for name, log in logs.items() if self._kinds[name] == kind]))
            for kind in {self._kinds[name] for name in logs}
        }
        names = self.layers_.names
        mine = {layer: [name for name in self._owned[layer] if name in logs] for layer in names}

        def means(values: dict[str, float]) -> Floats:
            return np.array(
                [np.mean([values[name] for name in mine[layer]]) if mine[layer] else np.nan for layer in names]
            )

        raw, usual = means(logs), means({name: medians[self._kinds[name]] for name in logs})
        need, nothing = raw - usual, np.full(len(names), np.nan)
        by_class = np.empty((0, len(names)))
        return LayerScores(
            estimator=type(self).__name__,
            measure="signal to noise of the weights, known: the median of their kind",
            unit="1 / weight",
            reference_name="",
            layers=names,
            values=need,
            interval=np.stack([need, need], axis=-1),
            classes=(),
            per_class=by_class,
            per_class_interval=np.empty((0, len(names), 2)),
            known=np.exp(usual),
            unknown=np.exp(raw),
            known_reference=nothing,
            unknown_reference=nothing,
            known_classes=(),
            known_per_class=by_class,
            unknown_per_class=by_class,
            known_per_class_reference=by_class,
            unknown_per_class_reference=by_class,
            n_samples=(0, 0),
            one_sided=False,
        )


def _as_computed(name: str) -> str:
    """Return the name of the weight that a parameter is, or that is made from it where that is parametrised."""
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\..*", r"\1\2", name)


def _kind(module: nn.Module) -> str:
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    return "linear" if isinstance(module, nn.Linear) else "other"


def _matrix(weight: Tensor, module: nn.Module) -> Floats:
    """Bring a weight to shape (n_outputs, n_inputs * kernel size)."""
    outputs_first = weight.detach().cpu().double()
    if isinstance(module, _TRANSPOSED):
        outputs_first = outputs_first.transpose(0, 1)
    matrix: Floats = outputs_first.flatten(start_dim=1).numpy()
    return matrix
