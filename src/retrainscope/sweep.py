"""`sweep_layers`: retrain and see, the ground truth that advice is held against."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.batches import Batch, Batches, Label, as_batches, input_shapes, ordered_classes
from retrainscope.checkpoints import Checkpoint, check_checkpoint, fingerprint, name_of
from retrainscope.checks import check_device, check_number
from retrainscope.dryrun import first_samples
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.freezing import training
from retrainscope.heads import (
    check_classes,
    collect_head_inputs,
    fitted_head,
    head_inputs,
    output_places,
    own_places,
    predictions_of,
    with_head,
)
from retrainscope.layers import Layers, layers_of
from retrainscope.lending import autograd_on, borrow, copy_model, model_place, seed_of, start_random
from retrainscope.memory import Halving, memory_needed
from retrainscope.policies import policy_name, policy_sets
from retrainscope.processes import check_alone
from retrainscope.progress import progress_bar
from retrainscope.reference import check_same_shape
from retrainscope.trials import LayerSweep, Trial, summarise

__all__ = ["sweep_layers"]

_EVALUATED = 256  # samples a forward pass, where nothing is trained

MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


def sweep_layers(
    model: nn.Module,
    known: Any,
    unknown: Any,
    *,
    test: Any = None,
    policies: Iterable[Iterable[str]] | None = None,
    layers: Iterable[str | type[nn.Module]] | None = None,
    head: str | None = None,
    input_layer: str | None = None,
    calls: str | None = None,
    steps: int = 300,
    batch_size: int = 32,
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    optimizer: MakeOptimizer | None = None,
    n_seeds: int = 3,
    validation_size: float = 0.2,
    test_size: float = 0.3,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    random_state: int | np.random.RandomState | None = None,
    progress: bool | None = None,
) -> LayerSweep:
    """Retrain a model by every policy on the unknown data, and measure what each is worth.

    Policies are: the head alone; the head and one layer, for every layer; the head and everything from a layer up;
    everything; and, where the unknown classes are known ones, nothing. All start from the same weights and are
    trained for as many steps on the same samples, in the same order, by cross-entropy; the learning rate falls
    linearly to zero from the one of the grid that is best on validation samples, policy by policy. Accuracy is
    measured on test samples that are used for nothing else. Frozen layers keep their batch statistics.

    Every policy starts from a new linear head in the place of the model's own, fitted to the frozen features by
    logistic regression, so that what retraining a layer gains is not what the head has yet to learn (linear
    probing, then fine-tuning). Where all unknown classes are known ones and the labels are places of the model's
    outputs, its own head stays if it is no worse than the new one on the validation samples, or cannot be replaced.

    Parameters
    ----------
    model : nn.Module
        A classifier. Copies of it are trained; afterwards it is bit for bit what it was.
    known : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        Data that the model knows, best not its training data. Where it has labels that are places of the model's
        outputs, what retraining makes the model forget is measured on it.
    unknown : as `known`
        Labelled data that the model does not know, to retrain on; at least two classes.
    test : as `known`, optional
        Unknown data to test on. None holds out samples of `unknown`, other ones for every seed.
    policies : iterable of iterables of str, optional
        The sets of layers to train with the head, instead of those above; the head alone is always among them.
    layers, head, input_layer, calls
        See `find_layers`.
    steps : int
        Of the optimizer, for every policy.
    batch_size : int
        Samples a step, for data that is not batched.
    learning_rates : sequence of float
    optimizer : callable (parameters, learning_rate) -> torch.optim.Optimizer, optional
        None is ``torch.optim.Adam``.
    n_seeds : int
        Repetitions with other splits and another order of samples, the same for all policies; a loader keeps its order.
    validation_size, test_size : float
        Without `test`, the share of the samples of each class that is held out to test on; and of the others, the share
        to choose the learning rate by.
    checkpoint : path, optional
        A file that what is done is written to after every policy; with it a sweep that was stopped goes on, and one
        that is asked for more policies or seeds does these alone. Needs an integer `random_state`. Model, data and
        settings must be the same; of `optimizer` the name is looked at, and what a ``functools.partial`` gives it.
    device, random_state, progress
        As in `ActivationSpread`.

    Returns
    -------
    LayerSweep

    Raises
    ------
    InvalidDataError, LayerNotFoundError, ReusedLayerError, UnsupportedModelError
        Before any training.

    Notes
    -----
    Where training diverges at a learning rate, that one is left out and named in the result; where it does at all of
    them, the policy has no accuracy and the others are kept. Weights are trained in the precision that they have, and
    those in float16 mostly diverge.

    References
    ----------
    Linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054. Tuning one part of a network: Lee et al.
    2022, arXiv 2210.11466.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> y = torch.arange(80) % 2
    >>> X = torch.randn(80, 4) + 2 * y[:, None]
    >>> sweep = rs.sweep_layers(model, (X, y), (-X, y), steps=20, n_seeds=1, random_state=0)
    >>> sweep.policies
    ('none', 'head', 'all')
    """
    check_alone("sweep_layers")
    options = _Options(
        steps=steps,
        batch_size=batch_size,
        learning_rates=learning_rates,
        optimizer=torch.optim.Adam if optimizer is None else optimizer,
        n_seeds=n_seeds,
        validation_size=validation_size,
        test_size=None if test is not None else test_size,
    ).checked()
    if checkpoint is not None:
        check_checkpoint(Path(checkpoint), random_state)
    seed = seed_of(random_state)
    home, dtype = model_place(model)
    place = home if device is None else check_device(device)
    known_data, unknown_data, test_data = (
        None
        if data is None
        else as_batches(data, name=name, batch_size=batch_size, device=place, dtype=dtype, seed=seed % 2**32)
        for data, name in ((known, "known"), (unknown, "unknown"), (test, "test"))
    )
    assert known_data is not None
    assert unknown_data is not None
    with autograd_on(), borrow(model, device=device, seed=seed) as lent:
        first = known_data.first()
        for data, name in ((unknown_data, "unknown"), (test_data, "test")):
            if data is not None:
                check_same_shape(input_shapes(first.inputs), data.first(), name=name)
        found = layers_of(lent, first, layers=layers, head=head, input_layer=input_layer, calls=calls)
        task = _Task.of(lent, found, known_data, unknown_data, test_data, options, seed)
        wanted: list[tuple[str, ...] | None] = [*policy_sets(found.names, policies)]
        if task.own_places is not None:
            wanted.insert(0, None)
        seen = (task.known, task.unknown, task.test)
        same = "" if checkpoint is None else fingerprint(lent, seen, _settings(task, options))
        done = Checkpoint(checkpoint, same)
        runs = [(trained, number) for number in range(options.n_seeds) for trained in wanted]
        total = sum(1 if trained is None else len(options.learning_rates) for trained, _ in runs)
        with progress_bar(what="retraining", progress=progress, total=total) as bar:
            trials = {}
            for trained, number in runs:
                trial = done.get(trained, number)
                if trial is None:
                    trial = _try(lent, task, trained, number, options, tick=bar.update)
                    done.put(trained, number, trial)
                else:
                    bar.update(1 if trained is None else len(options.learning_rates))
                trials[trained, number] = trial
    by_policy = {
        policy_name(trained, found.names): [trials[trained, number] for number in range(options.n_seeds)]
        for trained in wanted
    }
    return summarise(
        by_policy,
        trained=tuple(trained or () for trained in wanted),
        layers=found,
        new_head=tuple(head is not None for head in task.heads),
        known_before=task.known_before,
        learning_rates=tuple(options.learning_rates),
        n_samples=task.n_samples,
        seed=seed,
        same_test=test is not None,
        steps=options.steps,
        batch_size=options.batch_size,
    )


@dataclass(frozen=True)
class _Options:
    """How every policy is trained."""

    steps: int
    batch_size: int
    learning_rates: Sequence[float]
    optimizer: MakeOptimizer
    n_seeds: int
    validation_size: float
    test_size: float | None

    def checked(self) -> "_Options":
        """Refuse what cannot be; return the options in Python's own numbers, which can be saved."""
        for name in ("steps", "batch_size", "n_seeds"):
            check_number(name, getattr(self, name), whole=True)
        check_number("validation_size", self.validation_size, whole=False, below=1)
        if self.test_size is not None:
            check_number("test_size", self.test_size, whole=False, below=1)
        rates = [*self.learning_rates] if isinstance(self.learning_rates, Iterable) else []
        if not rates:
            raise InvalidDataError(
                "The 'learning_rates' parameter must be a sequence of at least one number. Got "
                f"{self.learning_rates!r} instead."
            )
        for rate in rates:
            check_number("learning_rates", rate, whole=False)
        if not callable(self.optimizer):
            raise InvalidDataError(
                "The 'optimizer' parameter must be a callable (parameters, learning_rate) -> Optimizer, such as "
                f"torch.optim.SGD. Got {self.optimizer!r} instead."
            )
        return replace(
            self,
            steps=int(self.steps),
            batch_size=int(self.batch_size),
            learning_rates=tuple(float(rate) for rate in rates),
            n_seeds=int(self.n_seeds),
        )


@dataclass(frozen=True)
class _Split:
    """Who sees which samples of the unknown data, by their positions."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class _Task:
    """What is to be learnt: data, classes, and the model that every policy starts from, one for each seed."""

    layers: Layers
    known: Batches
    unknown: Batches
    test: Batches
    classes: tuple[Label, ...]  # of the unknown data, in the order of a new head's outputs
    own_places: dict[Label, int] | None  # of these classes among the outputs of the model as given
    known_places: dict[Label, int] | None  # of the known classes among the outputs of the model as given
    known_before: float
    splits: tuple[_Split, ...]
    heads: tuple[nn.Linear | None, ...]
    n_samples: tuple[int, int, int, int]  # to train on, to validate and to test, and of the known data
    seed: int
    halving: Halving  # for what is only measured

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Layers,
        known: Batches,
        unknown: Batches,
        test: Batches | None,
        options: _Options,
        seed: int,
    ) -> "_Task":
        halving = Halving()
        with torch.no_grad():
            ends = [found for _, found in halving.run(known.first(), lambda batch: predictions_of(model, batch.inputs))]
        outputs = torch.cat(ends)
        _check_scores(outputs)
        n_outputs = outputs.shape[1]
        labels, known_labels = _labels(unknown), _labels(known)
        classes, known_classes = ordered_classes(labels), ordered_classes(known_labels)
        check_classes(classes, "unknown")
        if not unknown.indexed and _labels(unknown) != labels:
            raise InvalidDataError(
                "The unknown data comes in another order at every pass, so that test samples cannot be told from those "
                "to train on. Give (X, y), a Dataset, or a DataLoader that shuffles by torch's generators."
            )
        test_labels = [] if test is None else _labels(test)
        if test is not None:
            _check_test_classes(ordered_classes(test_labels), classes)
        splits = tuple(
            _split(labels, classes, options, np.random.default_rng([seed, number])) for number in range(options.n_seeds)
        )
        own = own_places(n_outputs, known_classes, classes)
        if own is not None and not layers.parameters[layers.head]:
            raise UnsupportedModelError(
                f"The head {layers.head!r} has no parameters to train. Name the last layer that has, with head=."
            )
        heads: tuple[nn.Linear | None, ...] = (None,) * len(splits)
        try:  # refused here, before any training, where a new head does not fit
            features, _ = collect_head_inputs(model, layers.head, unknown, halving)
            heads = tuple(
                _starting_head(model, layers.head, features, labels, classes, split, unknown, own, halving)
                for split in splits
            )
        except UnsupportedModelError:
            if own is None:
                raise
        known_places = output_places(n_outputs, known_classes)
        return cls(
            layers=layers,
            known=known,
            unknown=unknown,
            test=unknown if test is None else test,
            classes=classes,
            own_places=own,
            known_places=known_places,
            known_before=_mean(None if known_places is None else _hits(model, known, known_places, halving)),
            splits=splits,
            heads=heads,
            n_samples=(
                len(splits[0].train),
                len(splits[0].validation),
                len(test_labels) if splits[0].test is None else len(splits[0].test),
                len(known_labels),
            ),
            seed=seed,
            halving=halving,
        )

    def start(self, model: nn.Module, number: int) -> nn.Module:
        """Return a copy of the model as every policy starts from it."""
        head = self.heads[number]
        return copy_model(model) if head is None else with_head(model, self.layers.head, head)

    def places(self, number: int) -> dict[Label, int]:
        """Return which output of the starting model stands for which unknown class."""
        if self.heads[number] is None:
            assert self.own_places is not None
            return self.own_places
        return {label: place for place, label in enumerate(self.classes)}


def _starting_head(
    model: nn.Module,
    head: str,
    features: Tensor,
    labels: list[Label],
    classes: tuple[Label, ...],
    split: _Split,
    unknown: Batches,
    own: dict[Label, int] | None,
    halving: Halving,
) -> nn.Linear | None:
    """Fit a new head, or return None where the model's own is no worse on the validation samples."""
    fitted = fitted_head(features[torch.from_numpy(split.train)], [labels[row] for row in split.train], classes)
    renewed = with_head(model, head, fitted)
    with torch.no_grad():
        n_outputs = head_inputs(renewed, head, first_samples(unknown.first().inputs, 2))[1].shape[1]
    if n_outputs != len(classes):
        raise UnsupportedModelError(
            f"With a new head {head!r} for {len(classes)} classes the model returns {n_outputs} class scores. Name the "
            "layer that makes them with head=."
        )
    if own is None:
        return fitted
    validation = unknown.subset(split.validation)
    places = {label: place for place, label in enumerate(classes)}
    return (
        None
        if _hits(model, validation, own, halving).mean() >= _hits(renewed, validation, places, halving).mean()
        else fitted
    )


def _labels(batches: Batches) -> list[Label]:
    return [label for batch in batches for label in (batch.labels or (None,) * len(batch))]


def _check_scores(outputs: Tensor) -> None:
    """Refuse probabilities, on which cross-entropy would take the softmax a second time."""
    if outputs.shape[1] > 1 and (outputs >= 0).all() and (outputs.float().sum(dim=1) - 1).abs().max() < 1e-3:
        raise UnsupportedModelError(
            "The model returns probabilities, and cross-entropy takes class scores, as they are before the softmax. "
            "Leave the softmax out of the model: it changes no decision."
        )


def _check_test_classes(test: tuple[Label, ...], unknown: tuple[Label, ...]) -> None:
    if test == (None,):
        raise InvalidDataError("The test data has no labels, and this needs them. Give (X, y).")
    strange = [label for label in test if label not in unknown]
    if strange:
        raise InvalidDataError(
            f"The test data has classes that the unknown data lacks: {', '.join(map(repr, strange[:5]))}. Nothing can "
            "be learnt about them; leave them out."
        )


def _split(labels: list[Label], classes: tuple[Label, ...], options: _Options, rng: np.random.Generator) -> _Split:
    """Divide the samples of each class at random."""
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    least = 3 if options.test_size is not None else 2
    for label in classes:
        rows = rng.permutation([row for row, other in enumerate(labels) if other == label])
        n_test = 0 if options.test_size is None else max(1, round(options.test_size * len(rows)))
        n_validation = max(1, round(options.validation_size * (len(rows) - n_test)))
        if len(rows) - n_test - n_validation < 1:
            held_out = f"{n_validation} to validate{f' and {n_test} to test' if n_test else ''}"
            raise InvalidDataError(
                f"The unknown class {label!r} has {len(rows)} sample{'' if len(rows) == 1 else 's'}: with {held_out} "
                f"none is left to train on. Give at least {least}, better fifty, or hold out a smaller share."
            )
        for part, chosen in zip(parts, np.split(rows, [n_test, n_test + n_validation]), strict=True):
            part.append(chosen)
    test, validation, train = (np.sort(np.concatenate(part)) for part in parts)
    return _Split(train=train, validation=validation, test=None if options.test_size is None else test)


def _try(
    model: nn.Module,
    task: _Task,
    trained: tuple[str, ...] | None,
    number: int,
    options: _Options,
    *,
    tick: Callable[[], Any],
) -> Trial:
    """Retrain by one policy with every learning rate, and test what was best on the validation samples."""
    began = time.perf_counter()
    start_random(task.seed + number)  # so that a trial does not depend on those before it
    split = task.splits[number]
    validation = task.unknown.subset(split.validation)
    test = task.test if split.test is None else task.test.subset(split.test)
    if trained is None:
        tick()
        assert task.own_places is not None
        hits = _hits(model, test, task.own_places, task.halving)
        accuracy = _mean(_hits(model, validation, task.own_places, task.halving))
        return Trial(hits, task.known_before, (accuracy,), np.nan, time.perf_counter() - began)
    places = task.places(number)
    best: tuple[float, float] = (-np.inf, -np.inf)
    best_model, best_rate, validated = None, np.nan, []
    for rate in options.learning_rates:
        start = task.start(model, number)
        converged = _train(start, task, trained, number, rate, options)
        accuracy, loss = _validated(start, validation, places, task.halving) if converged else (np.nan, np.inf)
        validated.append(accuracy)
        if np.isfinite(accuracy) and (accuracy, -loss) > best:
            best, best_model, best_rate = (accuracy, -loss), start, rate
        tick()
    if best_model is None:
        return Trial(None, np.nan, tuple(validated), np.nan, time.perf_counter() - began)
    hits = _hits(best_model, test, places, task.halving)
    seconds = time.perf_counter() - began
    if task.known_places is None:
        known = None
    else:
        if task.heads[number] is not None:  # what the body still knows, seen through the head that it had
            best_model.set_submodule(task.layers.head, model.get_submodule(task.layers.head))
        known = _hits(best_model, task.known, task.known_places, task.halving)
    return Trial(hits, _mean(known), tuple(validated), best_rate, seconds)


def _train(
    model: nn.Module, task: _Task, trained: tuple[str, ...], number: int, rate: float, options: _Options
) -> bool:
    """Train some layers and the head; tell whether the loss stayed finite."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    head = [f"{task.layers.head}.{name}" for name, _ in model.get_submodule(task.layers.head).named_parameters()]
    owned = [*head, *(name for layer in (*trained, task.layers.head) for name in _owned(task.layers, layer))]
    ids = {id(tensors[name]) for name in owned if name in tensors}
    parameters = [parameter for parameter in model.parameters() if id(parameter) in ids]
    start_random(task.seed + number)
    with training(model, ids), memory_needed("in retraining", options.batch_size):
        model.train()
        optimizer = options.optimizer(parameters, rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / options.steps, options.steps)
        rows = task.splits[number].train
        for batch in _endless(replace(task.unknown, batch_size=options.batch_size), rows, task.seed + number, options):
            loss = nn.functional.cross_entropy(
                predictions_of(model, batch.inputs).float(), _targets(batch, task.places(number))
            )
            if not torch.isfinite(loss):
                return False
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()
    return True


def _owned(layers: Layers, name: str) -> tuple[str, ...]:
    return (*layers.parameters[name], *layers.buffers[name])


def _endless(batches: Batches, rows: NDArray[np.int64], seed: int, options: _Options) -> Iterator[Batch]:
    """Yield as many batches as there are steps, pass after pass, in another order each time."""
    taken, epoch, single = 0, 0, False
    while True:
        epoch, before = epoch + 1, taken
        pass_seed = (seed + 7919 * epoch) % 2**32
        for place, batch in enumerate(batches.subset(rows, order_seed=pass_seed)):
            if place == 0:
                start_random(pass_seed)  # a stream has just started them where it did at the pass before
            if len(batch) < 2 and not single:  # batch normalisation needs two
                continue
            yield batch
            taken += 1
            if taken == options.steps:
                return
        single = single or taken == before  # there are no others


def _targets(batch: Batch, places: dict[Label, int]) -> Tensor:
    return torch.tensor([places[label] for label in batch.labels or ()], device=batch.device)


@torch.no_grad()
def _hits(model: nn.Module, batches: Batches, places: dict[Label, int], halving: Halving) -> NDArray[np.bool_]:
    """Tell for each sample whether its class has the highest output, in the order of positions."""
    rows, hits = [], []
    for outputs, targets, positions in _predicted(model, batches, places, halving):
        right = outputs.argmax(dim=1) == targets
        hits.append((right & ~outputs.isnan().any(dim=1)).cpu().numpy())  # argmax takes NaN for the highest
        rows.append(positions)
    found: NDArray[np.bool_] = np.concatenate(hits)[np.argsort(np.concatenate(rows))]
    return found


@torch.no_grad()
def _validated(model: nn.Module, batches: Batches, places: dict[Label, int], halving: Halving) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy."""
    found = [(outputs.float(), targets) for outputs, targets, _ in _predicted(model, batches, places, halving)]
    scores, truth = (torch.cat(each) for each in zip(*found, strict=True))
    loss = float(nn.functional.cross_entropy(scores, truth))
    return (float((scores.argmax(dim=1) == truth).float().mean()) if np.isfinite(loss) else np.nan), loss


def _predicted(
    model: nn.Module, batches: Batches, places: dict[Label, int], halving: Halving
) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
    """Yield outputs, targets and positions."""
    for batch in replace(batches, batch_size=max(batches.batch_size, _EVALUATED)):
        for piece, outputs in halving.run(batch, lambda piece: predictions_of(model, piece.inputs)):
            yield outputs, _targets(piece, places), piece.positions


def _mean(hits: NDArray[np.bool_] | None) -> float:
    return np.nan if hits is None else float(hits.mean())


def _settings(task: _Task, options: _Options) -> str:
    """Write down all that decides a trial beside model and data; more seeds are more trials, and change no other."""
    owned = (task.layers.head, task.layers.parameters, task.layers.buffers)
    plain = replace(options, optimizer=name_of(options.optimizer), n_seeds=1)  # type: ignore[arg-type]
    return repr((plain, task.seed, owned, task.n_samples))
