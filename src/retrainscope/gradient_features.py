"""Gradients sample by sample, as rows of features that keep their products: few passes for all layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrainscope.attention import projection_of, unpacked_attention
from retrainscope.batches import Batch, Batches, Inputs
from retrainscope.broadcasting import Broadcasts
from retrainscope.gradient_rules import Call, Rule, broadcast_rule, has_rule, random_signs, rule_for
from retrainscope.lending import random_from
from retrainscope.memory import Halving
from retrainscope.parts import NOTHING_KEPT, Parts
from retrainscope.precision import asked_precision, full_precision, wide
from retrainscope.processes import in_turns, n_processes
from retrainscope.sample_gradients import differentiable, gradients_of, sample_gradients
from retrainscope.tracing import call_model

__all__ = ["gradient_features"]

Calls = dict[nn.Module | Tensor, list[Call]]

_FEW = 4  # samples that tell whether the rules hold
_CHUNK = 32  # samples at once, as in a step of training
_LIKE = 0.1  # of a gradient's norm: what is wrong is wrong by more, and rounding is far less
_ROUNDING = 1e-6  # of the greatest of the norms


def gradient_features(
    body: nn.Module,
    batches: Batches,
    directions: Tensor,
    parameters: Mapping[str, Sequence[str]],
    *,
    max_features: int,
    seed: int,
    tick: Callable[[int], Any] = lambda _: None,
    halving: Halving | None = None,
    parts: Parts = NOTHING_KEPT,
) -> dict[str, Tensor]:
    """Compute, for each layer, features of the gradients of each sample's outputs along some directions.

    What goes into a linear layer or a convolution, and the gradient at what comes out of it, make the gradient of its
    weight as an outer product, for all samples from one ordinary pass back through the network. Of a large weight both
    sides are projected at random before, and what a layer has beyond `max_features` is summed up with random signs;
    both keep products on average. Normalisations, biases, embeddings and self-attention are done likewise, and so are
    parameters that are added to samples or multiplied with them (position embeddings, scales). Those for which the
    first sample of a chunk gets another gradient than a pass back from it alone gives (weights that are used elsewhere
    too, axes in another order) are left to `sample_gradients`. Several processes take the chunks in turn, and all
    return the features of all.

    Parameters
    ----------
    body : nn.Module
        Lent by `borrow`: in evaluation mode, so that no sample counts for another. Returns a tensor of shape
        (n_samples, n_outputs).
    batches : Batches
    directions : Tensor of shape (n_directions, n_outputs)
    parameters : mapping of str to sequence of str
        The names of the parameters of each layer.
    max_features : int
        Of a direction. A layer with no more parameters is exact.
    seed : int
        For projections and signs.
    tick : callable
        Told how many gradients have been done, samples times directions in all.
    halving : Halving, optional
        For chunks that memory has no room for.
    parts : Parts
        Where the features of chunks are kept, now and then.

    Returns
    -------
    dict of str to Tensor of shape (n_samples, n_directions * n_features)
        The product of two rows is, on average over seeds, the sum over directions of that of the two gradients.

    Raises
    ------
    UnsupportedModelError
        As `sample_gradients`.

    References
    ----------
    Outer products: I. Goodfellow (2015), arXiv 1510.01799; G. Rochette, A. Manoel and E. Tramel (2019), arXiv
    1912.06015. Random signs: M. Charikar, K. Chen and M. Farach-Colton (2002), Finding frequent items in data streams.
    """
    left: frozenset[str] = frozenset()
    halving = Halving() if halving is None else halving
    with unpacked_attention(body):
        while True:
            sketch = _Sketch(body, directions, parameters, left, max_features=max_features, seed=seed)
            chain = _Chain(parts, f"gradients-{len(left)}", batches.device)
            tick(chain.n_samples * len(directions))
            work = partial(_features, sketch, halving, seed)
            for found in in_turns("the gradients", _chunks(batches, chain.n_samples), work):
                if isinstance(found, set):  # from the start, since all rows need the same features
                    left |= found
                    tick(-chain.n_samples * len(directions))
                    break
                tick(chain.add(found) * len(directions))
            else:
                return {layer: torch.cat([rows[layer] for rows in chain.rows]) for layer in parameters}


def _chunks(batches: Batches, n_done: int) -> Iterator[Batch]:
    """Yield the samples that follow those that are done, which were such chunks too."""
    n_seen = 0
    for batch in batches:
        for start in range(0, len(batch), _CHUNK):
            chunk = batch.take(np.arange(start, min(start + _CHUNK, len(batch))))
            if n_seen >= n_done:
                yield chunk
            n_seen += len(chunk)


def _features(sketch: "_Sketch", halving: Halving, seed: int, chunk: Batch) -> list[dict[str, Tensor]] | set[str]:
    """Return the features of a chunk, in pieces, or the names of parameters that need another way."""
    try:
        with random_from(seed):  # so that nothing depends on where the run was stopped, or on the process
            found = [rows for _, rows in halving.run(chunk, sketch.rows)]
    except _UnlikeError as error:
        return error.names
    if n_processes() == 1:
        return found
    return [{layer: features.cpu() for layer, features in rows.items()} for rows in found]


class _Chain:
    """The features of chunks in their order, kept now and then in parts that follow each other."""

    def __init__(self, parts: Parts, name: str, device: torch.device) -> None:
        self.rows: list[dict[str, Tensor]] = []
        self._parts, self._name, self._number, self._device = parts, name, 0, device
        while (part := parts.get(f"{name}-{self._number}")) is not None:
            self.rows += [{layer: features.to(device) for layer, features in rows.items()} for rows in part]
            self._number += 1
        self._written = len(self.rows)
        self.n_samples = sum(len(next(iter(rows.values()))) for rows in self.rows)

    def add(self, rows: list[dict[str, Tensor]]) -> int:
        """Add a chunk, in pieces; return how many samples it has."""
        self.rows += [{layer: features.to(self._device) for layer, features in piece.items()} for piece in rows]
        n_samples = sum(len(next(iter(piece.values()))) for piece in rows)
        self.n_samples += n_samples
        if self._parts.due():
            self._parts.put(f"{self._name}-{self._number}", self.rows[self._written :])
            self._number, self._written = self._number + 1, len(self.rows)
        return n_samples


class _UnlikeError(Exception):
    """The gradients of some parameters are not what a pass back gives."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


class _Sketch:
    """Features of gradients, with the same projections for every chunk of samples."""

    def __init__(
        self,
        body: nn.Module,
        directions: Tensor,
        parameters: Mapping[str, Sequence[str]],
        left: frozenset[str],
        *,
        max_features: int,
        seed: int,
    ) -> None:
        self.body, self.directions, self.max_features, self.seed = body, directions, max_features, seed
        self.weights = dict(body.named_parameters())
        self.numbers = {name: number for number, name in enumerate(self.weights)}
        floating = {name for name, weight in self.weights.items() if weight.is_floating_point()}
        asked = [name for names in parameters.values() for name in names if name in floating - left]
        # What each is used by: a module, or, where there is no rule for that one, all that it is broadcast in.
        self.places = {name: projection_of(body.get_submodule(_owner(name)), name.rpartition(".")[2]) for name in asked}
        self.bare = {name for name in asked if not has_rule(*self.places[name], self.weights[name])}
        self.users = {n: self.weights[n] if n in self.bare else module for n, (module, _) in self.places.items()}
        self.ruled = {name: self.weights[name] for name in asked}
        self.layers = {layer: [n for n in names if n in self.ruled] for layer, names in parameters.items()}
        self.others = {layer: [n for n in names if n not in self.ruled] for layer, names in parameters.items()}
        self.rule, self.signs = cache(self._rule), cache(self._signs)  # drawn once for all chunks
        self.repeats = any(isinstance(user, nn.Embedding) for user in self.users.values())

    def rows(self, chunk: Batch) -> dict[str, Tensor]:
        """Return the features of a chunk of samples, layer by layer."""
        inputs, n_samples = chunk.inputs, len(chunk)
        parts: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        with torch.enable_grad(), differentiable(self.ruled.values()):
            check = asked_precision(chunk.device) is None
            if not check:  # its rounding may be as large as what is looked for
                with full_precision(network=True):
                    few = chunk.take(np.arange(min(n_samples, _FEW)))
                    outputs, calls = self._run(few.inputs, len(few))
                    self._by_rule(outputs @ self.directions[0].to(outputs), calls, 0, check=True)
            outputs, calls = self._run(inputs, n_samples)
            for place, direction in enumerate(self.directions):
                along = outputs @ direction.to(outputs)
                found = self._by_rule(along, calls, place, check=check and place == 0)
                others = self._one_by_one(inputs, n_samples, direction)
                for number, (layer, names) in enumerate(self.layers.items()):
                    rows = torch.cat([*(found[name] for name in names), others[layer]], dim=1)
                    signs = partial(self.signs, place=place, number=number)
                    parts[layer].append(_folded(rows, self.max_features, signs))
        return {layer: torch.cat(rows, dim=1) for layer, rows in parts.items()}

    def _run(self, inputs: Inputs, n_samples: int) -> tuple[Tensor, Calls]:
        """Run the body, if there are rules for any of its parameters; return its outputs, and what they are made of."""
        calls: Calls = {user: [] for user in self.users.values()}
        if not calls:
            return self.directions.new_zeros(n_samples, self.directions.shape[1]), calls
        try:
            with _recorded(calls, n_rows=n_samples if self.repeats else 1):
                return wide(call_model(self.body, inputs)), calls
        except RuntimeError as error:
            if not self.repeats or isinstance(error, torch.OutOfMemoryError):
                raise
        self.repeats = False  # this model cannot do with a row for every sample
        return self._run(inputs, n_samples)

    def _by_rule(self, along: Tensor, calls: Calls, place: int, *, check: bool) -> dict[str, Tensor]:
        """Return the features of the parameters that there are rules for, from one pass back."""
        uncalled = {name: weight for name, weight in self.ruled.items() if not calls[self.users[name]]}
        otherwise = zip(uncalled, _gradients(along.sum(), [*uncalled.values()]), strict=True)
        if used := {name for name, gradient in otherwise if gradient.any()}:  # by what is no call that rules know
            raise _UnlikeError(used)
        made = [call for each in calls.values() for call in each]
        for call, gradient in zip(made, _gradients(along.sum(), [call.output for call in made]), strict=True):
            call.gradient = wide(gradient)
        rules = {name: self.rule(name, place) for name in self.ruled}
        with torch.no_grad():  # modules of a kind of their own may use other parameters for the filters of a rule
            rows = {
                name: along.new_zeros(len(along), len(rule.row(wide(uncalled[name]))))
                if name in uncalled
                else rule.rows(calls[self.users[name]], len(along))
                for name, rule in rules.items()
            }
        found = {name: features for name, features in rows.items() if features is not None}
        if len(found) < len(rules):
            raise _UnlikeError(rules.keys() - found.keys())
        if check and rules:
            alone = _gradients(along[0], [*self.ruled.values()])
            expected = {name: rules[name].row(wide(one)) for name, one in zip(self.ruled, alone, strict=True)}
            _check({name: features[0] for name, features in found.items()}, expected)
        return found

    def _rule(self, name: str, place: int) -> Rule:
        if name in self.bare:
            return broadcast_rule(self.places[name][0], self.weights[name])
        seed = self._seed_for(1, place, self.numbers[name])
        return rule_for(*self.places[name], self.weights[name], max_features=self.max_features, seed=seed)

    def _signs(self, n: int, place: int, number: int) -> Tensor:
        return random_signs(n, self._seed_for(0, place, number)).to(self.directions.device)

    def _one_by_one(self, inputs: Inputs, n_samples: int, direction: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the parameters that there are no rules for."""
        if not any(self.others.values()):
            return {layer: direction.new_zeros(n_samples, 0) for layer in self.others}
        along = direction.expand(n_samples, -1)
        found = list(sample_gradients(self.body, inputs, along, _product, self.others))
        return {layer: torch.cat([rows[layer] for rows in found]) for layer in self.others}

    def _seed_for(self, *numbers: int) -> int:
        """Return the seed for one of the things that are drawn."""
        return int(np.random.SeedSequence([self.seed, *numbers]).generate_state(1)[0])


@contextmanager
def _recorded(calls: Calls, *, n_rows: int) -> Iterator[None]:
    """Keep what goes into some modules and what comes out, where that is one tensor each; and parameters expanded.

    One row of an embedding that is for all samples (of positions) is repeated, so that each sample has its gradient.
    """

    def keep_in(made: list[Call]) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def keep(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
                return None
            inputs = args[0].detach()
            if isinstance(module, nn.Embedding) and inputs.ndim == 2 and len(inputs) == 1:
                inputs, output = (tensor.expand(n_rows, *tensor.shape[1:]) for tensor in (inputs, output))
            made.append(Call(inputs, output))
            return made[-1].output.clone()  # what is kept must not be overwritten in place

        return keep

    def keep_expanded(made: list[Call]) -> Callable[[Tensor], None]:
        return lambda expanded: made.append(Call(expanded.detach(), expanded))

    bare = {user: keep_expanded(made) for user, made in calls.items() if isinstance(user, Tensor)}
    with ExitStack() as opened:
        for user, made in calls.items():
            if isinstance(user, nn.Module):
                opened.callback(user.register_forward_hook(keep_in(made), prepend=True).remove)
        if bare:
            opened.enter_context(Broadcasts(bare))
        yield


def _gradients(total: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient with respect to each tensor, 0 where there is none; the graph is kept."""
    able = [tensor for tensor in tensors if tensor.requires_grad] if total.requires_grad else []
    found = gradients_of(total, able, retain_graph=True) if able else ()
    by_id = {id(tensor): gradient for tensor, gradient in zip(able, found, strict=True) if gradient is not None}
    return [by_id[id(tensor)] if id(tensor) in by_id else torch.zeros_like(tensor) for tensor in tensors]


def _check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse parameters whose features for one sample are not the expected ones but for rounding."""
    norms = {name: float(row.norm()) for name, row in expected.items()}
    least = _ROUNDING * max(norms.values())

    def distance(name: str) -> float:
        same_shape = found[name].shape == expected[name].shape  # else the module was never called
        return float((found[name] - expected[name]).norm()) if same_shape else norms[name]

    unlike = {name for name, norm in norms.items() if not distance(name) <= _LIKE * norm + least}
    if unlike:
        raise _UnlikeError(unlike)


def _folded(rows: Tensor, most: int, signs: Callable[[int], Tensor]) -> Tensor:
    """Add up features of shape (n_samples, n_features), each with a random sign, to no more than that."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # half precision overflows in sums
    n_samples, n_features = rows.shape
    if n_features <= most:
        return rows
    signed, whole = rows * signs(n_features), n_features - n_features % most
    folded = signed[:, :whole].view(n_samples, -1, most).sum(dim=1)
    folded[:, : n_features - whole] += signed[:, whole:]
    return folded


def _product(output: Tensor, direction: Tensor) -> Tensor:
    return (output * direction).sum()


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
