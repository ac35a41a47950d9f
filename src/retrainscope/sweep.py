"""`sweep_layers`: retrain and see, the ground truth that advice is held against."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrainscope.batches import Label, as_batches, input_shapes
from retrainscope.checkpoints import Checkpoint, check_checkpoint, fingerprint, name_of
from retrainscope.checks import check_device, check_number
from retrainscope.layers import layers_of
from retrainscope.lending import autograd_on, borrow, model_place
from retrainscope.policies import policy_name, policy_sets
from retrainscope.precision import asked_precision
from retrainscope.predicted import checked_groups
from retrainscope.processes import agree, digest_of, from_first, in_step, in_turns, rank
from retrainscope.progress import progress_bar
from retrainscope.reference import check_same_shape
from retrainscope.retraining import try_policy
from retrainscope.shares import check_same, everywhere, same_seed
from retrainscope.sweep_task import MakeOptimizer, Options, Task
from retrainscope.trials import LayerSweep, Trial, summarise

__all__ = ["sweep_layers"]

Run = tuple[tuple[str, ...] | None, int]  # the layers that a policy trains, and the number of the seed


@in_step()
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
    groups: Sequence[Label] | NDArray[Any] | None = None,
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
    groups : sequence of n_samples labels, optional
        What each sample of the unknown data is a part of (a video, a patient, a photograph), in the order of the data.
        Whole groups are held out: near copies of what is trained on would flatter most who learns by heart.
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
    those in float16 mostly diverge. Inside of ``torch.autocast`` the forward passes follow it, and weights keep their
    precision; for float16 losses are scaled, and steps left out whose gradients overflow.

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
    if test is None:
        check_number("test_size", test_size, whole=False, below=1)
    options = Options(
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
    seed = same_seed(random_state)
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
    if groups is not None:
        groups = checked_groups(groups, unknown_data, unknown_data.n_samples)
    asked = str(asked_precision(place))
    given = {"checkpoint": None if checkpoint is None else "given", "options": repr(_plain(options))}
    given["groups"] = digest_of([], groups)
    with autograd_on(), borrow(model, device=device, seed=seed) as lent:
        check_same(
            given | {"torch.autocast": asked},
            model,
            *(data for data in (known_data, unknown_data, test_data) if data is not None),
        )
        known_data, unknown_data = everywhere(known_data), everywhere(unknown_data)
        test_data = None if test_data is None else everywhere(test_data)
        first = known_data.few()
        for data, name in ((unknown_data, "unknown"), (test_data, "test")):
            if data is not None:
                check_same_shape(input_shapes(first.inputs), data.few(), name=name)
        found = layers_of(lent, first, layers=layers, head=head, input_layer=input_layer, calls=calls)
        task = Task.of(lent, found, known_data, unknown_data, test_data, options, seed, groups)
        wanted: list[tuple[str, ...] | None] = [*policy_sets(found.names, policies)]
        if task.own_places is not None:
            wanted.insert(0, None)
        seen = (task.known, task.unknown, task.test)
        same = "" if checkpoint is None else fingerprint(lent, seen, _settings(task, options, groups))
        agree({"the policies": repr(wanted)})
        done = Checkpoint(checkpoint if rank() == 0 else None, same)  # process 0 alone reads and writes the file
        runs = [(trained, number) for number in range(options.n_seeds) for trained in wanted]
        total = sum(_n_rates(run, options) for run in runs)
        with progress_bar(what="retraining", progress=progress, total=total) as bar:
            trials = from_first("what is done", {run: trial for run in runs if (trial := done.get(*run)) is not None})
            finished = sum(_n_rates(run, options) for run in trials)
            bar.update(finished)
            left = [run for run in runs if run not in trials]
            work = partial(_tried, lent, task, options, bar.update)
            for run, trial in zip(left, in_turns("the trials", left, work), strict=True):
                done.put(*run, trial)
                trials[run] = trial
                finished += _n_rates(run, options)
                bar.update(finished - bar.n)
    by_policy = {
        policy_name(trained, found.names): [trials[trained, number] for number in range(options.n_seeds)]
        for trained in wanted
    }
    sweep = summarise(
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
    return from_first("the sweep", sweep)


def _tried(model: nn.Module, task: Task, options: Options, tick: Callable[[], Any], run: Run) -> Trial:
    return try_policy(model, task, *run, options, tick=tick)


def _n_rates(run: Run, options: Options) -> int:
    """Return how many learning rates a policy is tried with."""
    return 1 if run[0] is None else len(options.learning_rates)


def _settings(task: Task, options: Options, groups: Any) -> str:
    """Write down all that decides a trial beside model and data; more seeds are more trials, and change no other."""
    owned = (task.layers.head, task.layers.parameters, task.layers.buffers)
    return repr((replace(_plain(options), n_seeds=1), task.seed, owned, task.n_samples, groups))


def _plain(options: Options) -> Options:
    """Write an optimizer by its name, which is the same in every process."""
    return replace(options, optimizer=name_of(options.optimizer))  # type: ignore[arg-type]
