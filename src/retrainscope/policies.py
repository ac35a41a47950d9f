"""Policies: which layers are retrained with the head."""

from collections.abc import Iterable
from dataclasses import dataclass

from retrainscope.exceptions import InvalidDataError, LayerNotFoundError

__all__ = ["ALL", "HEAD", "NONE", "Policies", "policy_name", "policy_sets"]

NONE, HEAD, ALL = "none", "head", "all"


@dataclass(frozen=True, eq=False, repr=False)
class Policies:
    """Policies of one model, each a set of layers to retrain with the head.

    Attributes
    ----------
    policies : tuple of str
        ``"none"`` (the model as it is, where it can be used so), ``"head"``, ``"head + NAME"`` for a layer,
        ``"NAME and up"``, ``"all"``.
    trained : tuple of tuple of str
        The layers that each policy trains, besides the head.
    layers : tuple of str
        In the order of execution.
    head : str
    n_parameters : dict of str to int
        What each layer and the head own.
    """

    policies: tuple[str, ...]
    trained: tuple[tuple[str, ...], ...]
    layers: tuple[str, ...]
    head: str
    n_parameters: dict[str, int]

    def policy_of(self, layers: Iterable[str]) -> str | None:
        """Return the policy that trains these layers and the head; None if it was not tried.

        Raises
        ------
        LayerNotFoundError
            If the sweep has no such layer.
        """
        layers = [layers] if isinstance(layers, str) else [*layers]
        for name in layers:
            if name not in self.layers:
                raise LayerNotFoundError.for_name(name, self.layers, what="measured layer")
        wanted = tuple(name for name in self.layers if name in layers)
        found = (p for p, t in zip(self.policies, self.trained, strict=True) if t == wanted and p != NONE)
        return next(found, None)

    def share(self, policy: str) -> float:
        """Return the share of the parameters that a policy trains."""
        if policy == NONE:
            return 0.0
        trained = self.trained[self.row_of(policy)]
        total = sum(self.n_parameters.values())
        return sum(self.n_parameters[name] for name in (*trained, self.head)) / total

    def rules(self) -> dict[str, str]:
        """Return the policies that need no look at the data, by the rule; those that were tried."""
        names = self.layers
        largest = max(names, key=lambda name: self.n_parameters[name])
        rules = {
            "head alone": (),
            "last layer": names[-1:],
            "first layer": names[:1],
            "largest layer": (largest,),
            "upper half": names[len(names) // 2 :],
            "everything": names,
        }
        policies = {rule: self.policy_of(layers) for rule, layers in rules.items()}
        return {rule: policy for rule, policy in policies.items() if policy is not None}

    def row_of(self, policy: str) -> int:
        """Return the place of a policy, or refuse one that is not there."""
        if policy not in self.policies:
            raise InvalidDataError(f"There is no policy {policy!r}. There are {', '.join(map(repr, self.policies))}.")
        return self.policies.index(policy)


def policy_name(trained: tuple[str, ...] | None, names: tuple[str, ...]) -> str:
    """Name the policy that trains some layers, in the order of execution, and the head; None trains nothing."""
    if trained is None:
        return NONE
    if trained == names:
        return ALL
    if not trained:
        return HEAD
    if len(trained) > 1 and trained == names[-len(trained) :]:
        return f"{trained[0]} and up"
    return f"{HEAD} + {', '.join(trained)}"


def policy_sets(names: tuple[str, ...], asked: Iterable[Iterable[str]] | None) -> tuple[tuple[str, ...], ...]:
    """Return the sets of layers to train with the head, each once and in the order of execution, the head alone first.

    Parameters
    ----------
    names : tuple of str
        The layers in the order of execution.
    asked : iterable of iterables of str, optional
        None: the head alone, every layer, everything from a layer up.

    Raises
    ------
    InvalidDataError
        If one name is given in place of sets of them.
    LayerNotFoundError
        If a layer is asked for that is not measured.
    """
    if asked is None:
        uppers = [names[place:] for place in reversed(range(len(names)))]
        return tuple(dict.fromkeys([(), *((name,) for name in names), *uppers]))
    if isinstance(asked, str):
        raise InvalidDataError(
            f"The 'policies' parameter must be a sequence of sequences of layer names, such as [[{asked!r}]]. Got "
            f"{asked!r} instead."
        )
    return tuple(dict.fromkeys([(), *(_checked(policy, names) for policy in asked)]))


def _checked(policy: Iterable[str], names: tuple[str, ...]) -> tuple[str, ...]:
    policy = [policy] if isinstance(policy, str) else [*policy]
    for name in policy:
        if name not in names:
            raise LayerNotFoundError.for_name(name, names, what="measured layer")
    return tuple(name for name in names if name in policy)
