"""`ActivationSpread`: are the activations of novel classes clustered or spread?"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.answers import Answers
from retrainscope.base import LayerEstimator
from retrainscope.batches import Batch, Batches, Label
from retrainscope.checks import check_number
from retrainscope.comparing import N_RESAMPLES, baseline_classes, check_class_counts
from retrainscope.exceptions import UnsupportedModelError
from retrainscope.heads import class_scores
from retrainscope.moments import (
    N_GROUPS,
    ClassMoments,
    GroupCounter,
    Rows,
    RunningMoments,
    half_samples,
    scatter_share,
)
from retrainscope.padding import mean_over_tokens
from retrainscope.processes import gather, n_processes, rank
from retrainscope.progress import progress_bar
from retrainscope.reference import reference_inputs
from retrainscope.scores import LayerScores, Measured, score
from retrainscope.shares import Told, merged, together
from retrainscope.tracing import run_layers

__all__ = ["ActivationSpread"]

_INPUT = ""  # the input's key among the layers' moments
_MOST_SUMS = 2**22  # scalars held of a layer for the known data


class ActivationSpread(LayerEstimator):
    """Score layers by how much of the variance of their activations the classes leave unexplained.

    A layer that serves its classes gathers the samples of one class and parts the classes. Measured is the
    share of the variance that lies within the classes, in (0, 1]; its reference is the same share of the
    input itself. One pass over the data measures all layers; memory grows neither with the samples
    nor with the maps.

    With fewer than two classes in either set, or without labels on one of them, nothing lies between the
    classes: then the variance within is compared as it is, each unlabelled set counting as one class. That
    tells only whether the activations are more diverse than the input explains, not whether classes part: a
    high need still speaks, a low one does not show that a layer can be kept (``one_sided`` in the scores).

    If every unknown class is a known one (another domain), the known data is measured on those classes alone.
    The intervals are about samples: they take the classes as given, and samples as independent.

    Where the data tells what is padding (``attention_mask``, ``key_padding_mask`` or ``lengths``), a sample's
    activations are the mean over its real tokens; without it, a sequence is compared place by place.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    layers : iterable of str, optional
        What to measure; see `find_layers`.
    head : str, optional
        The module that produces the output.
    input_layer : str, optional
        The module whose output stands for the input where that is discrete (an embedding).
    calls : {"first", "last", "sum"}, optional
        What counts of a layer that runs several times; see `find_layers`.
    max_features : int
        A layer with more features is measured on that many of them, drawn once at random: both variances
        are sums over features, so their ratio stays what it is but for the sampling. Memory for each of known and
        unknown data is 80 bytes a feature, layer and class; with more than about 100 known classes fewer
        features are drawn, so that the known data takes no more than 32 MiB a layer.
    batch_size : int
        Samples a forward pass, for data that is not batched. It does not change the result.
    device : device, optional
        Where to measure; None: where the model lies.
    random_state : int, RandomState or None
        For the resampling of the intervals.
    progress : bool or None
        None shows a bar on a terminal only.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.
    moments_ : dict of str to ClassMoments
        Moments of the known data by layer; under ``""`` those of the input.
    neighbours_ : dict of str to dict
        After `score_layers`, for each layer and each class of the unknown data: the known class whose mean
        activation is nearest (Euclidean). Empty without labels.

    References
    ----------
    Experiment 1 of R. D. Sharma, "Better techniques for transfer learning". The share of within-class
    variance is the complement of the correlation ratio, R. A. Fisher (1925).

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> spread = rs.ActivationSpread(model, random_state=0).fit((X + y[:, None], y))
    >>> spread.score_layers((X - y[:, None], y)).layers
    ('0',)
    """

    _takes_shares: ClassVar[bool] = True
    _takes_pieces: ClassVar[bool] = True
    _noting: Mapping[str, Answers] = MappingProxyType({})  # for others, by the name of the data; while they want it
    _known_kinds: ClassVar[dict[str, Any]] = {"moments_": dict[str, ClassMoments], "_n_features": int}
    _unknown_kinds: ClassVar[dict[str, Any]] = {"neighbours_": dict[str, dict[Label, Label]]}

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        max_features: int = 4096,
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
        self.max_features = max_features
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def embed(self, X: Any, layer: str, *, perplexity: float = 30.0) -> NDArray[np.float64]:
        """Map the activations of a layer to the plane with t-SNE (scikit-learn).

        Parameters
        ----------
        X : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
            Known and unknown samples together: maps made apart cannot be compared.
        layer : str
            One of ``layers_.names``.
        perplexity : float
            Must be less than the number of samples.

        Returns
        -------
        ndarray of shape (n_samples, 2)
            In the order of X.
        """
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE

        collected: list[Tensor] = []
        with self._lent(X, layer) as (model, batches), torch.no_grad():
            for batch in progress_bar(
                batches, what=f"activations of {layer}", progress=self.progress, total=batches.n_batches
            ):

                def collect(name: str, output: Tensor, mask: Tensor | None = batch.mask) -> None:
                    collected.append(self._features(name, output, mask).float().cpu())

                run_layers(model, batch.inputs, [layer], collect, calls=self.calls, token_axes=self._token_axes)
        features = torch.cat(collected).numpy().astype(np.float64)
        if min(features.shape) > 50:  # as the authors of t-SNE advise, for speed and against noise
            features = PCA(50, random_state=self._seed).fit_transform(features)
        init = "pca" if features.shape[1] > 1 else "random"
        tsne = TSNE(perplexity=perplexity, init=init, random_state=self._seed)
        mapped: NDArray[np.float64] = tsne.fit_transform(features)
        return mapped

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        check_number("max_features", self.max_features, whole=True)
        self._n_features = self.max_features
        while True:
            try:
                self.moments_ = self._moments(model, batches, most=_MOST_SUMS)
                break
            except _TooManyClassesError as error:  # begun anew, with room for twice as many classes
                self._n_features = max(1, _MOST_SUMS // (2 * N_GROUPS * error.n_classes))
        check_class_counts(self.moments_[_INPUT].classes, self.moments_[_INPUT].class_counts, "known")

    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> LayerScores:
        known, unknown = self.moments_, self._moments(model, batches)
        labelled = None not in known[_INPUT].classes and None not in unknown[_INPUT].classes
        if labelled:
            classes = baseline_classes(known[_INPUT].classes, unknown[_INPUT].classes)
            known = {name: m.only(classes) for name, m in known.items()}
        else:
            known, unknown = ({name: m.pooled() for name, m in side.items()} for side in (known, unknown))
        between = min(len(known[_INPUT].classes), len(unknown[_INPUT].classes)) > 1
        self.neighbours_ = _neighbours(self.moments_, unknown) if labelled else {}
        return score(
            self._measured(known, rng, "known", between),
            self._measured(unknown, rng, "unknown", between),
            layers=self.layers_.names,
            labelled=labelled,
            one_sided=not between,
            estimator=type(self).__name__,
            measure="variance within classes",
            unit="share of all variance" if between else "squared activation",
            reference_name="input",
        )

    def _measured(
        self, moments: dict[str, ClassMoments], rng: np.random.Generator, name: str, between: bool
    ) -> Measured:
        reference = moments[_INPUT]
        check_class_counts(reference.classes, reference.class_counts, name)
        weights = half_samples(reference.counts, N_RESAMPLES, rng)
        return Measured(
            values=np.stack(
                [scatter_share(moments[layer], weights, between=between) for layer in self.layers_.names], axis=-1
            ),
            reference=scatter_share(reference, weights, between=between)[..., None],
            classes=reference.classes,
            counts=reference.class_counts,
        )

    def _moments(self, model: nn.Module, batches: Batches, *, most: float = np.inf) -> dict[str, ClassMoments]:
        """Sum up the activations of every layer, and the input, in one pass; at most so many sums a layer."""
        drawn: dict[str, Tensor] = {}
        counter, rows = GroupCounter(), Rows()
        moments = defaultdict[str, RunningMoments](lambda: RunningMoments(rows))
        names = self.layers_.names if self.input_layer is None else (self.input_layer, *self.layers_.names)
        answers = self._noting.get(batches.name)
        if answers is not None:
            answers.begin(batches)
        asked = answers is not None and answers.of_model
        total = None if batches.n_batches is None else -(-batches.n_batches // n_processes())
        steps = progress_bar(together(batches), what=f"spread of {batches.name}", progress=self.progress, total=total)
        for step, (batch, told) in enumerate(steps):
            groups = self._dealt(counter, told, most)
            if answers is not None:
                answers.note_labels(told)
            if batch is None:
                self._keep_pace(model, batches, batch)
                continue

            def measured(piece: Batch, number: int = step * n_processes() + rank()) -> tuple[dict[str, Tensor], Any]:
                found: dict[str, Tensor] = {}

                def add(name: str, output: Tensor) -> None:
                    features = self._features(name, output, piece.mask)
                    name = _INPUT if name == self.input_layer else name
                    found[name] = self._drawn(name, features, drawn)

                if self.input_layer is None:
                    add(_INPUT, reference_inputs(piece.inputs))
                with torch.no_grad():
                    where = f"batch {number} of the {batches.name} data"
                    options: dict[str, Any] = {"calls": self.calls, "token_axes": self._token_axes, "where": where}
                    returned = run_layers(model, piece.inputs, names, add, to_the_end=asked, **options)
                    return found, returned

            for piece, (found, returned) in self._halving.run(batch, measured):
                mine, groups = groups[: len(piece)], groups[len(piece) :]
                if answers is not None and asked:
                    try:
                        answers.note_outputs(piece, class_scores(model, returned))
                    except UnsupportedModelError:
                        answers.give_up()
                        answers = None
                labels = _labels(piece)
                for name, features in found.items():
                    moments[name].add(features, labels, mine)
        sums = {name: running.moments() for name, running in moments.items()}
        layers = next(filter(None, gather("the layers measured", [*sums])))  # a process may have had no batch
        # Layer by layer, since they may be large.
        whole = {layer: merged(f"moments of {layer!r}", sums.get(layer)) for layer in layers}
        return {layer: each.only(counter.classes).ordered() for layer, each in whole.items()}

    def _dealt(self, counter: GroupCounter, told: list[Told], most: float) -> NDArray[np.int64]:
        """Deal the batches of all processes to groups, as one process would; return the groups of this one's."""
        dealt = []
        for one in told:
            dealt.append(counter.deal(one.labels))
            if self._n_features > 1 and counter.n_classes * N_GROUPS * self._n_features > most:
                raise _TooManyClassesError(counter.n_classes)
        return dealt[rank()]

    def _features(self, name: str, output: Tensor, mask: Tensor | None) -> Tensor:
        """Return what is measured of an output, of shape (n_samples, n_features)."""
        axis = self._token_axes.get(name)
        return output.flatten(1) if axis is None or mask is None else mean_over_tokens(output, axis, mask)

    def _drawn(self, layer: str, features: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """Copy the features to measure: all, or the same random ones at every call, whose places are kept."""
        n_features = features.shape[1]
        if n_features <= self._n_features:
            return features.clone()
        if layer not in drawn:
            rng = np.random.default_rng([self._seed, *layer.encode()])
            chosen = np.sort(rng.choice(n_features, self._n_features, replace=False))
            drawn[layer] = torch.from_numpy(chosen).to(features.device)
        return features.index_select(1, drawn[layer])


def _labels(batch: Batch) -> tuple[Label, ...]:
    return batch.labels or (None,) * len(batch)


class _TooManyClassesError(Exception):
    """There are more classes than fit with so many features."""

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes


def _neighbours(known: dict[str, ClassMoments], unknown: dict[str, ClassMoments]) -> dict[str, dict[Label, Label]]:
    def means(moments: ClassMoments) -> NDArray[np.float64]:
        centres: NDArray[np.float64] = moments.sums.sum(axis=1) / moments.class_counts[:, None]
        return centres

    nearest = {}
    for layer in known:
        if layer == _INPUT:
            continue
        ours = means(known[layer])
        away = [np.linalg.norm(ours - mean, axis=1).argmin() for mean in means(unknown[layer])]
        nearest[layer] = {label: known[layer].classes[i] for label, i in zip(unknown[layer].classes, away, strict=True)}
    return nearest
