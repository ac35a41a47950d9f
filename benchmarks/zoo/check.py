"""The check of one model: layers found, every parameter owned once, the spread measured, the model untouched."""

import hashlib
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import models
import numpy as np
import tiny
import torch
from models import Inputs, Specimen
from torch import Generator, Tensor, nn

import retrainscope as rs
from retrainscope.exceptions import RetrainscopeError

NAMES: dict[str, Callable[[], list[str]]] = {
    "torchvision": models.torchvision_names,
    "timm": models.timm_names,
    "transformers": tiny.names,
}
BUILDERS: dict[str, Callable[[str], Specimen]] = {
    "torchvision": models.build_torchvision,
    "timm": models.build_timm,
    "transformers": tiny.build,
}
N_CLASSES, N_SAMPLES, BATCH_SIZE = 3, 12, 6
MOST_LAYERS = 24
LEAST_FINITE = 0.8  # of the layers: some of a random network put out the same for all samples
HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass
class Outcome:
    """What became of one model: works, refused (by the library, in words), fails or not built, and why."""

    outcome: str = "works"
    reason: str = ""
    seconds: float = 0.0
    parameters: int = 0
    unused: int = 0
    layers: int = 0
    silent_layers: int = 0  # without a finite score
    first: str = ""
    last: str = ""
    head: str = ""


class Violated(Exception):  # noqa: N818 -- a finding, not an error of the program
    """Something is other than the library promises."""


def try_model(library: str, name: str) -> Outcome:
    """Build a model and check it."""
    warnings.simplefilter("ignore")
    found, start = Outcome(), time.perf_counter()
    try:
        _seed(0)
        specimen = BUILDERS[library](name)
    except Exception as error:
        found.outcome, found.reason = "not built", _told(error)
    else:
        try:
            _check(specimen, found)
        except RetrainscopeError as error:
            found.outcome, found.reason = "refused", _told(error)
        except Exception as error:
            found.outcome, found.reason = "fails", _told(error)
    found.seconds = round(time.perf_counter() - start, 2)
    return found


def _check(specimen: Specimen, found: Outcome) -> None:
    """Measure a model, noting in `found` what there is, and look at what the measuring says and leaves behind."""
    model, input_layer = specimen.model.train(), specimen.input_layer
    parameters = list(model.parameters())
    found.parameters = sum(parameter.numel() for parameter in parameters)
    parameters[0].requires_grad_(False)  # so that there is something to lose
    parameters[-1].grad = torch.ones_like(parameters[-1])
    known, unknown = (_labelled(specimen.samples(N_SAMPLES, Generator().manual_seed(seed))) for seed in (1, 2))
    with unchanged(model):
        layers = rs.find_layers(model, known, input_layer=input_layer)
    found.layers, found.head, found.unused = len(layers.names), layers.head, len(layers.unused)
    found.first, found.last = layers.names[0], layers.names[-1]
    _check_layers(model, layers)
    with unchanged(model):
        spread = rs.ActivationSpread(model, input_layer=input_layer, random_state=0, batch_size=BATCH_SIZE)
        scores = spread.fit(known).score_layers(unknown)
    _demand(scores.layers == layers.names, "the scores are of other layers than those found")
    found.silent_layers = int((~np.isfinite(scores.values)).sum())
    _demand(
        found.layers - found.silent_layers >= LEAST_FINITE * found.layers,
        f"{found.silent_layers} of {found.layers} layers have no finite score",
    )


def _check_layers(model: nn.Module, layers: rs.Layers) -> None:
    owned = sorted([*layers.unused, *(name for names in layers.parameters.values() for name in names)])
    _demand(owned == sorted(name for name, _ in model.named_parameters()), "a parameter has no owner, or more than one")
    weighted = [
        module
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]
    fewest = 1 if len(weighted) <= 2 else 2  # a network of one layer and a head
    _demand(fewest <= len(layers.names) <= MOST_LAYERS, f"{len(layers.names)} layers of {len(weighted)} with weights")


def _labelled(inputs: Inputs) -> Any:
    labels = torch.arange(N_SAMPLES) % N_CLASSES
    return (inputs, labels) if isinstance(inputs, Tensor) else {**inputs, "labels": labels}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Report it if the block leaves the model or the global random states other than it found them."""
    kept = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *model.buffers()]
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        del kept  # till here, so that the identity of no tensor went to another one
        changed = [what for what in {**before, **after} if before.get(what) != after.get(what)]
        _demand(not changed, f"changed: {', '.join(changed[:8])}")


def _state(model: nn.Module) -> dict[str, Any]:
    """Take a snapshot of a model and of the global random states, that can be compared with ``==``."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 -- the global state is what is looked at
    state: dict[str, Any] = {
        "random state of Python": random.getstate(),
        "random state of numpy": (kind, keys.tobytes(), *rest),
        "random state of torch": _digest(torch.get_rng_state()),
    }
    for name, module in model.named_modules():
        state[f"flag of {name!r}"] = module.training
        state[f"hooks of {name!r}"] = [list(getattr(module, table).items()) for table in HOOK_TABLES]
        for tensor, buffer in module._buffers.items():
            state[f"buffer {tensor!r} of {name!r}"] = _identified(buffer)
    for name, parameter in model.named_parameters():
        state[f"parameter {name!r}"] = (parameter.requires_grad, _identified(parameter), _identified(parameter.grad))
    return state


def _identified(tensor: Tensor | None) -> Any:
    return None if tensor is None else (id(tensor), _digest(tensor))


def _digest(tensor: Tensor) -> bytes:
    """Hash the bytes of a tensor, so that NaN equals NaN and -0 differs from 0."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content, digest_size=16).digest()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- the models draw from the global state
    torch.manual_seed(seed)


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Violated(otherwise)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
