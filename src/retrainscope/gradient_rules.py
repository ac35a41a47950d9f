"""How a module's calls make the gradients of its parameters, sample by sample: one rule for each kind of module."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrainscope.precision import wide

__all__ = ["Call", "Rule", "broadcast_rule", "has_rule", "random_signs", "rule_for"]

_LARGEST = 2**14  # entries of a weight whose gradients are put together; a larger one is projected before
_WIDEST = 2**9  # inputs of an output of such a weight

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MATRICES = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(eq=False)
class Call:
    """One call of a module: what went in, what came out, and the gradient of what is differentiated there.

    What the rule for the weight makes of the inputs is kept, where it is the same for every gradient.
    """

    inputs: Tensor
    output: Tensor
    gradient: Tensor | None = None
    prepared: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """Makes features of the gradient of one parameter. This one is for biases."""

    module: nn.Module

    def rows(self, calls: Sequence[Call], n_samples: int) -> Tensor | None:
        """Return the features for each sample, of shape (n_samples, n_features), from one call or more.

        None where a call is not one that the rule is for: its rows must be the samples, or equally many for each
        sample, and its axes those that the module is made for.
        """
        total = None
        for call in calls:
            assert call.gradient is not None
            fits = len(call.gradient) % n_samples == 0 and call.gradient.ndim >= self._least_axes()
            try:
                rows = self._of_call(call, call.gradient) if fits else None
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError, TypeError, ValueError):  # a kind of its own takes or returns other axes
                return None
            if rows is None:
                return None
            rows = rows.reshape(n_samples, len(rows) // n_samples, -1).sum(dim=1)
            total = rows if total is None else total + rows
        return total

    def row(self, gradient: Tensor) -> Tensor:
        """Return the features of a gradient that is known."""
        return gradient.flatten()

    def _of_call(self, _call: Call, gradient: Tensor) -> Tensor | None:
        return _summed(self.module, gradient)

    def _least_axes(self) -> int:
        if isinstance(self.module, nn.LayerNorm):
            return 1 + len(self.module.normalized_shape)
        return 2 + len(self.module.kernel_size) if isinstance(self.module, _CONVOLUTIONS) else 2


@dataclass(frozen=True)
class _Scale(Rule):
    """For the weight of a normalisation."""

    def _of_call(self, call: Call, gradient: Tensor) -> Tensor | None:
        if call.prepared is None:
            call.prepared = _normalised(self.module, wide(call.inputs))
        gradient = _channels_last(self.module, gradient)
        fits = call.prepared.shape == gradient.shape
        return _summed(self.module, gradient * call.prepared) if fits else None


@dataclass(frozen=True)
class _Broadcast(Rule):
    """For a parameter that is added to samples, multiplied with them or repeated for them, as `expanded` tells."""

    shape: torch.Size

    def _of_call(self, _call: Call, gradient: Tensor) -> Tensor | None:
        lead = gradient.ndim - len(self.shape)
        over = [axis for axis in range(1, gradient.ndim) if axis < lead or self.shape[axis - lead] == 1]
        return gradient.sum(dim=over) if over else gradient


@dataclass(frozen=True)
class _Matrix(Rule):
    """For a weight that is a matrix, or one for each group: gradients are sums of outer products over places.

    Attributes
    ----------
    n_groups, n_outputs, n_inputs : int
        Of the weight; the others are those of a group.
    left : Tensor of shape (q, n_outputs), or None
        Projects the outputs' side; None: not.
    right : Tensor of shape (p, n_inputs), or None
        Projects the inputs' side.
    """

    n_groups: int
    n_outputs: int
    n_inputs: int
    left: Tensor | None
    right: Tensor | None

    @classmethod
    def drawn(cls, module: nn.Module, weight: Tensor, max_features: int, seed: int) -> Self:
        """Draw projections for a large weight, to about so many features."""
        n_groups, n_outputs, n_inputs = _as_matrices(module, weight).shape
        affordable = weight.numel() <= _LARGEST and n_inputs <= _WIDEST and n_groups == 1
        if weight.numel() <= max_features or affordable:
            return cls(module, n_groups, n_outputs, n_inputs, None, None)
        room = max(1, max_features // n_groups)
        p = min(n_inputs, math.isqrt(room))
        q = min(n_outputs, room // p)
        if n_groups == 1:
            p = min(n_inputs, room // q)  # of many groups each has few outputs, and all of its inputs would cost much
        signs = wide(random_signs(q * n_outputs + p * n_inputs, seed).to(weight))
        left, right = (
            None if kept == n else part.view(kept, n) / math.sqrt(kept)  # a whole side is exact as it is
            for kept, n, part in ((q, n_outputs, signs[: q * n_outputs]), (p, n_inputs, signs[q * n_outputs :]))
        )
        return cls(module, n_groups, n_outputs, n_inputs, left, right)

    def row(self, gradient: Tensor) -> Tensor:
        """Return the features of a gradient that is known."""
        matrices = _as_matrices(self.module, gradient)
        matrices = matrices if self.left is None else self.left @ matrices
        return (matrices if self.right is None else matrices @ self.right.T).flatten()

    def _of_call(self, call: Call, gradient: Tensor) -> Tensor | None:
        projected = self._projected(wide(call.inputs)) if call.prepared is None else call.prepared
        projected = projected.contiguous() if self.n_groups > 1 and projected.shape[2] > 1 else projected
        if self.right is None:
            call.prepared = projected
        outputs = self._by_place(gradient)
        if len(outputs) != len(projected) or outputs.shape[3] != projected.shape[3]:
            return None
        outputs = outputs if self.left is None else self.left @ outputs
        if outputs.shape[2] == projected.shape[2] == 1:
            return (outputs * projected).sum(dim=3).flatten(start_dim=1)
        if self.n_groups > 1:  # many small products, each ten times as fast where its places lie side by side
            outputs = outputs.contiguous()
        return torch.einsum("rgqt,rgpt->rgqp", outputs, projected).flatten(start_dim=1)

    def _by_place(self, outputs: Tensor) -> Tensor:
        """Return what comes out as (rows, groups, outputs, places)."""
        if isinstance(self.module, _CONVOLUTIONS):
            return outputs.reshape(len(outputs), self.n_groups, -1, outputs[0, 0].numel())
        return outputs.reshape(len(outputs), 1, -1, outputs.shape[-1]).transpose(2, 3)

    def _projected(self, inputs: Tensor) -> Tensor:
        """Return what each output is made of as (rows, groups, p, places)."""
        module, right = self.module, self.right
        if isinstance(module, nn.Linear) or _is_turned(module):
            return self._by_place(inputs if right is None else inputs @ right.T)
        assert isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        weight = module.weight.detach()
        right = wide(torch.eye(self.n_inputs, dtype=weight.dtype, device=weight.device)) if right is None else right
        if isinstance(module, nn.Embedding):
            found = functional.embedding(inputs, right.T)
            if module.padding_idx is not None:  # which gets no gradient
                found = found.masked_fill((inputs == module.padding_idx)[..., None], 0)
            return self._by_place(found)
        # A convolution of another weight: every group gets the same projections of its patches.
        filters = right.view(len(right), *weight.shape[1:]).repeat(self.n_groups, *(1,) * (weight.ndim - 1))
        return self._by_place(_convolved(module, inputs, filters))


def has_rule(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    """Tell whether there is a rule for a parameter of a module, by its name there."""
    fits = isinstance(module, _MATRICES + _NORMS) or _is_turned(module)
    own = fits and getattr(module, attribute, None) is weight
    return own and attribute in ("weight", "bias")


def rule_for(module: nn.Module, attribute: str, weight: Tensor, *, max_features: int, seed: int) -> Rule:
    """Return the rule for a parameter that has one."""
    if attribute == "bias":
        return Rule(module)
    return _Scale(module) if isinstance(module, _NORMS) else _Matrix.drawn(module, weight, max_features, seed)


def broadcast_rule(module: nn.Module, parameter: Tensor) -> Rule:
    """Return the rule for a parameter that is used by no module of a kind that has one."""
    return _Broadcast(module, parameter.shape)


def random_signs(n: int, seed: int) -> Tensor:
    """Draw n random signs, as whole numbers of one byte."""
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8).mul_(2).sub_(1)


def _is_turned(module: nn.Module) -> bool:
    """Tell whether a module is the linear layer of transformers' GPT-2, whose weight has the inputs first."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d) and hasattr(module, "nf")


def _convolved(module: nn.Module, inputs: Tensor, filters: Tensor) -> Tensor:
    """Do what a convolution does, with other filters: by its own forward, since some pad in ways of their own."""
    own = dict(module._parameters)
    try:
        module._parameters.update({"weight": filters, "bias": None})  # type: ignore[dict-item] # no parameter
        convolved: Tensor = module.forward(inputs)
    finally:
        module._parameters.update(own)
    return convolved


def _as_matrices(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight, or its gradient, as (groups, outputs, inputs)."""
    if isinstance(module, nn.Embedding) or _is_turned(module):
        return weight.T[None]
    return weight.reshape(module.groups if isinstance(module, _CONVOLUTIONS) else 1, -1, weight[0].numel())


def _summed(module: nn.Module, values: Tensor) -> Tensor:
    """Add up over places: of shape (rows, channels), or for layer normalisation (rows, what it normalises)."""
    if isinstance(module, nn.Linear) or _is_turned(module):
        return values.reshape(len(values), -1, values.shape[-1]).sum(dim=1)
    if isinstance(module, nn.LayerNorm):
        values = _channels_last(module, values)
        return values.reshape(len(values), -1, math.prod(module.normalized_shape)).sum(dim=1)
    return values.reshape(len(values), values.shape[1], -1).sum(dim=2)


def _channels_last(module: nn.Module, values: Tensor) -> Tensor:
    """Turn what a layer normalisation of channels takes that come first, as those of ConvNeXt do."""
    if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) > 1:
        return values
    n_channels = module.normalized_shape[0]
    first = values.ndim > 2 and values.shape[-1] != n_channels and values.shape[1] == n_channels
    return values.movedim(1, -1) if first else values


def _normalised(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the weight of a normalisation is multiplied with."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(_channels_last(module, inputs), module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    mean, variance = (None if each is None else each.to(inputs) for each in (module.running_mean, module.running_var))
    return functional.batch_norm(inputs, mean, variance, eps=module.eps)
