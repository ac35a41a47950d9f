"""The head of a classifier: which output stands for which class, what goes in, and a new one in its place."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.batches import Batch, Inputs, Label
from retrainscope.exceptions import InvalidDataError, NonFiniteError, UnsupportedModelError
from retrainscope.lending import copy_model
from retrainscope.memory import Halving
from retrainscope.outputs import output_of
from retrainscope.tracing import call_model, named_layers

__all__ = [
    "check_classes",
    "check_new_head",
    "class_scores",
    "collect_head_inputs",
    "fit_head",
    "fitted_head",
    "head_inputs",
    "output_places",
    "own_places",
    "predictions_of",
    "set_head",
    "with_head",
]


def output_places(n_outputs: int, classes: Iterable[Label]) -> dict[Label, int] | None:
    """Tell which of a model's outputs stands for which class, or None where labels do not tell.

    Labels that are whole numbers from 0 to n_outputs - 1 are places, as PyTorch's losses take them.
    """
    classes = list(classes)
    whole = all(isinstance(label, int) and not isinstance(label, bool) and 0 <= label < n_outputs for label in classes)
    return {label: label for label in classes if isinstance(label, int)} if whole else None


def own_places(n_outputs: int, known: Iterable[Label], unknown: Iterable[Label]) -> dict[Label, int] | None:
    """Tell which outputs stand for the unknown classes, where they are known ones and the labels are places; else None.

    A model can only be used as it is, and its head only be trained further, where this is not None.
    """
    known, unknown = list(known), list(unknown)
    places = output_places(n_outputs, known)
    return None if places is None or not set(unknown) <= set(known) else {label: places[label] for label in unknown}


def predictions_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return a classifier's outputs, of shape (n_samples, n_outputs).

    Raises
    ------
    UnsupportedModelError
        If they have another shape.
    """
    return class_scores(model, call_model(model, inputs))


def class_scores(model: nn.Module, returned: Any) -> Tensor:
    """Return a classifier's outputs, of shape (n_samples, n_outputs), from what it has returned.

    Raises
    ------
    UnsupportedModelError
        If they have another shape.
    """
    outputs = output_of(model, returned)
    if outputs is None or outputs.ndim != 2:
        got = "no tensor" if outputs is None else f"shape (n_samples, {', '.join(map(str, outputs.shape[1:]))})"
        raise UnsupportedModelError(
            f"The model must return one row of class scores a sample, of shape (n_samples, n_classes). Got {got}."
        )
    return outputs


def head_inputs(model: nn.Module, head: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run a classifier on a batch; return what goes into its head, and its outputs.

    Returns
    -------
    features : Tensor of shape (n_samples, n_features)
        Part of the autograd graph.
    outputs : Tensor of shape (n_samples, n_outputs)

    Raises
    ------
    UnsupportedModelError
        If the head does not take one tensor with one row a sample.
    """
    taken: list[Any] = []
    handle = named_layers(model, [head], what="head")[head].register_forward_pre_hook(
        lambda _module, args: taken.append(args[0] if args else None)
    )
    try:
        outputs = predictions_of(model, inputs)
    finally:
        handle.remove()
    features = taken[-1] if taken else None
    if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(outputs):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UnsupportedModelError(
            f"The head {head!r} must take one tensor with one row a sample. Got {got} for {len(outputs)} samples. Name "
            "the last linear layer with head=."
        )
    return features.flatten(start_dim=1), outputs


def collect_head_inputs(
    model: nn.Module, head: str, batches: Iterable[Batch], halving: Halving
) -> tuple[Tensor, list[Label]]:
    """Run over data without gradients and keep what goes into the head.

    Returns
    -------
    features : Tensor of shape (n_samples, n_features)
    labels : list of n_samples labels
    """
    features, labels = [], list[Label]()
    with torch.no_grad():
        for batch in batches:
            for _, found in halving.run(batch, lambda piece: head_inputs(model, head, piece.inputs)[0].clone()):
                features.append(found)
            labels += batch.labels or (None,) * len(batch)
    return torch.cat(features), labels


def fit_head(features: Tensor, targets: Tensor, n_classes: int) -> nn.Linear:
    """Fit a linear head to features by logistic regression.

    Features are standardised for the fit (L2 penalty, C = 1), so that their scale does not decide how strong the
    penalty is; the weights are those for the features as they are.

    Parameters
    ----------
    features : Tensor of shape (n_samples, n_features)
    targets : Tensor of shape (n_samples,)
        Class places from 0 to n_classes - 1, each of them there.
    n_classes : int
        At least two.

    Returns
    -------
    nn.Linear
        On the device and of the type of the features.

    Raises
    ------
    NonFiniteError
        If a feature is NaN or infinite.
    """
    from sklearn.linear_model import LogisticRegression  # here, as to import them takes as long as all else here
    from sklearn.preprocessing import StandardScaler

    X: NDArray[np.float64] = features.detach().double().cpu().numpy()
    if not np.isfinite(X).all():
        raise NonFiniteError(
            "What goes into the head has NaN or infinity. Remove the samples that cause it or, if the model is in half "
            "precision, give model.float()."
        )
    scaler = StandardScaler().fit(X)
    fitted = LogisticRegression(max_iter=2000).fit(scaler.transform(X), targets.cpu().numpy())
    weight, bias = fitted.coef_, fitted.intercept_
    if n_classes == 2:  # scikit-learn keeps the log odds alone
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    head = nn.Linear(X.shape[1], n_classes, device="meta").to_empty(device=features.device).to(features.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return head


def fitted_head(features: Tensor, labels: Iterable[Label], classes: tuple[Label, ...]) -> nn.Linear:
    """Fit a linear head to features and labels, whose classes stand in the order given."""
    place = {label: number for number, label in enumerate(classes)}
    return fit_head(features, torch.tensor([place[label] for label in labels]), len(classes))


def with_head(model: nn.Module, head: str, linear: nn.Linear) -> nn.Module:
    """Return a copy of a model with a new linear head.

    Raises
    ------
    UnsupportedModelError
        If the head is no ``nn.Linear`` of as many inputs.
    """
    old = named_layers(model, [head], what="head")[head]
    if isinstance(old, nn.Linear) and old.in_features != linear.in_features:
        raise UnsupportedModelError(
            f"The head {head!r} takes {old.in_features} features, and {linear.in_features} go into it for a sample: it "
            "runs at several places, and a new head for new classes cannot take its place. Name another with head=."
        )
    if not isinstance(old, nn.Linear):
        raise UnsupportedModelError(
            f"The head {head!r} is a {type(old).__name__}; a new head for new classes can take the place of an "
            "nn.Linear only. Name another with head=, or give the model outputs for the unknown classes and number "
            "the labels by them."
        )
    renewed = copy_model(model)
    set_head(renewed, head, copy.deepcopy(linear).to(old.weight.dtype))  # other than what autocast lets go in
    return renewed


def set_head(model: nn.Module, head: str, new: nn.Module) -> None:
    """Put a module in the place of the head, under each of its names."""
    old = model.get_submodule(head)
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)


def check_new_head(model: nn.Module, head: str, n_classes: int, inputs: Inputs) -> None:
    """Refuse a model that does not return what its new head puts out."""
    with torch.no_grad():
        n_outputs = head_inputs(model, head, inputs)[1].shape[1]
    if n_outputs != n_classes:
        raise UnsupportedModelError(
            f"With a new head {head!r} for {n_classes} classes the model returns {n_outputs} class scores. Name the "
            "layer that makes them with head=."
        )


def check_classes(classes: tuple[Label, ...], name: str) -> None:
    """Refuse data without labels, or of one class."""
    if classes == (None,):
        raise InvalidDataError(f"The {name} data has no labels, and this needs them. Give (X, y).")
    if len(classes) < 2:
        raise InvalidDataError(
            f"The {name} data has one class ({classes[0]!r}); at least two are needed to tell right from wrong."
        )
