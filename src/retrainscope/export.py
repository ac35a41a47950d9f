"""The advice for the tools that people fine-tune with: Lightning, PEFT, finetuning-scheduler, timm and skorch."""

import glob
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from retrainscope.advice import Recommendation
from retrainscope.exceptions import InvalidDataError, MissingExtraError, UnsupportedModelError
from retrainscope.finetuning import freeze_rest, rows_to_train, tensors_to_train
from retrainscope.lora import lora_config
from retrainscope.saving import write_text
from retrainscope.tracing import named_layers

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import BaseFinetuning
    from skorch.callbacks import Callback

__all__ = [
    "finetuning_schedule",
    "lightning_callback",
    "lora_config",
    "parameter_patterns",
    "skorch_freezer",
    "timm_frozen",
]


def parameter_patterns(rec: Recommendation) -> list[str]:
    """Return the parameters to train as patterns, for tools that choose parameters by name.

    Parameters
    ----------
    rec : Recommendation

    Returns
    -------
    list of str
        Patterns of `fnmatch`: ``"layer4.*"`` where all that the module layer4 owns is to be trained, else full names.
        A parameter that the forward pass does not use is owned by no layer and may be among those that a pattern fits.

    Raises
    ------
    InvalidDataError
        If nothing is to be trained, or names are given instead of advice.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> from retrainscope.export import parameter_patterns
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> y = torch.arange(80) % 2
    >>> X = torch.randn(80, 2) + 6 * y[:, None]
    >>> rec = rs.recommend_layers(model, (X, y), (X + 1, y + 2), random_state=0)  # novel classes: train the head
    >>> parameter_patterns(rec)[-1]
    '2.*'
    """
    trained = [name for row in rows_to_train(rec) for name in row.parameters]
    frozen = {name for row in (*rec.table, rec.head) for name in row.parameters} - set(trained)
    mixed = {prefix for name in frozen for prefix in _prefixes(name)}

    def pattern(name: str) -> str:
        whole = next((prefix for prefix in _prefixes(name) if prefix not in mixed), None)
        return glob.escape(name) if whole is None else f"{glob.escape(whole)}*"

    return [*dict.fromkeys(map(pattern, trained))]


def _prefixes(name: str) -> list[str]:
    """Return the beginnings of a parameter's name that are modules, the model itself (an empty one) first."""
    parts = name.split(".")
    return ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts))]


def lightning_callback(rec: Recommendation, *, attribute: str | None = None) -> "BaseFinetuning":
    """Return a callback for Lightning's ``Trainer`` that freezes what is not to be trained, as `freeze_rest` does.

    Frozen are the parameters, and in every epoch frozen batch normalisation and dropout run in evaluation mode.
    Nothing is unfrozen later, not after the training either: see `unfreeze`.

    Parameters
    ----------
    rec : Recommendation
    attribute : str, optional
        Where in the ``LightningModule`` the model lies that the advice is for, such as ``"model"``; what lies outside
        of it is left as it is. None: it is the ``LightningModule`` itself.

    Returns
    -------
    lightning.pytorch.callbacks.BaseFinetuning
        Or that of ``pytorch_lightning``, if that alone is installed or imported before.

    Raises
    ------
    InvalidDataError
        If nothing is to be trained, or names are given instead of advice.
    LayerNotFoundError
        When training begins, if the model lacks the attribute, or parameters of the advice.
    MissingExtraError
        If neither package is installed.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> from retrainscope.export import lightning_callback
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> y = torch.arange(80) % 2
    >>> X = torch.randn(80, 2) + 6 * y[:, None]
    >>> rec = rs.recommend_layers(model, (X, y), (X + 1, y + 2), random_state=0)
    >>> callback = lightning_callback(rec, attribute="model")
    >>> [base.__name__ for base in type(callback).__bases__]
    ['BaseFinetuning']

    It goes into ``Trainer(callbacks=[callback])``; docs/export.md trains with it.
    """
    rows_to_train(rec)

    class FreezeRest(_lightning_callbacks().BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: nn.Module) -> None:
            inside = None if attribute is None else named_layers(pl_module, [attribute], what="attribute")[attribute]
            freeze_rest(pl_module if inside is None else inside, rec)

        def finetune_function(self, pl_module: nn.Module, epoch: int, optimizer: Any) -> None:
            pass

        def __reduce__(self) -> Any:  # a class made inside a function cannot be pickled by its name
            return partial(lightning_callback, attribute=attribute), (rec,)

    return FreezeRest()


def _lightning_callbacks() -> Any:
    packages = ("lightning.pytorch", "pytorch_lightning")
    for package in sorted(packages, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(f"{package}.callbacks")
        except ImportError:
            continue
    raise MissingExtraError.for_package("lightning", "lightning")


def skorch_freezer(rec: Recommendation) -> "Callback":
    """Return a callback for skorch that freezes what is not to be trained, as `freeze_rest` does.

    skorch's own ``Freezer`` leaves the statistics of batch normalisation and dropout alone; this does not. Nothing is
    unfrozen later: see `unfreeze`.

    Parameters
    ----------
    rec : Recommendation
        For the net's ``module_``.

    Returns
    -------
    skorch.callbacks.Callback

    Raises
    ------
    InvalidDataError
        If nothing is to be trained, or names are given instead of advice.
    LayerNotFoundError
        When training begins, if the module lacks parameters of the advice.
    MissingExtraError
        If skorch is not installed.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> from retrainscope.export import skorch_freezer
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> y = torch.arange(80) % 2
    >>> X = torch.randn(80, 2) + 6 * y[:, None]
    >>> rec = rs.recommend_layers(model, (X, y), (X + 1, y + 2), random_state=0)
    >>> callback = skorch_freezer(rec)
    >>> [base.__name__ for base in type(callback).__bases__]
    ['Callback']

    It goes into ``NeuralNetClassifier(callbacks=[callback])``; docs/export.md trains with it.
    """
    rows_to_train(rec)
    try:
        from skorch.callbacks import Callback
    except ImportError as error:
        raise MissingExtraError.for_package("skorch", "skorch") from error

    class FreezeRest(Callback):  # type: ignore[misc]
        def on_train_begin(self, net: Any, **_: Any) -> None:
            freeze_rest(net.module_, rec)

        def __reduce__(self) -> Any:  # nets are pickled with their callbacks
            return skorch_freezer, (rec,)

    return FreezeRest()


def finetuning_schedule(
    rec: Recommendation, path: str | Path | None = None, *, attribute: str | None = None
) -> dict[int, dict[str, list[str]]]:
    """Return a schedule for the finetuning-scheduler whose one phase trains the advised parameters.

    The scheduler keeps neither the statistics of frozen batch normalisation nor dropout still: call `freeze_rest` on
    the model first.

    Parameters
    ----------
    rec : Recommendation
    path : path, optional
        A YAML file to write it to as well.
    attribute : str, optional
        Where in the ``LightningModule`` the model lies, such as ``"model"``; None: it is the model itself.

    Returns
    -------
    dict
        ``{0: {"params": [names]}}``, for ``FinetuningScheduler(ft_schedule=...)``. Further phases can be added.

    Raises
    ------
    InvalidDataError
        If nothing is to be trained, or names are given instead of advice.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> from retrainscope.export import finetuning_schedule
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> y = torch.arange(80) % 2
    >>> X = torch.randn(80, 2) + 6 * y[:, None]
    >>> rec = rs.recommend_layers(model, (X, y), (X + 1, y + 2), random_state=0)
    >>> finetuning_schedule(rec, attribute="model")[0]["params"][-2:]
    ['model.2.weight', 'model.2.bias']

    docs/export.md trains by it.
    """
    prefix = "" if attribute is None else f"{attribute}."
    names = [f"{prefix}{name}" for row in rows_to_train(rec) for name in row.parameters]
    if path is not None:
        # A JSON string is a YAML string too.
        write_text(path, "0:\n  params:\n" + "".join(f"  - {json.dumps(name)}\n" for name in names))
    return {0: {"params": names}}


def timm_frozen(rec: Recommendation, model: nn.Module) -> list[str]:
    """Return the modules to freeze, for ``timm.utils.freeze(model, names)``.

    timm freezes the parameters in them and the statistics of their batch normalisation, but leaves dropout and
    stochastic depth on; `freeze_rest` does not.

    Parameters
    ----------
    rec : Recommendation
    model : nn.Module

    Returns
    -------
    list of str
        The largest modules of which nothing is to be trained, in the order of the model.

    Raises
    ------
    InvalidDataError
        If nothing is to be trained, or nothing frozen (of no names timm would freeze everything).
    LayerNotFoundError
        If the model lacks parameters of the advice.
    UnsupportedModelError
        If a parameter is to be frozen that lies beside modules to be trained, in no module of its own, as the
        position embedding of a vision transformer, or the statistics of a batch normalisation for other than images.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> from retrainscope.export import timm_frozen
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> y = torch.arange(80) % 2
    >>> X = torch.randn(80, 2) + 6 * y[:, None]
    >>> rec = rs.recommend_layers(model, (X, y), (X + 1, y + 2), random_state=0)
    >>> timm_frozen(rec, model)
    ['0']

    docs/export.md freezes with it.
    """
    trained = {id(tensor) for tensors in tensors_to_train(model, rec).values() for tensor in tensors.values()}
    names = _frozen_modules("", model, trained)
    if not names:
        raise InvalidDataError("Everything is to be trained, so there is nothing to freeze. Leave timm's freeze out.")
    for name in names:
        for place, module in model.get_submodule(name).named_modules(prefix=name):
            images = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
            if isinstance(module, _NormBase) and module.track_running_stats and not images:
                raise UnsupportedModelError(
                    f"timm does not freeze the statistics of {place!r} ({type(module).__name__}). Use "
                    "retrainscope.freeze_rest(model, rec) instead."
                )
    return names


def _frozen_modules(name: str, module: nn.Module, trained: set[int]) -> list[str]:
    tensors = [*module.parameters(), *module.buffers()]
    if not any(id(tensor) in trained for tensor in tensors):
        return [name] if tensors else []
    for key, parameter in module.named_parameters(prefix=name, recurse=False):
        if id(parameter) not in trained:
            raise UnsupportedModelError(
                f"timm freezes whole modules, and {key!r} is to be frozen in one that is trained. Use "
                "retrainscope.freeze_rest(model, rec) instead."
            )
    children = [(f"{name}.{key}".removeprefix("."), child) for key, child in module.named_children()]
    return [frozen for key, child in children for frozen in _frozen_modules(key, child, trained)]
