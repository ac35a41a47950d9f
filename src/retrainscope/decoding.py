"""`LayerDecoderProbe`: rebuild the input from a layer's activations with a decoder trained on known data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.base import LayerEstimator
from retrainscope.batches import Batch, Batches, Inputs, Label
from retrainscope.checks import check_number
from retrainscope.comparing import check_class_counts, score_errors
from retrainscope.control import untrained_copy
from retrainscope.decoders import Standardise, build_decoder, is_per_token
from retrainscope.exceptions import InvalidDataError, NonFiniteError
from retrainscope.lending import start_random
from retrainscope.memory import memory_needed
from retrainscope.moments import ClassMoments, GroupCounter, RunningMoments
from retrainscope.padding import joined_tokens, layer_mask, tokens_second
from retrainscope.progress import progress_bar
from retrainscope.reference import check_inputs_vary, reference_inputs
from retrainscope.scores import LayerScores
from retrainscope.tracing import run_layers

__all__ = ["LayerDecoderProbe"]

_LEAST_PER_CLASS = 5
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

                    def decode(_kind: str, at: int, seen: _Seen) -> None:
                        if at == place:
                            found.append(self._target.undo(self.decoders_[kind][place](seen.values)))

                    self._observe({kind: network}, piece, decode)
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
            seen.append(_fingerprints(batch.inputs))
        fitted, held_out = _split_positions(labels, self.holdout, np.random.default_rng(self._seed))
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

        def note_shape(_kind: str, place: int, seen: _Seen) -> None:
            shapes[place] = tuple(seen.values.shape[1:])

        self._one_length: tuple[str, int] | None = None
        first = self._observe(networks, fitted.first(), note_shape)
        input_shape = tuple(first.values.shape[1:])
        if first.real is not None and self.decoder is None:
            whole = [place for place, shape in shapes.items() if not is_per_token(shape, input_shape)]
            self._one_length = (self.layers_.names[whole[0]], input_shape[0]) if whole else None
        self._target = Standardise(input_shape, by_channel=False)
        scales = {kind: [Standardise(shapes[place]) for place in sorted(shapes)] for kind in networks}
        varies, n_batches = False, 0
        for batch in fitted:
            target = self._observe(networks, batch, lambda kind, place, seen: scales[kind][place].update(seen.counted))
            self._target.update(target.counted)
            varies = varies or bool((target.counted != first.counted.flatten()[0]).any())
            n_batches += 1
        check_inputs_vary(varies)
        self._target.finish()
        n_elements = first.values.shape[-1] if first.real is not None else first.values[0].numel()
        self._input_variance = float(self._target.std.square()) * n_elements
        for each in scales.values():
            for scale in each:
                scale.finish()
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
        fingerprints: NDArray[np.float64],
        n_batches: int,
    ) -> None:
        """Train all decoders together; each has its own weights, so each learns as if alone."""
        decoders = nn.ModuleList(self.decoders_.values()).train()
        optimizer = torch.optim.Adam(decoders.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.max_epochs * n_batches)
        n_layers, losses = len(self.layers_.names), list[Tensor]()
        parts, learners = self._parts.under("known"), list[Any]((decoders, optimizer, schedule))
        kept = parts.get("epochs")
        if kept is not None:
            losses = kept["losses"]
            for learner, state in zip(learners, kept["states"], strict=True):
                learner.load_state_dict(state)
        with progress_bar(
            what="training decoders", progress=self.progress, total=self.max_epochs, initial=len(losses)
        ) as bar:
            for epoch in range(len(losses), self.max_epochs):
                start_random(self._seed + epoch)  # so that an epoch does not depend on where the run was stopped
                summed = torch.zeros(2 * n_layers)
                for batch in batches.subset(fitted, order_seed=self._seed + epoch):
                    _check_order(batch, fingerprints)
                    found = self._losses(networks, batch)
                    each = torch.stack([*found[_MODEL], *found[_CONTROL]])
                    optimizer.zero_grad()
                    each.sum().backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                    summed += each.detach().cpu() * len(batch)
                losses.append(summed / len(fitted))
                if not torch.isfinite(losses[-1]).all():
                    raise NonFiniteError(
                        f"The decoders diverged in epoch {epoch}. Give a smaller learning_rate than "
                        f"{self.learning_rate}."
                    )
                bar.set_postfix(loss=f"{float(losses[-1][:n_layers].mean()):.3g}", refresh=False)
                bar.update()
                if parts.due():
                    parts.put("epochs", {"losses": losses, "states": [learner.state_dict() for learner in learners]})
        decoders.eval().requires_grad_(False)
        self.losses_ = torch.stack(losses)[:, :n_layers].double().numpy()

    def _losses(self, networks: dict[str, nn.Module], batch: Batch) -> dict[str, list[Tensor]]:
        """Run every network once and return each decoder's mean squared error."""
        activations: dict[str, dict[int, Tensor]] = {kind: {} for kind in networks}

        def keep(kind: str, place: int, seen: _Seen) -> None:
            activations[kind][place] = seen.values.clone()

        rebuilt = self._observe(networks, batch, keep)
        target, real = self._target(rebuilt.values), rebuilt.real

        def loss_of(decoder: nn.Module, activation: Tensor) -> Tensor:
            decoded = decoder(activation)
            if decoded.shape != target.shape:
                raise InvalidDataError(
                    f"A decoder turns {tuple(activation.shape)} into {tuple(decoded.shape)}, and the inputs have the "
                    f"shape {tuple(target.shape)}. Mend what decoder= makes."
                )
            return nn.functional.mse_loss(*((decoded, target) if real is None else (decoded[real], target[real])))

        return {
            kind: [loss_of(decoder, activations[kind][place]) for place, decoder in enumerate(self.decoders_[kind])]
            for kind in networks
        }

    def _errors(self, networks: dict[str, nn.Module], batches: Batches) -> ClassMoments:
        """Sum up the errors of all decoders, class by class, in one pass."""
        counter, moments = GroupCounter(), RunningMoments()
        n_layers = len(self.layers_.names)

        def measured(batch: Batch) -> Tensor:
            rebuilt: dict[tuple[str, int], Tensor] = {}

            def decode(kind: str, place: int, seen: _Seen) -> None:
                rebuilt[kind, place] = self._target.undo(self.decoders_[kind][place](seen.values))

            target = self._observe(networks, batch, decode)
            errors = [target.error_of(rebuilt[kind, place]) for kind in networks for place in range(n_layers)]
            return torch.stack(errors, dim=1)

        for batch in progress_bar(
            batches, what=f"decoding {batches.name}", progress=self.progress, total=batches.n_batches
        ):
            for piece, errors in self._halving.run(batch, measured):
                labels: tuple[Label, ...] = piece.labels or (None,) * len(piece)
                moments.add(errors, labels, counter.deal(labels))
        return moments.moments().ordered()

    def _observe(
        self, networks: dict[str, nn.Module], batch: Batch, visit: "Callable[[str, int, _Seen], None]"
    ) -> "_Seen":
        """Run every network once on a batch, visit all outputs, and return what is to be rebuilt."""
        mask = batch.mask
        if self._one_length is not None and mask is not None and mask.shape[1] != self._one_length[1]:
            layer, n_tokens = self._one_length
            raise InvalidDataError(
                f"The samples are padded to {n_tokens} tokens in one batch and to {mask.shape[1]} in another, but the "
                f"layer {layer!r} has not a token for each of the input, so its decoder needs one length. Pad "
                "all samples to the same length (padding='max_length'), or leave the layer out of layers=."
            )
        place = {name: i for i, name in enumerate(self.layers_.names)}
        targets: list[_Seen] = []
        for kind, network in networks.items():

            def sort(name: str, output: Tensor, kind: str = kind) -> None:
                seen = _Seen.of(output, self._token_axes.get(name), mask)
                if name in place:
                    visit(kind, place[name], seen)
                if name == self.input_layer and not targets:
                    targets.append(replace(seen, values=seen.values.clone()))

            names = self.layers_.names if self.input_layer is None else (self.input_layer, *self.layers_.names)
            with torch.no_grad():
                run_layers(network, batch.inputs, names, sort, calls=self.calls, token_axes=self._token_axes)
        return targets[0] if targets else _Seen.of(reference_inputs(batch.inputs), self._token_axes.get(""), mask)

    def _without_padding(self, decoded: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or self._token_axes.get(self.input_layer or "") is None:
            return decoded
        return decoded.masked_fill(~layer_mask(mask, decoded.shape[1])[..., None], torch.nan)


@dataclass(frozen=True)
class _Seen:
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
    def of(cls, output: Tensor, axis: int | None, mask: Tensor | None) -> "_Seen":
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
        squares = (rebuilt - self.values.float()).double().square()
        if self.real is None:
            return squares.flatten(1).sum(dim=1)
        return torch.where(self.real, squares.sum(dim=2), 0).sum(dim=1) / self.real.sum(dim=1)


def _split_positions(
    labels: list[Label], holdout: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the samples to learn from and those to measure, class by class."""
    positions: dict[Label, list[int]] = {}
    for position, label in enumerate(labels):
        positions.setdefault(label, []).append(position)
    counts = np.array([len(rows) for rows in positions.values()], dtype=np.float64)
    check_class_counts(tuple(positions), counts, "known", least=_LEAST_PER_CLASS)
    fitted, held_out = [], []
    for rows in positions.values():
        mixed = rng.permutation(rows)
        n_held = min(max(2, round(holdout * len(rows))), len(rows) - 2)
        held_out.append(mixed[:n_held])
        fitted.append(mixed[n_held:])
    return np.sort(np.concatenate(fitted)), np.sort(np.concatenate(held_out))


def _fingerprints(inputs: Inputs) -> NDArray[np.float64]:
    """Return a number for each sample that another sample hardly shares, shape (n_samples,)."""
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    total = np.zeros(len(tensors[0]))
    for tensor in tensors:
        flat = tensor.reshape(len(tensor), -1).float()
        total += (flat * torch.linspace(1, 2, flat.shape[1], device=flat.device)).sum(dim=1).cpu().numpy()
    return total


def _check_order(batch: Batch, fingerprints: NDArray[np.float64]) -> None:
    if not np.allclose(_fingerprints(batch.inputs), fingerprints[batch.positions], rtol=1e-3, atol=1e-3):
        raise InvalidDataError(
            "The known data comes in another order at every pass, so samples to learn from cannot be told from "
            "samples to measure. Give a Dataset, or a DataLoader that shuffles with torch's generators."
        )
