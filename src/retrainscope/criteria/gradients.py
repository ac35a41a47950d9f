"""Published criteria on the gradient of the loss as estimators: how strongly the data pulls at each layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.batches import Batch, Batches, Label
from retrainscope.checks import check_choice, check_number
from retrainscope.comparing import N_RESAMPLES
from retrainscope.criteria.gradient_statistics import class_signal_to_noise, relative_norm
from retrainscope.criteria.losses import (
    GradientCriterion,
    HeadedSample,
    Resampled,
    batches_of,
    mini_batches,
    sample_loss,
)
from retrainscope.moments import N_GROUPS, ClassMoments, GroupCounter, class_means, half_samples, moments_of
from retrainscope.processes import in_turns
from retrainscope.progress import progress_bar
from retrainscope.sample_gradients import summed_gradient

__all__ = ["EmpiricalFisher", "GradientSignalToNoise", "RelativeGradientNorm"]

_FEWEST_MEANS, _FEWEST_OF_CLASS = 10, 5  # mini-batches of the smaller side, and of the smallest class
_MOST_SUMS = 2**22  # scalars held of a layer
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class RelativeGradientNorm(GradientCriterion):
    """Score layers by the norm of the loss's gradient relative to that of their weights (Auto-RGN).

    For each mini-batch the norm of the gradient of the mean loss, of all tensors that a layer owns together, is divided
    by the norm of their weights; measured is the mean over mini-batches. A large value means that a step of gradient
    descent would change the layer by much, and the source tunes such layers more. Parameters of batch normalisation
    are left out, and so are tensors that are 0 all over, which nothing can be relative to.

    - Needs: labels on both sides, and a model that returns class scores; no other training.
    - Cost: one pass without gradients over all data, and two passes forward and backward over at most
      `samples_per_class` samples of each class (one in mini-batches of all classes, one in those of a single class for
      the needs by class). Memory: one gradient of the layers.
    - Sign and unit: gradient norm over weight norm, larger is more to tune. The need is the logarithm of the ratio of
      unknown to known; the published ranking is that of the raw values on the unknown data, ``scores.unknown``.
    - It cannot tell need from scale: weights rescaled so that the function stays the same get another value, and where
      only some of a layer's tensors are rescaled (its weight, not its bias) another need. The norm of a mini-batch's
      gradient is to a good part noise, and falls with the size of the mini-batch, which is therefore the same
      on both sides. With a new head its own error is in the gradient of every layer.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    mini_batch_size : int
        Samples whose mean gradient is taken, at most: as many as leave ten mini-batches of the smaller side. For the
        needs by class: as many as leave five of the smallest class.
    samples_per_class : int
        So many random samples of each class are differentiated, at most.
    layers, head, input_layer, calls, batch_size, device, random_state, progress
        As those of `ActivationSpread`.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.

    References
    ----------
    Y. Lee et al., "Surgical fine-tuning improves adaptation to distribution shifts" (arXiv 2210.11466), which takes
    the mean over five mini-batches.

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import RelativeGradientNorm
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> criterion = RelativeGradientNorm(model, random_state=0).fit((X + y[:, None], y))
    >>> scores = criterion.score_layers((X - 3 * y[:, None], y))
    >>> scores.layers, bool(scores.unknown[0] > scores.known[0])
    (('0',), True)
    """

    _measure = "norm of the gradient of a mini-batch"
    _unit = "relative to the norm of the weights"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        mini_batch_size: int = 32,
        samples_per_class: int = 50,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            layers=layers,
            head=head,
            input_layer=input_layer,
            calls=calls,
            samples_per_class=samples_per_class,
            batch_size=batch_size,
            device=device,
            random_state=random_state,
            progress=progress,
        )
        self.mini_batch_size = mini_batch_size

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        check_number("mini_batch_size", self.mini_batch_size, whole=True)
        super()._measure_known(model, batches)

    def _sizes(self) -> tuple[int, int]:
        """Return the size of mini-batches of all classes, and of those of one class."""
        together = max(1, min(self.mini_batch_size, self._n_fewest // _FEWEST_MEANS))
        return together, max(1, min(together, self._n_smallest // _FEWEST_OF_CLASS))

    def _gradients(self, parts: Iterable[HeadedSample]) -> ClassMoments:
        """Return the relative norms of mini-batches by class; those of all classes under None."""
        rng, norms, labels = np.random.default_rng([self._seed, 1]), list[list[float]](), list[Label]()
        with progress_bar(what="gradients of mini-batches", progress=self.progress) as bar:
            for part in parts:
                counting = _counting(part.network, self.layers_.parameters)
                names = {layer: list(counting[layer]) for layer in self.layers_.names}
                weights = {layer: _flat(counting[layer].values()) for layer in names}
                groups = mini_batches(part.sample, self._sizes(), rng)
                work = partial(_relative_norms, part, batches_of(part.sample), names, weights)
                found = in_turns("gradients of mini-batches", [rows for _, rows in groups], work)
                for (label, _), row in zip(groups, found, strict=True):
                    norms.append(row)
                    labels.append(label)
                    bar.update()
        return moments_of(torch.tensor(norms, dtype=torch.float64), labels, GroupCounter().deal(labels))

    def _resampled(self, gradients: ClassMoments, rng: np.random.Generator) -> Resampled:
        classes = tuple(label for label in gradients.classes if label is not None)
        together, apart = (
            class_means(part, half_samples(part.counts, N_RESAMPLES, rng))
            for part in (gradients.only((None,)), gradients.only(classes))
        )
        return Resampled(together[:, 0], apart[:, 1:])


class GradientSignalToNoise(GradientCriterion):
    """Score layers by how well the gradients of single samples agree (Auto-SNR).

    For each coordinate of a layer's weights the squared mean of the per-sample gradients is divided by their variance;
    measured is the mean over the coordinates. A large value means that the samples pull in one direction, and the
    source tunes such layers more.

    - Needs: labels on both sides, and a model that returns class scores; no other training.
    - Cost: one pass without gradients over all data, and a gradient of each of at most `samples_per_class` samples of
      each class. Memory: at most 256 MiB of gradients (or one sample's), and 32 MiB of sums for each layer.
    - Sign and unit: signal over noise, a pure number, larger is more to tune. Without any signal it is 1 / n for n
      samples, so it is brought to the n of the smallest class of both sides (see `signal_to_noise`). The need is the
      logarithm of the ratio of unknown to known; the published ranking is that of the raw values on the unknown data,
      ``scores.unknown``.
    - It cannot tell how much a layer would change, only in how far the samples agree on it: a layer that matters
      little may have a clear gradient. Rescaling of weights does not move it. More samples make it surer, but what
      cannot be told from noise stays near 1 / n.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    max_parameters : int
        A layer with more parameters is measured on so many of them, drawn once at random; with more than 100 known
        classes on fewer.
    samples_per_class : int
        So many random samples of each class are differentiated, at most.
    layers, head, input_layer, calls, batch_size, device, random_state, progress
        As those of `ActivationSpread`.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.

    References
    ----------
    Y. Lee et al., "Surgical fine-tuning improves adaptation to distribution shifts" (arXiv 2210.11466), whose released
    code takes the variance of one mini-batch's gradient over output channels instead; M. Mahsereci et al., "Early
    stopping without a validation set" (arXiv 1703.09580).

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import GradientSignalToNoise
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> criterion = GradientSignalToNoise(model, random_state=0).fit((X + y[:, None], y))
    >>> criterion.score_layers((X - 3 * y[:, None], y)).layers
    ('0',)
    """

    _measure = "signal to noise of the gradients"
    _unit = "squared mean / variance"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        max_parameters: int = 2048,
        samples_per_class: int = 50,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            layers=layers,
            head=head,
            input_layer=input_layer,
            calls=calls,
            samples_per_class=samples_per_class,
            batch_size=batch_size,
            device=device,
            random_state=random_state,
            progress=progress,
        )
        self.max_parameters = max_parameters

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        check_number("max_parameters", self.max_parameters, whole=True)
        super()._measure_known(model, batches)

    def _gradients(self, parts: Iterable[HeadedSample]) -> dict[str, ClassMoments]:
        """Return the sums of the gradients, then of their squares, for the chosen coordinates of each layer."""
        most = min(self.max_parameters, max(1, _MOST_SUMS // (2 * N_GROUPS * len(self._known.classes))))

        def features(gradients: Tensor) -> Tensor:
            n_parameters = gradients.shape[1]
            if n_parameters > most:
                rng = np.random.default_rng([self._seed, n_parameters])
                chosen = torch.from_numpy(np.sort(rng.choice(n_parameters, most, replace=False)))
                gradients = gradients[:, chosen.to(gradients.device)]
            wide = gradients.cpu().double()
            return torch.cat([wide, wide**2], dim=1)

        return self._moments(parts, features)

    def _resampled(self, gradients: dict[str, ClassMoments], rng: np.random.Generator) -> Resampled:
        first = next(iter(gradients.values()))
        weights = half_samples(first.counts, N_RESAMPLES, rng)
        found = [class_signal_to_noise(gradients[layer], weights, self._n_smallest) for layer in self.layers_.names]
        stacked = np.stack(found, axis=-1)
        return Resampled(stacked[:, 0], stacked[:, 1:])


class EmpiricalFisher(GradientCriterion):
    """Score layers by the squared gradients of single samples (empirical Fisher information).

    The diagonal of the empirical Fisher information matrix, the square of each sample's gradient averaged over the
    samples, is summed or averaged over a layer's parameters. A large value means that the loss is sensitive to the
    layer's weights.

    - Needs: labels on both sides, and a model that returns class scores; no other training.
    - Cost: one pass without gradients over all data, and a gradient of each of at most `samples_per_class` samples of
      each class. Memory: at most 256 MiB of gradients, or one sample's.
    - Sign and unit: squared nats per squared unit of weight, larger is more to tune. The need is the logarithm of the
      ratio of unknown to known; the published ranking is that of the raw values on the unknown data,
      ``scores.unknown``.
    - It cannot tell need from size: the sum favours layers with many parameters, the mean those with few, and the need
      is the same for both. Weights rescaled so that the function stays the same get another value, and where only some
      of a layer's tensors are rescaled another need. With the labels as they are, not drawn from the model, it is no
      curvature where the model is wrong; it is then about the size of the loss, which all layers share.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    reduction : {"sum", "mean"}
        Over the parameters of a layer.
    samples_per_class : int
        So many random samples of each class are differentiated, at most.
    layers, head, input_layer, calls, batch_size, device, random_state, progress
        As those of `ActivationSpread`.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.

    References
    ----------
    Used to choose layers by arXiv 2310.17041; on what it is not: F. Kunstner et al., "Limitations of the empirical
    Fisher approximation for natural gradient descent" (arXiv 1905.12558).

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import EmpiricalFisher
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> criterion = EmpiricalFisher(model, random_state=0).fit((X + y[:, None], y))
    >>> scores = criterion.score_layers((X - 3 * y[:, None], y))
    >>> scores.layers, bool(scores.unknown[0] > scores.known[0])
    (('0',), True)
    """

    _measure, _unit = "empirical Fisher information", "squared gradient of the loss"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        reduction: str = "sum",
        samples_per_class: int = 50,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            layers=layers,
            head=head,
            input_layer=input_layer,
            calls=calls,
            samples_per_class=samples_per_class,
            batch_size=batch_size,
            device=device,
            random_state=random_state,
            progress=progress,
        )
        self.reduction = reduction

    def _described(self) -> str:
        return f"{self._measure}, {self.reduction} over parameters"

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        check_choice("reduction", self.reduction, ("sum", "mean"))
        super()._measure_known(model, batches)

    def _gradients(self, parts: Iterable[HeadedSample]) -> dict[str, ClassMoments]:
        def features(gradients: Tensor) -> Tensor:
            squared: Tensor = torch.linalg.vector_norm(gradients, dim=1, keepdim=True).cpu().double().square()
            return squared if self.reduction == "sum" else squared / gradients.shape[1]

        return self._moments(parts, features)

    def _resampled(self, gradients: dict[str, ClassMoments], rng: np.random.Generator) -> Resampled:
        first = next(iter(gradients.values()))
        weights = half_samples(first.counts, N_RESAMPLES, rng)
        means = np.concatenate([class_means(gradients[layer], weights) for layer in self.layers_.names], axis=-1)
        return Resampled(means[:, 0], means[:, 1:])


def _relative_norms(
    part: HeadedSample,
    read: Callable[[NDArray[np.int64]], list[Batch]],
    names: Mapping[str, Sequence[str]],
    weights: Mapping[str, Tensor],
    rows: NDArray[np.int64],
) -> list[float]:
    """Return the norm of a mini-batch's mean gradient relative to that of the weights, by layer."""
    summed = [
        summed_gradient(part.network, batch.inputs, part.targets(batch), sample_loss, names) for batch in read(rows)
    ]
    means = {layer: torch.stack([found[layer] for found in summed]).sum(0) / len(rows) for layer in names}
    return [relative_norm(means[layer], weights[layer]) for layer in names]


def _counting(network: nn.Module, owned: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Tensor]]:
    """Return the parameters of each layer whose gradient can be relative to something."""
    normalising = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, _BATCH_NORMS)
        for parameter in module.parameters(recurse=False)
    }
    weights = {
        name: weight.detach()
        for name, weight in network.named_parameters()
        if id(weight) not in normalising and weight.is_floating_point() and bool(weight.any())
    }
    return {layer: {name: weights[name] for name in names if name in weights} for layer, names in owned.items()}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    flat = [tensor.flatten() for tensor in tensors]
    return torch.cat(flat) if flat else torch.zeros(0)
