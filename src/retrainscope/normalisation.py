"""Batch normalisation under other data: its running statistics, re-estimated for a while."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrainscope.batches import Batch
from retrainscope.tracing import call_model

__all__ = ["not_synchronised", "renewed_statistics", "running_norms"]


def running_norms(model: nn.Module, buffers: Iterable[str]) -> tuple[nn.Module, ...]:
    """Return the batch normalisations that these buffers belong to and that would renew them in training."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in buffers)
    modules = [model.get_submodule(owner) for owner in owners]
    return tuple(m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None and _trains(m))


def _trains(module: nn.Module) -> bool:
    """Tell whether a module can be put into training mode; frozen kinds stay out of it."""
    before = [(part, part.training) for part in module.modules()]
    try:
        return module.train().training
    finally:
        for part, flag in before:
            part.training = flag


@contextmanager
def not_synchronised(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let synchronised batch normalisations do without the other processes, which are elsewhere."""
    with ExitStack() as opened:
        for module in modules:
            if isinstance(module, nn.SyncBatchNorm) and "forward" not in vars(module):
                vars(module)["forward"] = partial(_BatchNorm.forward, module)
                opened.callback(vars(module).pop, "forward")
        yield


@contextmanager
def renewed_statistics(model: nn.Module, norms: Sequence[nn.Module], batches: Iterable[Batch]) -> Iterator[None]:
    """Give batch normalisations the statistics of some data, as training does without a step, while the context lasts.

    One pass over the data in their training mode, everything else in evaluation mode; the mean over batches is kept.
    Synchronised ones do it alone, without the other processes.
    Batches of one sample are left out, which have no variance; where there are no others, nothing changes.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    norms : sequence of nn.Module
        From `running_norms`.
    batches : iterable of Batch
        Best in random order.

    References
    ----------
    Y. Li et al. (2016), Revisiting batch normalization for practical domain adaptation, arXiv 1603.04779.
    """
    tables = [dict(norm._buffers) for norm in norms]
    momenta = [norm.momentum for norm in norms]
    opened = ExitStack()
    try:
        opened.enter_context(not_synchronised(norms))  # each process renews statistics for other layers, or on its own
        for norm, table in zip(norms, tables, strict=True):
            norm._buffers.update({name: old.clone() for name, old in table.items() if old is not None})
            norm.reset_running_stats()  # type: ignore[operator]
            norm.momentum = None  # type: ignore[assignment] # a plain mean over the batches
            norm.training = True  # not by train(), which would take what is inside along
        seen = 0
        with torch.no_grad():
            for batch in batches:
                if len(batch) > 1:
                    call_model(model, batch.inputs)
                    seen += 1
        for norm, table in zip(norms, tables, strict=True):
            norm.training = False
            if not seen:
                norm._buffers.update(table)
        yield
    finally:
        opened.close()
        for norm, table, momentum in zip(norms, tables, momenta, strict=True):
            norm.training = False
            norm._buffers.clear()
            norm._buffers.update(table)
            norm.momentum = momentum
