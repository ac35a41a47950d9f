"""Retrain by one policy of a sweep, and test what came of it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrainscope.batches import Batch, Batches
from retrainscope.evaluating import hits_of, mean_of, targets_of, validated
from retrainscope.freezing import training
from retrainscope.heads import predictions_of, set_head
from retrainscope.layers import Layers
from retrainscope.lending import start_random
from retrainscope.memory import memory_needed
from retrainscope.normalisation import not_synchronised
from retrainscope.precision import asked_precision
from retrainscope.sweep_task import Options, Task
from retrainscope.trials import Trial

__all__ = ["try_policy"]

_LOSS_SCALE = 2.0**10


def try_policy(
    model: nn.Module,
    task: Task,
    trained: tuple[str, ...] | None,
    number: int,
    options: Options,
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
        hits = hits_of(model, test, task.own_places, task.halving)
        accuracy = mean_of(hits_of(model, validation, task.own_places, task.halving))
        return Trial(hits, task.known_before, (accuracy,), np.nan, time.perf_counter() - began)
    places = task.places(number)
    best: tuple[float, float] = (-np.inf, -np.inf)
    best_model, best_rate, accuracies = None, np.nan, list[float]()
    for rate in options.learning_rates:
        start = task.start(model, number)
        converged = _train(start, task, trained, number, rate, options)
        accuracy, loss = validated(start, validation, places, task.halving) if converged else (np.nan, np.inf)
        accuracies.append(accuracy)
        if np.isfinite(accuracy) and (accuracy, -loss) > best:
            best, best_model, best_rate = (accuracy, -loss), start, rate
        tick()
    if best_model is None:
        return Trial(None, np.nan, tuple(accuracies), np.nan, time.perf_counter() - began)
    hits = hits_of(best_model, test, places, task.halving)
    seconds = time.perf_counter() - began
    if task.known_places is None:
        known = None
    else:
        if task.heads[number] is not None:  # what the body still knows, seen through the head that it had
            set_head(best_model, task.layers.head, model.get_submodule(task.layers.head))
        known = hits_of(best_model, task.known, task.known_places, task.halving)
    return Trial(hits, mean_of(known), tuple(accuracies), best_rate, seconds)


def _train(model: nn.Module, task: Task, trained: tuple[str, ...], number: int, rate: float, options: Options) -> bool:
    """Train some layers and the head; tell whether the loss stayed finite."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    head = [f"{task.layers.head}.{name}" for name, _ in model.get_submodule(task.layers.head).named_parameters()]
    owned = [*head, *(name for layer in (*trained, task.layers.head) for name in _owned(task.layers, layer))]
    ids = {id(tensors[name]) for name in owned if name in tensors}
    parameters = [parameter for parameter in model.parameters() if id(parameter) in ids]
    start_random(task.seed + number)
    with training(model, ids), not_synchronised(model.modules()), memory_needed("in retraining", options.batch_size):
        model.train()
        optimizer = options.optimizer(parameters, rate)
        scaler = _scaler(model, task.unknown.device)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / options.steps, options.steps)
        rows = task.splits[number].train
        for batch in _endless(replace(task.unknown, batch_size=options.batch_size), rows, task.seed + number, options):
            loss = nn.functional.cross_entropy(
                predictions_of(model, batch.inputs).float(), targets_of(batch, task.places(number))
            )
            if not torch.isfinite(loss):
                return False
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:  # else the step was left out
                schedule.step()
    model.eval()
    return True


def _scaler(model: nn.Module, device: torch.device) -> torch.amp.GradScaler:
    """Return what keeps the small gradients of float16; it does nothing elsewhere."""
    asked = asked_precision(device) == torch.float16 and all(p.dtype != torch.float16 for p in model.parameters())
    return torch.amp.GradScaler(device.type, init_scale=_LOSS_SCALE, enabled=asked)


def _owned(layers: Layers, name: str) -> tuple[str, ...]:
    return (*layers.parameters[name], *layers.buffers[name])


def _endless(batches: Batches, rows: NDArray[np.int64], seed: int, options: Options) -> Iterator[Batch]:
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
