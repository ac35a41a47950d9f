"""Decoders that learn side by side, each by itself; the processes have some each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrainscope.batches import Batch
from retrainscope.exceptions import NonFiniteError
from retrainscope.lending import start_random
from retrainscope.parts import Parts
from retrainscope.processes import gather, n_processes, rank
from retrainscope.progress import progress_bar

__all__ = ["Pair", "Training", "own_pairs", "train_decoders"]

Pair = tuple[str, int]  # a decoder, by the kind of its network and the place of its layer


@dataclass(frozen=True)
class Training:
    """How decoders learn.

    Attributes
    ----------
    max_epochs : int
    learning_rate : float
    n_batches, n_samples : int
        Of an epoch.
    seed : int
    progress : bool or None
    parts : Parts
        Where epochs are kept, now and then.
    """

    max_epochs: int
    learning_rate: float
    n_batches: int
    n_samples: int
    seed: int
    progress: bool | None
    parts: Parts


def own_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the decoders that this process trains: none depends on any other, so they need not see each other."""
    return [*pairs][rank() :: n_processes()]


def train_decoders(
    decoders: Mapping[Pair, nn.Module],
    batches_of: Callable[[int], Iterable[Batch]],
    losses_of: Callable[[Batch, list[Pair]], dict[Pair, Tensor]],
    training: Training,
) -> list[dict[Pair, float]]:
    """Train all decoders; afterwards every process has them all.

    Parameters
    ----------
    decoders : mapping of Pair to nn.Module
        The same in all processes.
    batches_of : callable (epoch) -> iterable of Batch
    losses_of : callable (batch, pairs) -> dict of Pair to Tensor
        The mean losses of some decoders on a batch.
    training : Training

    Returns
    -------
    list of dict of Pair to float
        Of each epoch the mean losses.
    """
    mine = own_pairs(decoders)
    learners = {pair: _Learner(decoders[pair].train(), training) for pair in mine}
    parts, losses = training.parts, list[dict[Pair, float]]()
    kept = parts.get("epochs")
    if kept is not None:
        losses = kept["losses"]
        for pair, learner in learners.items():
            learner.load(kept["states"][pair])
    with progress_bar(
        what="training decoders", progress=training.progress, total=training.max_epochs, initial=len(losses)
    ) as bar:
        for epoch in range(len(losses), training.max_epochs):
            start_random(training.seed + epoch)  # so that an epoch does not depend on where the run was stopped
            summed = torch.zeros(len(mine))
            for batch in batches_of(epoch) if mine else ():
                found = losses_of(batch, mine)
                for learner in learners.values():
                    learner.begin()
                each = torch.stack([found[pair] for pair in mine])
                each.sum().backward()  # type: ignore[no-untyped-call]
                for learner in learners.values():
                    learner.step()
                summed += each.detach().cpu() * len(batch)
            means = dict(zip(mine, (summed / training.n_samples).tolist(), strict=True))
            losses.append({pair: loss for some in gather("an epoch", means) for pair, loss in some.items()})
            if not torch.isfinite(torch.tensor([*losses[-1].values()])).all():
                raise NonFiniteError(
                    f"The decoders diverged in epoch {epoch}. Give a smaller learning_rate than "
                    f"{training.learning_rate}."
                )
            bar.set_postfix(loss=f"{sum(losses[-1].values()) / len(losses[-1]):.3g}", refresh=False)
            bar.update()
            if parts.due():
                states = gather("the decoders", {pair: learner.state() for pair, learner in learners.items()})
                parts.put("epochs", {"losses": losses, "states": {p: s for some in states for p, s in some.items()}})
    _exchange(decoders)
    return losses


def _exchange(decoders: Mapping[Pair, nn.Module]) -> None:
    """Give every process what the others have trained, one decoder at a time."""
    mine = own_pairs(decoders)
    for pair, decoder in decoders.items() if n_processes() > 1 else ():
        own = _on_cpu(decoder.state_dict()) if pair in mine else None
        (trained,) = [state for state in gather(f"the decoder {pair}", own) if state is not None]
        decoder.load_state_dict(trained)


class _Learner:
    """A decoder with what trains it; the state is loaded whole."""

    def __init__(self, decoder: nn.Module, training: Training) -> None:
        optimizer = torch.optim.Adam(decoder.parameters(), lr=training.learning_rate)
        steps = training.max_epochs * training.n_batches
        self._optimizer = optimizer
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        self._parts: tuple[Any, ...] = (decoder, optimizer, self._schedule)

    def begin(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """Take a step."""
        self._optimizer.step()
        self._schedule.step()

    def state(self) -> list[Any]:
        """Return all that goes on from here."""
        return [_on_cpu(part.state_dict()) for part in self._parts]

    def load(self, state: list[Any]) -> None:
        """Go on from a state."""
        for part, own in zip(self._parts, state, strict=True):
            part.load_state_dict(own)


def _on_cpu(state: Any) -> Any:
    """Bring the tensors of a state to where every process has them."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else state
