"""LayerSweep: gains, regret and rules by hand, the bootstrap, and what is written and read."""

import json
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, MissingExtraError, ResultFormatError
from retrainscope.policies import policy_name
from retrainscope.trials import Trial, summarise

NAN = float("nan")
NAMES = ("c1", "c2", "f1")
POLICIES = {
    "none": (),
    "head": (),
    "head + c1": ("c1",),
    "head + c2": ("c2",),
    "head + f1": ("f1",),
    "c2 and up": ("c2", "f1"),
    "all": NAMES,
}
# Two seeds; the best is "c2 and up", by 2 points before "all".
ACCURACY = np.array([[0.5, 0.4], [0.7, 0.6], [0.7, 0.5], [0.8, 0.8], [0.9, 0.7], [0.9, 0.9], [0.9, 0.86]])
N_PARAMETERS = {"c1": 10, "c2": 30, "f1": 50, "head": 10}


def sweep_of(accuracy: np.ndarray = ACCURACY, *, policies: dict[str, tuple[str, ...]] = POLICIES, **changed: object):
    """Make a sweep of these accuracies, whose draws are the seeds themselves, in turn."""
    n_policies, n_seeds = accuracy.shape
    made = {
        "policies": tuple(policies),
        "trained": tuple(policies.values()),
        "layers": NAMES,
        "head": "head",
        "n_parameters": N_PARAMETERS,
        "accuracy": accuracy,
        "interval": np.stack([accuracy.min(axis=1), accuracy.max(axis=1)], axis=1),
        "known_accuracy": accuracy / 2,
        "known_before": 0.8,
        "learning_rate": np.where(np.isnan(accuracy), NAN, 1e-3),
        "validation": np.repeat(accuracy[..., None], 2, axis=2),
        "learning_rates": (1e-3, 1e-2),
        "draws": np.tile(accuracy.T, (10, 1)),
        "seconds": np.ones((n_policies, n_seeds)),
        "new_head": (False, True),
        "n_samples": (1200, 300, 5000, 70),
        "steps": 20,
        "batch_size": 32,
    }
    return rs.LayerSweep(**(made | changed))


def lost(*policies: str) -> np.ndarray:
    """Return the accuracies with these policies diverged."""
    accuracy = ACCURACY.copy()
    accuracy[[[*POLICIES].index(policy) for policy in policies]] = NAN
    return accuracy


# Names


@pytest.mark.parametrize(
    ("trained", "names", "expected"),
    [
        (None, NAMES, "none"),
        ((), NAMES, "head"),
        (("c1",), NAMES, "head + c1"),
        (("f1",), NAMES, "head + f1"),
        (("c2", "f1"), NAMES, "c2 and up"),
        (("c1", "f1"), NAMES, "head + c1, f1"),
        (("c1", "c2"), NAMES, "head + c1, c2"),
        (NAMES, NAMES, "all"),
        (("c1",), ("c1",), "all"),
        ((), ("c1",), "head"),
    ],
)
def test_names_of_policies(trained, names, expected):
    """A policy is named by what it trains, each set of layers by one name."""
    assert policy_name(trained, names) == expected


# What is read from a sweep


def test_gains_by_hand():
    """A layer's gain is the mean accuracy with it and the head, less that with the head alone, which is 0.65."""
    gains = sweep_of().gains
    assert list(gains) == [*NAMES]
    np.testing.assert_allclose([*gains.values()], [-0.05, 0.15, 0.15], atol=1e-12)


def test_gains_of_what_was_not_tried():
    """A layer that no policy trains alone has no gain, and neither has one whose training diverged."""
    few = {name: POLICIES[name] for name in ("head", "head + c2", "all")}
    gains = sweep_of(np.array([[0.5, 0.5], [0.6, 0.8], [NAN, 0.9]]), policies=few).gains
    np.testing.assert_allclose([*gains.values()], [NAN, 0.2, NAN], atol=1e-12)
    assert np.isnan(sweep_of(lost("head")).gains["c1"])


def test_gain_of_the_only_layer():
    """Where there is one layer, to train it with the head is to train everything."""
    sweep = sweep_of(
        np.array([[0.5], [0.75]]),
        policies={"head": (), "all": ("c1",)},
        layers=("c1",),
        n_parameters={"c1": 30, "head": 10},
    )
    assert sweep.gains == {"c1": 0.25}
    assert set(sweep.rules().values()) == {"head", "all"}


def test_regret_by_hand():
    """Regret is what is missing to the best: 0.90 - 0.65 for the head, of 0.2 and 0.3 in the paired draws."""
    sweep = sweep_of()
    assert sweep.best == "c2 and up"
    np.testing.assert_allclose(sweep.regret("head"), [0.25, 0.2, 0.3], atol=1e-12)
    np.testing.assert_allclose(sweep.regret("head + f1"), [0.1, 0.0, 0.2], atol=1e-12)
    assert sweep.regret("c2 and up") == (0, 0, 0)
    # A quarter of the draws says 0, the others 0.4: the tails are the 5 and 95 % quantiles.
    draws = sweep.draws.copy()
    draws[:, 1] = draws[:, 5] - np.where(np.arange(20) % 4 == 0, 0.0, 0.4)
    np.testing.assert_allclose(replace(sweep, draws=draws).regret("head")[1:], [0.0, 0.4], atol=1e-12)


def test_regret_of_what_diverged():
    """A policy whose training diverged has no regret, and does not change that of others."""
    sweep = sweep_of(lost("head + c1"))
    assert np.isnan(sweep.regret("head + c1")).all()
    np.testing.assert_allclose(sweep.regret("head"), [0.25, 0.2, 0.3], atol=1e-12)


def test_a_policy_that_is_not_there():
    """A policy that the sweep does not have is refused with those that it has."""
    for ask in (sweep_of().regret, sweep_of().share):
        with pytest.raises(InvalidDataError, match=r"no policy 'f1 and up'. There are 'none', 'head', 'head \+ c1'"):
            ask("f1 and up")


def test_best_of_several_trains_the_least():
    """Of policies that are equally good the one that trains the fewest parameters is best, and none trains none."""
    equal = np.full_like(ACCURACY, 0.5)
    assert sweep_of(equal).best == "none"
    few = {name: trained for name, trained in POLICIES.items() if name not in ("none", "head")}
    assert sweep_of(equal[2:], policies=few).best == "head + c1"
    assert sweep_of(equal[2:], policies=few, n_parameters=N_PARAMETERS | {"c1": 40}).best == "head + c2"


def test_best_passes_over_what_diverged():
    """A policy that diverged with one seed is not the best, whatever it reached with the other."""
    accuracy = ACCURACY.copy()
    accuracy[5, 1] = NAN
    assert sweep_of(accuracy).best == "all"


def test_shares_by_hand():
    """The share is what the layers and the head own, of all that is owned: 10 + 30 + 50 + 10."""
    sweep = sweep_of()
    assert [sweep.share(policy) for policy in POLICIES] == [0.0, 0.1, 0.2, 0.4, 0.6, 0.9, 1.0]


def test_policies_by_their_layers():
    """The policy of a set of layers is found whatever their order, and is None if it was not tried."""
    sweep = sweep_of()
    assert sweep.policy_of(()) == "head"
    assert sweep.policy_of(["f1", "c2"]) == sweep.policy_of(("c2", "f1")) == "c2 and up"
    assert sweep.policy_of({"c1", "c2", "f1"}) == "all"
    assert sweep.policy_of("c1") == "head + c1"
    assert sweep.policy_of(("c1", "f1")) is None


def test_a_layer_that_the_sweep_lacks():
    """A layer that was not swept is refused, not passed over: the answer would be another policy's."""
    with pytest.raises(LayerNotFoundError, match=r"no measured layer named 'c3'. Did you mean"):
        sweep_of().policy_of(["f1", "c3"])
    with pytest.raises(LayerNotFoundError, match="no measured layer named 'head'"):
        sweep_of().policy_of("head")


def test_rules_by_hand():
    """The trivial rules name their policies; the upper half of three layers is two, and f1 is the largest."""
    assert sweep_of().rules() == {
        "head alone": "head",
        "last layer": "head + f1",
        "first layer": "head + c1",
        "largest layer": "head + f1",
        "upper half": "c2 and up",
        "everything": "all",
    }
    assert sweep_of(n_parameters=N_PARAMETERS | {"c2": 60}).rules()["largest layer"] == "head + c2"
    few = {"head": (), "all": NAMES}
    assert sweep_of(ACCURACY[:2], policies=few).rules() == {"head alone": "head", "everything": "all"}


def test_what_diverged_in_words():
    """Each policy, seed and rate at which training diverged is named; the policy that trains nothing never is."""
    sweep = sweep_of()
    assert sweep.diverged == ()
    validation = sweep.validation.copy()
    validation[0] = NAN
    validation[1, 1, 1] = validation[6, 0, 0] = NAN
    assert replace(sweep, validation=validation).diverged == (
        "head, seed 1, learning rate 0.01",
        "all, seed 0, learning rate 0.001",
    )


# As people read it


def rows_of(sweep: rs.LayerSweep) -> dict[str, list[str]]:
    """Return the cells of the table, by policy."""
    return {row[0]: list(row[1:]) for row in sweep.as_table().rows}


def test_table_by_hand():
    """The table has a row a policy, in the order of the sweep, with what a pencil gives."""
    rows = rows_of(sweep_of())
    assert [*rows] == [*POLICIES]
    assert rows["head"] == ["10.0%", "65.0%", "[60.0%, 70.0%]", "25.0", "32.5%", "0.001"]
    assert sweep_of().as_table().note == "Regret in points of accuracy; known data before: 80.0%."


def test_table_of_unknown_values():
    """Where the known data could not be looked at, a dash says so, and several rates are all named."""
    rates = np.full(ACCURACY.shape, 1e-3)
    rates[1, 1] = 1e-2
    rates[0] = NAN
    sweep = sweep_of(known_accuracy=np.full_like(ACCURACY, NAN), known_before=NAN, learning_rate=rates)
    rows = rows_of(sweep)
    assert rows["head"][-2:] == ["-", "0.001, 0.01"]
    assert rows["none"][-1] == "-"
    assert sweep.as_table().note == "Regret in points of accuracy."


def test_text_says_what_was_best():
    """The text holds the table, the best policy, the data, and the regret of the rules."""
    text = str(sweep_of())
    assert text.startswith("Retrained and tested, by policy\n")
    assert (
        "Best: c2 and up, 90.0% on 5,000 test samples; 1,200 trained on, 20 steps of 32, 2 seeds. Regret of trivial "
        "rules, in points: head alone 25.0, last layer 10.0, first layer 30.0, largest layer 10.0, upper half 0.0, "
        "everything 2.0."
    ) in text
    assert "1 seed." in str(sweep_of(ACCURACY[:, :1]))


def test_text_of_an_advice():
    """The policy that is advised is marked, and its regret is told with its interval; another name is no matter."""
    sweep = replace(sweep_of(), advised="head + f1")
    assert "head + f1 (advised)" in rows_of(sweep)
    assert "Regret of the advice (head + f1): 10.0 points [0.0, 20.0]." in str(sweep)
    assert "advice" not in str(replace(sweep, advised="head + c9"))
    assert "advice" not in replace(sweep_of(lost("head + f1")), advised="head + f1").summary()


def test_text_where_training_diverged():
    """A policy that diverged says so in its row, with where and at which rate below, at most five of them."""
    sweep = sweep_of(lost("head + c1"))
    assert rows_of(sweep)["head + c1"] == ["20.0%", "diverged", "-", "-", "-", "-"]
    assert "Training diverged: head + c1, seed 0, learning rate 0.001; head + c1, seed 0, learning rate 0.01; " in str(
        sweep
    )
    assert "first layer" not in sweep.summary()
    many = sweep_of(lost("head + c1", "all"))
    assert many.as_table().note.count("learning rate") == 5
    assert many.as_table().note.endswith(" and 3 more.")


def test_all_diverged():
    """Where training diverged by every policy there is no best, and the sweep can still be printed and saved."""
    few = {name: trained for name, trained in POLICIES.items() if name != "none"}
    sweep = sweep_of(np.full((6, 2), NAN), policies=few)
    with pytest.raises(InvalidDataError, match=r"diverged by every policy. Give smaller learning_rates"):
        _ = sweep.best
    for text in (str(sweep), sweep._repr_html_()):
        assert "Training diverged by every policy" in text
        assert text.count("diverged") >= 6
    assert all(np.isnan(gain) for gain in sweep.gains.values())
    frame = sweep.to_frame()
    assert frame[["accuracy", "regret"]].isna().all(axis=None)


def test_rules_that_were_not_tried_are_not_named():
    """Where no rule's policy finished, the text does not speak of rules."""
    sweep = sweep_of(lost(*[policy for policy in POLICIES if policy != "none"]))
    assert sweep.summary().startswith("Best: none, 45.0%")
    assert "rules" not in sweep.summary()


def test_html_is_escaped():
    """In a notebook the sweep is a table, whose names are escaped."""
    policies = {"head": (), "head + <c1>": ("<c1>",)}
    sweep = sweep_of(
        ACCURACY[:2], policies=policies, layers=("<c1>", "c2"), n_parameters={"<c1>": 1, "c2": 1, "head": 2}
    )
    html = sweep._repr_html_()
    assert "<td>head + &lt;c1&gt;</td>" in html
    assert "<c1>" not in html
    assert "Best: head" in html


# Written and read


def test_frame_by_hand():
    """The frame has a row a policy with its means."""
    frame = sweep_of().to_frame()
    assert list(frame["policy"]) == [*POLICIES]
    row = frame.set_index("policy").loc["head"]
    np.testing.assert_allclose(
        row[["share", "accuracy", "accuracy_low", "accuracy_high", "regret", "known_accuracy", "seconds"]].astype(
            float
        ),
        [0.1, 0.65, 0.6, 0.7, 0.25, 0.325, 2.0],
    )


def test_frame_needs_pandas(monkeypatch):
    """Without pandas the error names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"retrainscope\[frame\]"):
        sweep_of().to_frame()


def assert_same_sweep(first: rs.LayerSweep, second: rs.LayerSweep) -> None:
    """Fail unless every field is equal bit for bit."""
    for field in fields(rs.LayerSweep):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other, strict=True, err_msg=field.name)
        else:
            assert one == other or (one != one and other != other), field.name
            assert type(one) is type(other), field.name


@pytest.mark.parametrize("accuracy", [ACCURACY / 3, lost("head + c1", "all")], ids=["all finished", "two diverged"])
def test_saved_and_loaded(tmp_path, accuracy):
    """What is loaded equals what was saved, bit for bit, and prints the same."""
    sweep = sweep_of(accuracy, advised="head", known_before=1 / 3 if accuracy[0, 0] < 0.2 else NAN)
    sweep.save(tmp_path / "sweep.json")
    loaded = rs.LayerSweep.load(tmp_path / "sweep.json")
    assert_same_sweep(loaded, sweep)
    assert str(loaded) == str(sweep)


def test_loaded_from_something_else(tmp_path):
    """A file of another kind is refused by name."""
    (tmp_path / "other.json").write_text('{"retrainscope": "Recommendation", "schema": 1, "result": {}}')
    with pytest.raises(ResultFormatError, match=r"other.json holds no LayerSweep \(found: Recommendation\)"):
        rs.LayerSweep.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "trial",
    [
        Trial(np.arange(11) % 3 == 0, 1 / 3, (0.1, NAN, 0.3), 3e-4, 1.25),
        Trial(np.ones(8, dtype=bool), NAN, (0.5,), NAN, 0.0),
        Trial(None, NAN, (NAN, NAN), NAN, 2.0),
    ],
)
def test_a_trial_through_json(trial):
    """A trial that went through JSON is the same, to the last sample."""
    found = Trial.from_plain(json.loads(json.dumps(trial.to_plain(), allow_nan=False)))
    assert (found.hits is None) == (trial.hits is None)
    if trial.hits is not None:
        np.testing.assert_array_equal(found.hits, trial.hits, strict=True)
    for name in ("known_accuracy", "learning_rate", "seconds", "validation"):
        np.testing.assert_array_equal(getattr(found, name), getattr(trial, name))


# From trials to a sweep


def layers_named(*names: str) -> rs.Layers:
    """Describe a network of these layers and a head, each of 10 parameters."""
    every = (*names, "head")
    return rs.Layers(
        names=names,
        shapes=dict.fromkeys(names, (3,)),
        head="head",
        parameters={name: (f"{name}.weight",) for name in every},
        buffers=dict.fromkeys(every, ()),
        n_parameters=dict.fromkeys(every, 10),
        flops=dict.fromkeys(every, 100),
        unused=(),
    )


def summarised(*by_policy: list[np.ndarray | None], same_test: bool = False, rate: float = 1e-3) -> rs.LayerSweep:
    """Put together trials of which the hits are given, by policy and seed: of "head" and "all"."""
    trials = {
        policy: [
            Trial(hits, 0.5, (NAN if hits is None else 0.5,) * 2, NAN if hits is None else rate, 1.0) for hits in row
        ]
        for policy, row in zip(("head", "all"), by_policy, strict=False)
    }
    return summarise(
        trials,
        trained=((), ("c1",))[: len(by_policy)],
        layers=layers_named("c1"),
        learning_rates=(1e-3, 1e-2),
        seed=0,
        same_test=same_test,
        new_head=(True,),
        known_before=0.5,
        n_samples=(1, 1, 1, 1),
        steps=1,
        batch_size=1,
    )


HALF = np.arange(400) % 2 == 0  # of 400 samples; a resample's mean deviates by sqrt(1/4 / 400) = 0.025


def test_accuracies_of_trials():
    """The accuracy is the share of hits, by policy and seed; what each trial tells is kept in its place."""
    sweep = summarised([HALF, ~HALF], [np.ones(400, bool), np.arange(400) < 100], rate=0.25)
    np.testing.assert_array_equal(sweep.accuracy, [[0.5, 0.5], [1.0, 0.25]])
    assert sweep.policies == ("head", "all")
    assert sweep.layers == ("c1",)
    assert (sweep.learning_rate == 0.25).all()
    assert sweep.validation.shape == (2, 2, 2)
    assert sweep.n_parameters == {"c1": 10, "head": 10}


def test_draws_vary_as_the_binomial_does():
    """With one seed the draws vary as the mean of as many coins: half of 400 samples by 0.025, all of them by 0."""
    sweep = summarised([HALF], [np.ones(400, bool)])
    assert sweep.draws.shape == (400, 2)
    np.testing.assert_allclose(sweep.draws[:, 0].mean(), 0.5, atol=0.005)
    np.testing.assert_allclose(sweep.draws[:, 0].std(), 0.025, rtol=0.15)
    assert (sweep.draws[:, 1] == 1).all()
    np.testing.assert_allclose(sweep.interval[0], [0.5 - 1.645 * 0.025, 0.5 + 1.645 * 0.025], atol=0.008)
    assert list(sweep.interval[1]) == [1, 1]


def test_draws_of_policies_are_paired():
    """Policies that hit the same samples have the same draws, so that their difference is exactly none."""
    sweep = summarised([HALF, ~HALF], [HALF, ~HALF])
    assert (sweep.draws[:, 0] == sweep.draws[:, 1]).all()
    assert sweep.regret("all") == (0, 0, 0)


def test_draws_of_seeds():
    """Seeds are drawn too: of one that hits all and one that hits nothing the mean is 0, 1/2, 1 in 1, 2, 1 of 4."""
    sweep = summarised([np.ones(9, bool), np.zeros(9, bool)])
    shares = [(sweep.draws[:, 0] == value).mean() for value in (0, 0.5, 1)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.1)


def test_draws_of_the_same_test_samples():
    """Where all seeds are tested on the same samples, more seeds do not make these samples more."""
    hits = [HALF] * 4
    np.testing.assert_allclose(summarised(hits, same_test=True).draws.std(), 0.025, rtol=0.15)
    # Four times as many samples otherwise; a seed that is drawn twice counts twice, so less than half is gained.
    assert 0.012 < summarised(hits).draws.std() < 0.02


def test_draws_where_some_diverged():
    """A trial without hits makes its own policy's accuracy NaN in its seed, and no other's."""
    sweep = summarised([HALF, HALF], [HALF, None])
    np.testing.assert_array_equal(sweep.accuracy, [[0.5, 0.5], [0.5, NAN]])
    assert np.isfinite(sweep.draws[:, 0]).all()
    assert np.isnan(sweep.interval[1]).all()
    assert sweep.best == "head"
    assert sweep.diverged == ("all, seed 1, learning rate 0.001", "all, seed 1, learning rate 0.01")
    assert np.isnan(summarised([None], [None]).interval).all()
    # A seed with which every policy diverged is no trouble to the others.
    np.testing.assert_array_equal(summarised([None, HALF], same_test=True).accuracy, [[NAN, 0.5]])


def test_draws_repeat_themselves():
    """The same trials give the same draws."""
    hits = [HALF, np.roll(HALF, 3) & HALF]
    np.testing.assert_array_equal(summarised(hits).draws, summarised(hits).draws)
