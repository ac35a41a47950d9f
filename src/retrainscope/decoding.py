"""`LayerDecoderProbe`: rebuild the input from a layer's activations with a decoder trained on known data."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.base import LayerEstimator
from retrainscope.batches import Batch, Batches, Label
from retrainscope.checks import check_number
from retrainscope.comparing import score_errors
from retrainscope.control import untrained_copy
from retrainscope.decoder_training import Pair, Training, own_pairs, train_decoders
from retrainscope.decoders import Standardise, build_decoder, is_per_token
from retrainscope.exceptions import InvalidDataError
from retrainscope.holding_out import check_order, fingerprints, split_positions
from retrainscope.lending import start_random
from retrainscope.memory import memory_needed
from retrainscope.moments import ClassMoments, GroupCounter, RunningMoments
from retrainscope.observing import Observer, Seen
from retrainscope.padding import joined_tokens, layer_mask
from retrainscope.processes import n_processes, rank
from retrainscope.progress import progress_bar
from retrainscope.reference import check_inputs_vary
from retrainscope.scores import LayerScores
from retrainscope.shares import merged, together

__all__ = ["LayerDecoderProbe"]

_MODEL, _CONTROL = "model", "control"


class LayerDecoderProbe(LayerEstimator):
    """Score layers by how badly a decoder that learnt on known data rebuilds unknown data from them.

    For every layer a decoder is trained to rebuild the input from the layer's activations, on known data
    alone, the model frozen. Measured is the squared error of a sample; its reference is the error of the same
    decoder trained on the control, a network of the same architecture that was never trained. The known
    data is measured on samples that no decoder saw.

    All decoders, those of the control too, learn from one forward pass of each network a batch.

    Where the data tells what is padding (``attention_mask``, ``key_padding_mask`` or ``lengths``), padding is neither
    seen nor rebuilt, and the error of a sample is the mean over its real tokens.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    layers, head, input_layer, calls
        What to measure; see `find_layers`. With `input_layer`, its output is what is rebuilt.
    decoder : callable (activation_shape, input_shape) -> nn.Module, optional
        Makes the decoders; both shapes are those of one sample. None builds up-convolutions for maps,
        linear layers for vectors.
    max_epochs : int
        Passes over the known data to train the decoders, with Adam and a cosine schedule.
    learning_rate : float
        Adam's.
    holdout : float
        The share of each known class that is measured, not learnt from.
    batch_size : int
        Samples a training step, for data that is not batched: unlike elsewhere it changes the result.
    device : device, optional
        Where to measure; None: where the model lies.
    random_state : int, RandomState or None
        For the split, the decoders, the control's weights and the resampling.
    progress : bool or None
        None shows a bar on a terminal only.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.
    decoders_ : dict of str to nn.ModuleList
        The trained decoders: ``decoders_["model"][i]`` for ``layers_.names[i]``, and ``decoders_["control"]``.
    losses_ : ndarray of shape (max_epochs, n_layers)
        Mean squared error of the model's decoders in training, in units of the input's variance.
    known_errors_ : ClassMoments
        Errors of the held-out known samples: of each layer with the model, then with the control.

    References
    ----------
    Experiment 3 of R. D. Sharma, "Better techniques for transfer learning".

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> probe = rs.LayerDecoderProbe(model, max_epochs=5, random_state=0).fit((X, y))
    >>> probe.reconstruct(X[:3], "0").shape
    torch.Size([3, 4])
    """

    _known_kinds: ClassVar[dict[str, Any]] = {
        "losses_": NDArray[np.float64],
        "known_errors_": ClassMoments,
        "_one_length": tuple[str, int] | None,
        "_input_variance": float,
        "_shapes": tuple[tuple[int, ...], ...],
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        decoder: Callable[[tuple[int, ...], tuple[int, ...]], nn.Module] | None = None,
        max_epochs: int = 30,
        learning_rate: float = 2e-3,
        holdout: float = 0.2,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.head = head
        self.input_layer = input_layer
        self.calls = calls
        self.decoder = decoder
        self.max_epochs = max_epochs
        self.learning_rate = learning_rate
        self.holdout = holdout
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def reconstruct(self, X: Any, layer: str, *, control: bool = False) -> Tensor:
        """Rebuild inputs from the activations of a layer.

        Parameters
        ----------
        X : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        layer : str
            One of ``layers_.names``.
        control : bool
            Whether to use the untrained control and its decoder instead.

        Returns
        -------
        Tensor of shape (n_samples, ...)
            In the order of X; NaN where there is padding.
        """
        rebuilt: list[Tensor] = []
        kind = _CONTROL if control else _MODEL
        with self._lent(X, layer) as (model, batches), torch.no_grad():
            place = self.layers_.names.index(layer)
            network = self._control(model) if control else model
            for batch in progress_bar(batches, what=f"decoding {layer}", progress=self.progress):

                def decoded(piece: Batch) -> Tensor:
                    found: list[Tensor] = []

                    def decode(kind: str, place: int, seen: Seen) -> None:
                        found.append(self._target.undo(self.decoders_[kind][place](seen.values)))

                    self._observer.run({kind: network}, piece, decode, [(kind, place)])
                    return self._without_padding(found[0], piece.mask).cpu()

                rebuilt += [found for _, found in self._halving.run(batch, decoded)]
        return joined_tokens(rebuilt)

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        check_number("max_epochs", self.max_epochs, whole=True)
        check_number("learning_rate", self.learning_rate, whole=False)
        check_number("holdout", self.holdout, whole=False, below=1)
        labels: list[Label] = []
        seen = []
        for batch in batches:
            labels += batch.labels or (None,) * len(batch)
            seen.append(fingerprints(batch.inputs))
        fitted, held_out = split_positions(labels, self.holdout, np.random.default_rng(self._seed))
        networks = {_MODEL: model, _CONTROL: self._control(model)}
        with memory_needed("in training decoders", batches.batch_size):
            n_batches = self._prepare(networks, batches.subset(fitted))
            self._train(networks, batches, fitted, np.concatenate(seen), n_batches)
        start_random(self._seed)
        self.known_errors_ = self._errors(networks, batches.subset(held_out))

    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> LayerScores:
        networks = {_MODEL: model, _CONTROL: self._control(model)}
        known, unknown = self.known_errors_, self._errors(networks, batches)
        return score_errors(
            known,
            unknown,
            layers=self.layers_.names,
            estimator=type(self).__name__,
            measure="squared error of the decoded input",
            unit="input units squared, summed" + (", a token" if self._token_axes.get(self.input_layer or "") else ""),
            variance=self._input_variance,
            rng=rng,
        )

    def _control(self, model: nn.Module) -> nn.Module:
        return untrained_copy(model, seed=self._seed, keep=self.input_layer)

    def _prepare(self, networks: dict[str, nn.Module], fitted: Batches) -> int:
        """Measure all scales in one pass, build the decoders, and return the number of batches."""
        shapes: dict[int, tuple[int, ...]] = {}

        def note_shape(_kind: str, place: int, seen: Seen) -> None:
            shapes[place] = tuple(seen.values.shape[1:])

        self._one_length: tuple[str, int] | None = None
        first = self._observer.run(networks, fitted.few(), note_shape)
        input_shape = tuple(first.values.shape[1:])
        if first.real is not None and self.decoder is None:
            whole = [place for place, shape in shapes.items() if not is_per_token(shape, input_shape)]
            self._one_length = (self.layers_.names[whole[0]], input_shape[0]) if whole else None
        self._target = Standardise(input_shape, by_channel=False)
        scales = {kind: [Standardise(shapes[place]) for place in sorted(shapes)] for kind in networks}
        mine, varies, n_batches = own_pairs(self._pairs), False, 0

        def measure(kind: str, place: int, seen: Seen) -> None:
            scales[kind][place].update(seen.counted)

        for batch in fitted:
            target = self._observer.run(networks, batch, measure, mine)
            self._target.update(target.counted)
            varies = varies or bool((target.counted != first.counted.flatten()[0]).any())
            n_batches += 1
        check_inputs_vary(varies)
        self._target.finish()
        n_elements = first.values.shape[-1] if first.real is not None else first.values[0].numel()
        self._input_variance = float(self._target.std.square()) * n_elements
        for kind, place in mine:
            scales[kind][place].finish()
        self._shapes = (*(shapes[place] for place in sorted(shapes)), input_shape)
        self._build(scales)
        return n_batches

    def _build(self, scales: dict[str, list[Standardise]]) -> None:
        """Make the decoders, untrained."""
        *shapes, input_shape = self._shapes
        make = self.decoder or build_decoder
        chains: dict[str, list[nn.Module]] = {kind: [] for kind in scales}
        for place, shape in enumerate(shapes):
            for kind, each in scales.items():
                torch.manual_seed(self._seed)  # the same start for a layer's two decoders
                chains[kind].append(nn.Sequential(each[place], make(shape, input_shape)))
        self.decoders_ = {kind: nn.ModuleList(chain).to(self._place()) for kind, chain in chains.items()}
        self._target.to(self._place())

    def _fitted(self) -> dict[str, Any]:
        decoders = {kind: each.state_dict() for kind, each in self.decoders_.items()}
        return {**super()._fitted(), "decoders": decoders, "target": self._target.state_dict()}

    def _restore(self, fitted: dict[str, Any]) -> None:
        super()._restore(fitted)
        *shapes, input_shape = self._shapes
        self._target = Standardise(input_shape, by_channel=False)
        self._build({kind: [Standardise(shape) for shape in shapes] for kind in (_MODEL, _CONTROL)})
        self._target.load_state_dict(fitted["target"])
        for kind, decoders in self.decoders_.items():
            decoders.load_state_dict(fitted["decoders"][kind])
            decoders.eval().requires_grad_(False)

    def _train(
        self,
        networks: dict[str, nn.Module],
        batches: Batches,
        fitted: NDArray[np.int64],
        expected: NDArray[np.float64],
        n_batches: int,
    ) -> None:
        """Train all decoders, from one pass of the networks a batch."""

        def batches_of(epoch: int) -> Iterator[Batch]:
            for batch in batches.subset(fitted, order_seed=self._seed + epoch):
                check_order(batch, expected)
                yield batch

        losses = train_decoders(
            {(kind, place): self.decoders_[kind][place] for kind, place in self._pairs},
            batches_of,
            partial(self._losses, networks),
            Training(
                max_epochs=self.max_epochs,
                learning_rate=self.learning_rate,
                n_batches=n_batches,
                n_samples=len(fitted),
                seed=self._seed,
                progress=self.progress,
                parts=self._parts.under("known"),
            ),
        )
        for chain in self.decoders_.values():
            chain.eval().requires_grad_(False)
        places = range(len(self.layers_.names))
        self.losses_ = np.array([[epoch[_MODEL, place] for place in places] for epoch in losses])

    def _losses(self, networks: dict[str, nn.Module], batch: Batch, pairs: list[Pair]) -> dict[Pair, Tensor]:
        """Return the mean squared errors of some decoders."""
        activations: dict[Pair, Tensor] = {}

        def keep(kind: str, place: int, seen: Seen) -> None:
            activations[kind, place] = seen.values.clone()

        rebuilt = self._observer.run(networks, batch, keep, pairs)
        target, real = self._target(rebuilt.values), rebuilt.real

        def loss_of(decoder: nn.Module, activation: Tensor) -> Tensor:
            decoded = decoder(activation)
            if decoded.shape != target.shape:
                raise InvalidDataError(
                    f"A decoder turns {tuple(activation.shape)} into {tuple(decoded.shape)}, and the inputs have the "
                    f"shape {tuple(target.shape)}. Mend what decoder= makes."
                )
            return nn.functional.mse_loss(*((decoded, target) if real is None else (decoded[real], target[real])))

        return {pair: loss_of(self.decoders_[pair[0]][pair[1]], activations[pair]) for pair in pairs}

    def _errors(self, networks: dict[str, nn.Module], batches: Batches) -> ClassMoments:
        """Sum up the errors of all decoders, class by class, in one pass."""
        counter, moments = GroupCounter(), RunningMoments()
        n_layers = len(self.layers_.names)

        def measured(batch: Batch) -> Tensor:
            rebuilt: dict[Pair, Tensor] = {}

            def decode(kind: str, place: int, seen: Seen) -> None:
                rebuilt[kind, place] = self._target.undo(self.decoders_[kind][place](seen.values))

            target = self._observer.run(networks, batch, decode)
            errors = [target.error_of(rebuilt[kind, place]) for kind in networks for place in range(n_layers)]
            return torch.stack(errors, dim=1)

        total = None if batches.n_batches is None else -(-batches.n_batches // n_processes())
        steps = progress_bar(together(batches), what=f"decoding {batches.name}", progress=self.progress, total=total)
        for batch, told in steps:
            groups = [counter.deal(one.labels) for one in told][rank()]
            if batch is None:
                continue
            for piece, errors in self._halving.run(batch, measured):
                labels: tuple[Label, ...] = piece.labels or (None,) * len(piece)
                moments.add(errors, labels, groups[: len(piece)])
                groups = groups[len(piece) :]
        return merged("errors", moments.moments() if moments.counted else None).only(counter.classes).ordered()

    @property
    def _pairs(self) -> list[Pair]:
        """All decoders. A layer's two follow each other, so that of two processes each runs one network alone."""
        return [(kind, place) for place in range(len(self.layers_.names)) for kind in (_MODEL, _CONTROL)]

    @property
    def _observer(self) -> Observer:
        return Observer(self.layers_.names, self.input_layer, self.calls, self._token_axes, self._one_length)

    def _without_padding(self, decoded: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or self._token_axes.get(self.input_layer or "") is None:
            return decoded
        return decoded.masked_fill(~layer_mask(mask, decoded.shape[1])[..., None], torch.nan)
