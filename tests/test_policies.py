"""Policies: which sets are tried, how they are named, and what is refused."""

import pytest

from retrainscope.exceptions import InvalidDataError, LayerNotFoundError
from retrainscope.policies import Policies, policy_name, policy_sets

NAMES = ("c1", "c2", "f1")


def policies_of(names: tuple[str, ...] = NAMES, **options: object) -> Policies:
    """Make the policies that are tried by default, with the model as it is."""
    sets = policy_sets(names, None)
    made = {
        "policies": ("none", *(policy_name(trained, names) for trained in sets)),
        "trained": ((), *sets),
        "layers": names,
        "head": "head",
        "n_parameters": dict(zip((*names, "head"), (10, 30, 50, 10), strict=False)),
    }
    return Policies(**(made | options))


def test_default_sets():
    """By default there are the head alone, every layer, and everything from a layer up, each once."""
    assert policy_sets(NAMES, None) == ((), ("c1",), ("c2",), ("f1",), ("c2", "f1"), NAMES)
    assert policy_sets(("only",), None) == ((), ("only",))


@pytest.mark.parametrize(
    ("asked", "sets"),
    [
        ([], ((),)),
        ([["f1", "c1"]], ((), ("c1", "f1"))),
        ([["c1"], ("c1", "c1"), [], iter(["c1"])], ((), ("c1",))),
        (["c2"], ((), ("c2",))),
        (iter([NAMES]), ((), NAMES)),
    ],
)
def test_sets_that_are_asked_for(asked, sets):
    """Sets asked for come once each, in the order of execution, after the head alone; a name is a set of one."""
    assert policy_sets(NAMES, asked) == sets


@pytest.mark.parametrize("asked", [[["c3"]], [["c1", "c3"]], ["c3"]])
def test_layers_that_are_not_measured(asked):
    """A layer that is not measured is refused by name."""
    with pytest.raises(LayerNotFoundError, match="no measured layer named"):
        policy_sets(NAMES, asked)


def test_one_name_is_no_sequence_of_sets():
    """A name in place of the sets is refused with what was meant, not taken letter by letter."""
    message = r"^The 'policies' parameter must be .* such as \[\['c1'\]\]\. Got 'c1' instead\.$"
    with pytest.raises(InvalidDataError, match=message):
        policy_sets(NAMES, "c1")


@pytest.mark.parametrize(
    ("trained", "name"),
    [
        (None, "none"),
        ((), "head"),
        (("c1",), "head + c1"),
        (("f1",), "head + f1"),
        (("c2", "f1"), "c2 and up"),
        (("c1", "f1"), "head + c1, f1"),
        (("c1", "c2"), "head + c1, c2"),
        (NAMES, "all"),
    ],
)
def test_names(trained, name):
    """A policy is named after what it trains."""
    assert policy_name(trained, NAMES) == name


def test_the_policy_of_layers():
    """The policy of some layers is found in any order, never as that which trains nothing, and may be missing."""
    policies = policies_of()
    assert policies.policy_of([]) == "head"
    assert policies.policy_of(["f1", "c2"]) == "c2 and up"
    assert policies.policy_of("c1") == "head + c1"
    assert policies.policy_of(["c1", "f1"]) is None
    with pytest.raises(LayerNotFoundError, match=r"no measured layer named 'f2'\. Did you mean 'f1'"):
        policies.policy_of(["f2"])


def test_shares():
    """The share counts the head with the layers, against all that is used; nothing is trained by none."""
    policies = policies_of()
    shares = [policies.share(policy) for policy in policies.policies]
    assert shares == [0.0, 0.1, 0.2, 0.4, 0.6, 0.9, 1.0]
    with pytest.raises(InvalidDataError, match=r"no policy 'half'\. There are 'none', 'head'"):
        policies.share("half")


def test_rules():
    """The rules that need no look at the data are the policies that their names say, as far as they were tried."""
    assert policies_of().rules() == {
        "head alone": "head",
        "last layer": "head + f1",
        "first layer": "head + c1",
        "largest layer": "head + f1",
        "upper half": "c2 and up",
        "everything": "all",
    }
    few = policies_of(policies=("head", "all"), trained=((), NAMES))
    assert few.rules() == {"head alone": "head", "everything": "all"}
