"""sweep_layers: what is trained on what, what is kept apart, and how the model is given back."""

import copy
import functools
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import Apply, content_of, unchanged
from networks import Failing, TokenNet, classifier, samples
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sweeping import (
    TOO_LARGE,
    TOO_SMALL,
    Kept,
    Recorder,
    Watch,
    accuracy,
    apart,
    assert_same,
    normed,
    numbered,
    parts_of,
    runs_of,
    swept,
    trained,
    watched,
    worn,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import retrainscope as rs
from retrainscope import criteria
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, NonFiniteError, UnsupportedModelError
from retrainscope.sweep_task import Options, _split

# Policies


def deep(n_layers: int) -> nn.Sequential:
    """Return a network of layers "0", "2", ... and a head."""
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(n_layers) for part in (nn.Linear(4, 4), nn.ReLU())], nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [
        (1, {"head": (), "all": ("0",)}),
        (2, {"head": (), "head + 0": ("0",), "head + 2": ("2",), "all": ("0", "2")}),
        (
            5,
            {
                "head": (),
                **{f"head + {layer}": (layer,) for layer in "02468"},
                "6 and up": ("6", "8"),
                "4 and up": ("4", "6", "8"),
                "2 and up": ("2", "4", "6", "8"),
                "all": ("0", "2", "4", "6", "8"),
            },
        ),
    ],
)
def test_policies_by_default(n_layers, expected):
    """By default the head, the head and each layer, everything from a layer up, and all; each set once."""
    sweep = swept(deep(n_layers), steps=1)
    assert dict(zip(sweep.policies, sweep.trained, strict=True)) == expected
    assert sweep.policies == (*expected,)
    assert sweep.layers == tuple("02468"[:n_layers])
    assert sweep.head == str(2 * n_layers)
    assert sweep.accuracy.shape == (len(expected), 1)
    assert np.isfinite(sweep.accuracy).all()


def test_nothing_is_a_policy_where_the_model_can_be_used_as_it_is():
    """To train nothing is a policy only where the classes are known ones, and comes first; it has no learning rate."""
    sweep = swept(unknown=samples(classes=(1, 0), seed=1))
    assert sweep.policies == ("none", "head", "head + 0", "head + 2", "all")
    assert np.isnan(sweep.learning_rate[0]).all()
    assert "none" not in swept(unknown=samples(classes=(0, 1, 2), seed=1)).policies


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], ("head",)),
        ([()], ("head",)),
        (["2"], ("head", "head + 2")),
        ([["2", "0"], ("0", "2"), {"0"}, ["0", "0"]], ("head", "all", "head + 0")),
        ((names for names in (["0"], [])), ("head", "head + 0")),
    ],
)
def test_policies_that_are_asked_for(asked, expected):
    """The policies asked for, each once, with the head alone before them."""
    assert swept(policies=asked).policies == expected


def test_layers_that_are_asked_for():
    """With layers= these are swept, and what is below a layer counts with it."""
    sweep = swept(layers=["2"])
    assert sweep.policies == ("head", "all")
    assert sweep.n_parameters == {"2": 4 * 8 + 8 + 8 * 6 + 6, "4": 6 * 3 + 3}


@pytest.mark.parametrize("name", ["conv2", "head"])
def test_a_policy_of_a_layer_that_is_not_there(name):
    """A misspelt layer, and the head, which is always trained, are refused with the nearest names before training."""
    model, recorder = nn.Sequential(), Recorder()
    for number, part in enumerate(("conv1", "conv3", "head")):
        model.add_module(part, nn.Linear(4, 3 if number == 2 else 4))
    message = rf"no measured layer named '{name}'. (Did you mean 'conv3' or 'conv1'|It has 'conv1', 'conv3')"
    with pytest.raises(LayerNotFoundError, match=message), unchanged(model):
        swept(model, policies=[["conv1"], ["conv3", name]], optimizer=recorder)
    assert recorder.made == []


# What starts and what is trained


def test_all_start_from_the_same_weights():
    """Where nothing changes all policies are equally good, and equal to the head that scikit-learn fits."""
    seen: list[tuple[bool, list[int]]] = []
    model, (X, labels) = watched(seen), numbered()
    sweep = swept(model, numbered(first=1000, classes=(0, 1)), (X, labels), learning_rates=(TOO_SMALL,))
    assert (sweep.accuracy == sweep.accuracy[0]).all()
    assert (sweep.known_accuracy == sweep.known_before).all()
    training, _, test = (sorted(part) for part in parts_of(seen))
    with torch.no_grad():
        features = model[:5](X).double().numpy()
    scaler = StandardScaler().fit(features[training])
    fitted = LogisticRegression(max_iter=2000).fit(scaler.transform(features[training]), np.array(labels)[training])
    assert sweep.accuracy[0, 0] == fitted.score(scaler.transform(features[test]), np.array(labels)[test])


def test_what_a_policy_starts_from_and_how_long_it_trains():
    """Every policy starts from the same head, and takes as many steps at a rate that falls linearly to zero."""
    recorder = Recorder()
    swept(optimizer=recorder, steps=5, n_seeds=2, learning_rates=(1e-2, 1e-3))
    assert len(recorder.made) == 2 * 4 * 2
    for number in range(2):
        mine = recorder.made[8 * number : 8 * number + 8]
        assert len({(*made.before[-2:],) for made in mine}) == 1
        assert [made.rate for made in mine] == [1e-2, 1e-3] * 4
    for made in recorder.made:
        falling = made.rate * (1 - np.arange(5) / 5 * (1 - 1 / 5))
        np.testing.assert_allclose(made.rates, falling, rtol=1e-6)


def test_frozen_layers_are_not_touched():
    """A policy trains the parameters and batch statistics of its layers and the head; the rest is bit for bit the same.

    The optimizer gets these parameters and no others, also with weight decay, and in a model that was frozen.
    """
    model, recorder = Kept(*normed()), Recorder(functools.partial(torch.optim.AdamW, weight_decay=0.5))
    model.copies = ([],)
    model.requires_grad_(False)
    sweep = swept(model, samples(classes=("u", "v")), optimizer=recorder, steps=6)
    owned = {
        "0": {"0.weight", "0.bias", "1.weight", "1.bias"},
        "4": {"4.weight", "4.bias"},
        "8": {"8.weight", "8.bias"},
    }
    statistics = {
        layer: {f"{norm}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
        for layer, norm in (("0", "1"), ("4", "5"))
    }
    before = {name: content_of(tensor) for name, tensor in model.state_dict().items()}
    copies = model.copies[0][-4:]  # the others were made to fit and try the head
    assert sweep.policies == ("head", "head + 0", "head + 4", "all")
    for policy, made, twin in zip(sweep.trained, recorder.made, copies, strict=True):
        expected = set().union(owned["8"], *(owned[layer] for layer in policy))
        named = dict(twin.named_parameters())
        assert {id(parameter) for parameter in made.parameters} == {id(named[name]) for name in expected}
        assert all(one != other for one, other in zip(made.before, made.after, strict=True))
        changed = {name for name, tensor in twin.state_dict().items() if content_of(tensor) != before[name]}
        assert changed == expected.union(*(statistics[layer] for layer in policy))


@pytest.mark.parametrize(("layer", "sizes"), [("2", [21, 21 + 40 + 54]), ("0", [21 + 54, 21 + 54 + 40])])
def test_trained_layers_own_what_the_model_says(layer, sizes):
    """What is below a measured layer is trained with it, and what is above the last one with the head."""
    recorder = Recorder()
    sweep = swept(layers=[layer], optimizer=recorder)
    assert [sum(parameter.numel() for parameter in made.parameters) for made in recorder.made] == sizes
    assert [sweep.share(policy) for policy in sweep.policies] == [sizes[0] / 115, 1]


# Who sees which samples


def test_samples_are_kept_apart():
    """Of each class 30 % are tested on, 20 % of the rest validated on, the rest trained on, and none for two things."""
    seen: list[tuple[bool, list[int]]] = []
    sweep = swept(watched(seen), numbered(first=1000, classes=(0, 1)), numbered(), policies=[], steps=20)
    training, validation, test = parts_of(seen)
    assert not training & validation
    assert not training & test
    assert not validation & test
    assert training | validation | test == set(range(60))
    for part, n in ((training, 11), (validation, 3), (test, 6)):
        assert [sum(sample % 3 == label for sample in part) for label in range(3)] == [n, n, n]
    assert sweep.n_samples == (33, 9, 18, 60)
    assert {sample for ids in runs_of(seen)[0][1] for sample in ids} - validation - test == {*range(1000, 1060)}


def test_test_samples_that_are_given():
    """With test= all unknown samples are trained or validated on, and the test samples tested on alone."""
    seen: list[tuple[bool, list[int]]] = []
    test = numbered(30, first=500, seed=5)
    sweep = swept(watched(seen), numbered(first=1000), numbered(), test=test, policies=[], steps=20)
    training, validation, tested = parts_of(seen, sizes=(12, 30))
    assert training | validation == set(range(60))
    assert not training & validation
    assert tested == set(range(500, 530))
    assert sweep.n_samples == (48, 12, 30, 60)


def test_policies_see_the_same_and_seeds_do_not():
    """All policies train on the same batches in the same order and are tested alike; another seed has another split."""
    seen: list[tuple[bool, list[int]]] = []
    swept(watched(seen), numbered(first=1000), numbered(), n_seeds=2, steps=5, batch_size=16)
    runs = runs_of(seen)
    assert len(runs) == 8
    for number in range(2):
        assert all(run == runs[4 * number] for run in runs[4 * number : 4 * number + 4])
    assert runs[0][0] != runs[4][0]
    assert parts_of(seen, 0)[2] != parts_of(seen, 4)[2]
    # 33 samples: two batches of 16, and one sample that no batch normalisation could take.
    assert [len(ids) for ids in runs[0][0]] == [16] * 5
    assert runs[0][0][:2] != runs[0][0][2:4]


def test_another_random_state_is_another_split():
    """Another random state splits otherwise; None draws one."""
    tested = []
    for random_state in (0, 1, np.random.RandomState(0), None):
        seen: list[tuple[bool, list[int]]] = []
        swept(watched(seen), numbered(first=1000), numbered(), policies=[], random_state=random_state)
        tested.append(parts_of(seen)[2])
    assert tested[0] == tested[2]
    assert tested[0] != tested[1]
    assert tested[3] not in tested[:2]


def outcome(unknown: object, test: object = None) -> tuple[rs.LayerSweep, list[list[bytes]], list[list[bytes]]]:
    """Sweep at two rates, and return the weights of all runs before and after."""
    recorder = Recorder()
    sweep = swept(
        watched([]),
        numbered(first=1000),
        unknown,
        test=test,
        optimizer=recorder,
        learning_rates=(1e-2, 0.3),
        policies=[["1", "3"]],
    )
    return sweep, [made.before for made in recorder.made], [made.after for made in recorder.made]


def test_labels_of_test_samples_are_used_for_nothing_else():
    """With other labels on the test samples the same rates are chosen and the same weights trained."""
    X, labels = numbered(30, first=500, seed=5)
    sweep, before, after = outcome(numbered(), (X, labels))
    other, other_before, other_after = outcome(numbered(), (X, labels[1:] + labels[:1]))
    assert before == other_before
    assert after == other_after
    assert_same(sweep, other, ignoring=("seconds", "accuracy", "interval", "draws"))
    assert (sweep.accuracy != other.accuracy).any()


@pytest.mark.parametrize("part", [1, 2], ids=["validation", "test"])
def test_held_out_samples_are_not_trained_on(part):
    """With other values in the samples held out the same head is fitted and the same weights are trained."""
    seen: list[tuple[bool, list[int]]] = []
    X, labels = numbered()
    swept(watched(seen), numbered(first=1000), (X, labels), policies=[])
    rows = sorted(parts_of(seen)[part])
    spoilt = X.clone()
    spoilt[rows, :3] = -20 * X[rows, :3]
    sweep, before, after = outcome((X, labels))
    other, other_before, other_after = outcome((spoilt, labels))
    assert before == other_before
    assert after == other_after
    assert (sweep.validation == other.validation).all() == (part == 2)
    if part == 2:
        assert (sweep.learning_rate == other.learning_rate).all()
        assert (sweep.accuracy != other.accuracy).any()


def test_the_head_is_not_chosen_by_test_samples():
    """Whether the model's own head stays is decided without the test samples, on which it may be wrong."""
    seen: list[tuple[bool, list[int]]] = []
    model, (X, labels) = nn.Sequential(Watch(seen), *trained()), apart(seed=3)
    X[:, 3] = torch.arange(60)
    options = {"known": numbered(classes=(0, 1, 2), first=1000), "policies": [], "learning_rates": (TOO_SMALL,)}
    sweep = swept(model, unknown=(X, labels), **options)
    X[sorted(parts_of(seen)[2]), 0] = -20  # where the first class lies
    other = swept(model, unknown=(X, labels), **options)
    assert sweep.new_head == other.new_head == (False,)
    assert sweep.mean_accuracy["none"] == 1
    assert other.mean_accuracy["none"] == pytest.approx(1 / 3)


def test_the_rate_is_the_best_on_validation():
    """The learning rate chosen is one of the best on the validation samples, policy by policy."""
    sweep = swept(policies=[["0", "2"]], learning_rates=(TOO_SMALL, 1e-2, 0.3), steps=6, n_seeds=2)
    assert sweep.validation.shape == (2, 2, 3)
    assert sweep.learning_rates == (TOO_SMALL, 1e-2, 0.3)
    for row in range(2):
        for number in range(2):
            place = sweep.learning_rates.index(sweep.learning_rate[row, number])
            assert sweep.validation[row, number, place] == sweep.validation[row, number].max()


# The model is given back


def test_the_model_is_given_back():
    """The model, its modes, gradients and hooks, and the global random states are bit for bit what they were."""
    model = worn()
    with unchanged(model):
        swept(model)
    model = copy.deepcopy(trained())
    with unchanged(model):
        assert swept(model, apart(seed=2), apart(seed=3)).new_head == (False,)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 12, 24], ids=["in the dry run", "before training", "in training"])
def test_the_model_is_given_back_after_an_error(error, at):
    """So it is after an error of the model's own, or a key pressed, wherever it comes."""
    model, recorder = nn.Sequential(Failing(at, error), *worn()), Recorder()
    with pytest.raises(type(error)), unchanged(model):
        swept(model, samples(classes=(0, 1)), samples(classes=(0, 1), seed=1), optimizer=recorder)
    assert bool(recorder.made) == (at == 24)


def test_in_a_context_without_gradients():
    """A sweep inside torch.no_grad or inference mode is the same."""
    first = swept()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            sweep = swept()
        assert_same(sweep, first)


# Training that diverges


def test_rates_at_which_training_diverges():
    """A learning rate at which training diverges is left out, and named in the result and in the printed table."""
    policies = [["0"], ["0", "2"]]
    sweep, only = swept(learning_rates=(1e-2, TOO_LARGE), policies=policies), swept(policies=policies)
    assert np.isnan(sweep.validation[1:, 0, 1]).all()
    assert (sweep.learning_rate[1:] == 1e-2).all()
    assert sweep.diverged == ("head + 0, seed 0, learning rate 1e+30", "all, seed 0, learning rate 1e+30")
    assert "Training diverged: head + 0, seed 0, learning rate 1e+30; all, seed 0, learning rate 1e+30." in str(sweep)
    np.testing.assert_array_equal(sweep.accuracy[1:], only.accuracy[1:])
    assert only.diverged == ()


@pytest.mark.parametrize("steps", [1, 5], ids=["in the last step", "before the last step"])
def test_policies_that_diverge(tmp_path, steps):
    """A policy that diverges at all rates has no accuracy, the others are kept; also in the checkpoint."""
    options = {"learning_rates": (TOO_LARGE,), "steps": steps, "checkpoint": tmp_path / "sweep.json", "n_seeds": 2}
    sweep = swept(**options)
    assert np.isfinite(sweep.accuracy[0]).all()
    for values in (sweep.accuracy, sweep.known_accuracy, sweep.learning_rate, sweep.interval):
        assert np.isnan(values[1:]).all()
    assert sweep.best == "head"
    assert np.isnan([*sweep.gains.values()]).all()
    assert str(sweep).count(" diverged ") == 3
    assert_same(swept(**options), sweep, ignoring=())


def test_all_policies_diverge(tmp_path):
    """Where all diverge there is no best, with an error that says so; the sweep can be printed, saved and loaded."""
    sweep = swept(classifier(dtype=torch.float16))  # in which Adam's epsilon is 0
    assert np.isnan(sweep.accuracy).all()
    with pytest.raises(InvalidDataError, match=r"diverged by every policy. Give smaller .* give model.float\(\)"):
        _ = sweep.best
    sweep.save(tmp_path / "sweep.json")
    for one in (sweep, rs.LayerSweep.load(tmp_path / "sweep.json")):
        assert "Training diverged by every policy" in str(one)
        assert str(one).count(" diverged ") >= 4
        assert "diverged" in one._repr_html_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    """A model in another precision is trained in it, and is given back in it; or is said to diverge."""
    model = classifier(dtype=dtype)
    with unchanged(model):
        sweep = swept(model, policies=[])
    assert np.isnan(sweep.accuracy).all() == (dtype == torch.float16)
    assert ("half precision, give model.float()" in str(sweep)) == (dtype == torch.float16)


def test_outputs_that_are_no_numbers_are_not_right():
    """A sample whose outputs are NaN is not classified right, whatever its class."""
    X = torch.ones(40, 4) + torch.arange(40)[:, None] / 100
    X[30:, 0] = -1  # whose root is NaN
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2), Apply(lambda out: out))
    known, unknown = (X, [1] * 20 + [0] * 20), (X[:30], [0, 1] * 15)
    rooted = nn.Sequential(Apply(torch.sqrt), *model)
    right = [torch.equal(a, b) for a, b in zip(rooted(X[:30]).argmax(1), torch.tensor(known[1][:30]), strict=True)]
    sweep = swept(rooted, known, unknown, policies=[])
    assert sweep.known_before == sum(right) / 40
    with pytest.raises(NonFiniteError, match="goes into the head has NaN or infinity"):
        swept(rooted, unknown, (X, ["a", "b"] * 20))


# Labels


def test_known_classes_keep_the_head_that_knows_them():
    """More data of the known classes needs nothing: the model's own head stays, and is right as before."""
    sweep = swept(trained(), apart(seed=2), apart(seed=3), policies=[], learning_rates=(TOO_SMALL,))
    assert sweep.new_head == (False,)
    assert (sweep.accuracy == 1).all()
    assert sweep.best == "none"
    assert sweep.known_before == 1


def test_accuracies_of_the_model_as_it_is():
    """The accuracy of no training is the model's own on the test samples, and what it knows is its own too."""
    model, known, test = classifier(), samples(classes=(0, 1, 2), seed=4), samples(classes=(0, 1, 2), seed=5)
    sweep = swept(model, known, samples(classes=(0, 1, 2), seed=6), test=test, n_seeds=2)
    np.testing.assert_allclose(sweep.accuracy[0], accuracy(model, test), rtol=1e-6)
    assert sweep.known_before == pytest.approx(accuracy(model, known))
    assert (sweep.known_accuracy[0] == sweep.known_before).all()


def test_more_seeds_are_no_more_test_samples():
    """Where test samples are given, the interval of what does not differ by seed is that of these samples."""
    test = samples(300, classes=(0, 1, 2), seed=5)
    sweep = swept(unknown=samples(classes=(0, 1), seed=6), test=(test[0], [0, 1] * 150), n_seeds=4, policies=[])
    mean = sweep.accuracy[0, 0]
    assert (sweep.accuracy[0] == mean).all()
    np.testing.assert_allclose(sweep.draws[:, 0].std(), np.sqrt(mean * (1 - mean) / 300), rtol=0.15)


def test_permuted_labels_need_a_new_head():
    """Where known labels were exchanged the model is wrong all over, a new head right, and the body forgets nothing."""
    sweep = swept(trained(), apart(seed=2), apart(seed=3, labels=(1, 2, 0)))
    assert sweep.new_head == (True,)
    assert sweep.mean_accuracy["none"] == 0
    assert sweep.mean_accuracy["head"] == 1
    assert sweep.best == "head"
    assert sweep.known_accuracy[1, 0] == sweep.known_before == 1


@pytest.mark.parametrize("labels", [("x", "y", "z"), (3, 4, 5), (0.5, 1.5, 2.5), (True, 2, "z")])
def test_novel_classes_get_a_new_head(labels):
    """Labels that the model has no outputs for get a new head, whatever they are; what they are called is no matter."""
    sweep = swept(trained(), apart(seed=2), apart(seed=3, labels=labels))
    assert sweep.new_head == (True,)
    assert "none" not in sweep.policies
    assert (sweep.accuracy == 1).all()
    assert sweep.known_before == 1


def test_names_of_classes_are_no_matter():
    """Classes by other names in the same order give the same sweep."""
    assert_same(swept(unknown=samples(classes=(7, 8, 9), seed=1)), swept())


def test_more_classes_than_the_model_has_outputs():
    """A new head has as many outputs as there are classes, also more than before, known ones among them."""
    labels = list(range(5))
    sweep = swept(unknown=samples(100, classes=tuple(labels), seed=1), steps=2)
    assert sweep.new_head == (True,)
    assert np.isfinite(sweep.accuracy).all()


def test_known_labels_that_are_no_places():
    """Where the known labels do not tell the model's outputs, what is forgotten is not known: NaN, not a guess."""
    for known in (samples(classes=("u", "v")), samples()[0]):
        sweep = swept(known=known, policies=[])
        assert np.isnan(sweep.known_before)
        assert np.isnan(sweep.known_accuracy).all()
        assert "known data before" not in str(sweep)


def test_what_is_forgotten_is_seen_through_the_old_head():
    """A new head on a frozen body forgets nothing; training the body does, where the known data is another task."""
    sweep = swept(trained(), apart(seed=2), samples(classes=("a", "b"), seed=3), steps=40, learning_rates=(0.1,))
    assert sweep.known_accuracy[0, 0] == sweep.known_before == 1
    assert sweep.known_accuracy[-1, 0] < 1


X60, _ = samples(seed=1)
AB = ["a", "b"] * 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unknown": X60}, r"The unknown data has no labels"),
        ({"unknown": (X60, ["a"] * 60)}, r"The unknown data has one class \('a'\)"),
        (
            {"unknown": (X60[:5], ["a", "a", "a", "b", "b"])},
            r"class 'b' has 2 samples: with 1 to validate and 1 to test",
        ),
        ({"unknown": (X60[:5], ["a"] * 4 + ["b"]), "test": (X60, AB)}, r"class 'b' has 1 sample: .*Give at least 2"),
        ({"validation_size": 0.99}, r"has 20 samples: with 14 to validate and 6 to test none is left.*smaller share"),
        ({"test": (X60, ["a", "d"] * 30)}, r"test data has classes that the unknown data lacks: 'd'"),
        ({"test": X60}, r"The test data has no labels"),
        ({"test": (X60[:, :3], AB)}, r"known and test samples must have the same shape. Got \(4,\) and \(3,\)"),
        ({"unknown": (X60[:, :3], AB)}, r"known and unknown samples must have the same shape"),
        ({"unknown": (X60 * float("nan"), AB)}, r"The unknown data has NaN or infinity"),
        ({"steps": 0}, r"'steps' parameter must be a positive integer. Got 0"),
        ({"steps": 2.5}, r"'steps' parameter must be a positive integer. Got 2.5"),
        ({"batch_size": 0}, r"'batch_size' parameter must be a positive integer. Got 0"),
        ({"n_seeds": 0}, r"'n_seeds' parameter must be a positive integer"),
        ({"validation_size": 1}, r"'validation_size' parameter must be a positive number below 1"),
        ({"test_size": 0}, r"'test_size' parameter must be a positive number below 1"),
        ({"learning_rates": ()}, r"'learning_rates' parameter must be a sequence of at least one number. Got \(\)"),
        ({"learning_rates": 0.1}, r"'learning_rates' parameter must be a sequence.*Got 0.1"),
        ({"learning_rates": (0.1, -1)}, r"'learning_rates' parameter must be a positive number. Got -1"),
        ({"learning_rates": (float("nan"),)}, r"'learning_rates' parameter must be a positive number. Got nan"),
        ({"optimizer": "adam"}, r"'optimizer' parameter must be a callable.*Got 'adam'"),
        ({"device": "nowhere"}, r"'device' parameter must be a device"),
    ],
)
def test_data_and_settings_that_are_refused(options, message):
    """What cannot be swept is refused before any training, with what it was and what to do."""
    model, recorder = worn(), Recorder()
    with pytest.raises(InvalidDataError, match=message), unchanged(model):
        swept(model, **({"optimizer": recorder} | options))
    assert recorder.made == []


class Aliased(nn.Module):
    """A network whose head has two names, and is called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.top = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.body(x))


def test_a_head_of_two_names_is_trained():
    """The new head has both names, so that every policy trains what runs."""
    model, plain = Aliased(), nn.Sequential(*(copy.deepcopy(part) for part in (Aliased().body, Aliased().head)))
    plain[0].load_state_dict(model.body.state_dict())
    sweep = swept(model)
    assert sweep.policies == ("head", "all")
    np.testing.assert_array_equal(sweep.accuracy, swept(plain).accuracy)


class PerPlace(nn.Module):
    """A network whose head runs at each of three places of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, None].expand(-1, 3, -1)).mean(dim=1)


def convolutional() -> nn.Sequential:
    """Return a network whose head is a convolution."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (convolutional(), r"The head '3' is a Conv2d.*nn.Linear only"),
        (PerPlace(), r"The head 'head' takes 5 features, and 15 go into it"),
        (
            nn.Sequential(*classifier(), Apply(lambda out: out[:, :2])),
            r"for 3 classes the model returns 2 class scores",
        ),
        (nn.Sequential(*classifier(), nn.Unflatten(1, (1, 3))), r"one row of class scores a sample"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Flatten(0)), r"one row of class scores a sample"),
        (nn.Sequential(nn.ReLU()), r"no parameters"),
    ],
    ids=["convolution", "per place", "cut", "maps", "one number", "none"],
)
def test_models_that_a_new_head_does_not_fit(model, message):
    """A model that cannot get a new head, or does not return class scores, is refused before any training."""
    recorder = Recorder()
    with pytest.raises(UnsupportedModelError, match=message), unchanged(model):
        swept(model, optimizer=recorder)
    assert recorder.made == []


@pytest.mark.parametrize("model", [convolutional(), PerPlace()], ids=["convolution", "per place"])
def test_a_head_that_cannot_be_replaced_is_trained_further(model):
    """For known classes a head of any kind will do: it is kept, and trained."""
    recorder = Recorder()
    sweep = swept(model, unknown=samples(classes=(0, 1), seed=1), optimizer=recorder)
    assert sweep.new_head == (False,)
    assert sweep.policies == ("none", "head", "all")
    for made in recorder.made:
        assert all(one != other for one, other in zip(made.before, made.after, strict=True))


def test_probabilities():
    """A model that ends in a softmax is refused before training, since its loss would be another one."""
    recorder = Recorder()
    with pytest.raises(UnsupportedModelError, match=r"returns probabilities.* Leave the softmax out"):
        swept(nn.Sequential(*classifier(), nn.Softmax(dim=1)), head="4", optimizer=recorder)
    assert recorder.made == []
    assert swept(nn.Sequential(*classifier(), nn.LogSoftmax(dim=1)), head="4").policies[0] == "head"


def test_a_head_without_parameters():
    """A head that has nothing to train is refused before any training, with what to name instead."""
    model = nn.Sequential(*classifier(), nn.LogSoftmax(dim=1))
    with pytest.raises(UnsupportedModelError, match=r"head '5' has no parameters to train.*head="):
        swept(model, unknown=samples(classes=(0, 1), seed=1), head="5")


# Forms of data and models


def test_data_sets_are_as_tensors():
    """A data set gives the same sweep as its tensors."""
    (X, labels), known = samples(classes=(3, 4, 5), seed=1), samples()
    data = TensorDataset(X, torch.tensor(labels))
    assert_same(swept(known=known, unknown=data), swept(known=known, unknown=(X, labels)))


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"batch_size": 16, "shuffle": True}, {"batch_size": 1}])
def test_loaders_keep_their_batches(options):
    """A loader comes in its own batches, also one that shuffles: its samples are kept apart, and all steps taken."""
    seen: list[tuple[bool, list[int]]] = []
    X, labels = numbered(classes=(3, 4, 5))
    loader = DataLoader(TensorDataset(X, torch.tensor(labels)), **options)
    recorder, policies = Recorder(), [["1"]]
    sweep = swept(watched(seen), numbered(first=1000), loader, policies=policies, optimizer=recorder)
    assert [len(made.rates) for made in recorder.made] == [4] * 2
    assert parts_of(seen, 0) == parts_of(seen, 1)
    training, validation, test = parts_of(seen)
    assert training | validation | test <= set(range(60))
    assert not training & validation
    assert not training & test
    assert not validation & test
    assert sorted(sample % 3 for sample in test) == [0] * 6 + [1] * 6 + [2] * 6
    assert_same(swept(watched([]), numbered(first=1000), loader, policies=policies), sweep)


class Unsteady:
    """Batches in another order at every pass, drawn by a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        X, labels = samples(classes=(3, 4, 5))
        order = self.rng.permutation(60)
        for rows in np.split(order, 6):
            yield X[rows], [labels[row] for row in rows]


def test_data_in_another_order_at_every_pass():
    """Data whose samples cannot be told apart from pass to pass is refused: test samples would be trained on."""
    recorder = Recorder()
    with pytest.raises(InvalidDataError, match=r"comes in another order at every pass.*Give \(X, y\), a Dataset"):
        swept(unknown=Unsteady(), optimizer=recorder)
    assert recorder.made == []
    assert np.isfinite(swept(known=Unsteady(), policies=[]).accuracy).all()


@pytest.mark.parametrize("streamed", [False, True])
def test_dropout_differs_from_pass_to_pass(streamed):
    """What is dropped is something else at every pass, also over a loader that starts the generators again."""
    masks: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            masks.append(x.detach() == 0)
        return x

    X, labels = samples(classes=(3, 4), seed=1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), Apply(keep), nn.Linear(8, 2))
    data = DataLoader(TensorDataset(X, torch.tensor(labels)), batch_size=60) if streamed else (X, labels)
    swept(model, unknown=data, policies=[], batch_size=60)
    assert len(masks) == 4
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])


def test_keywords():
    """A mapping is passed by keyword, in batches of a loader too, and its labels are found in it."""
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 10, (60, 7)), torch.arange(60) % 3
    model, known = TokenNet(), ({"ids": ids}, labels % 2)
    options = {"input_layer": "embedding", "batch_size": 20}
    sweep = swept(model, known, ({"ids": ids}, labels + 5), **options)
    assert sweep.layers == ("mix",)
    assert np.isfinite(sweep.accuracy).all()
    assert_same(swept(model, known, {"ids": ids, "labels": labels + 5}, **options), sweep)
    loader = DataLoader([{"ids": ids[row], "labels": int(labels[row]) + 5} for row in range(60)], batch_size=20)
    assert np.isfinite(swept(model, known, loader, **options).accuracy).all()


class Wrapped(nn.Module):
    """Returns a mapping with a loss before the logits, as the models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": torch.zeros(len(x), 1), "logits": self.net(x)}


def test_outputs_in_a_mapping():
    """A model that returns a mapping is swept as one that returns its logits."""
    named = ("layers", "trained", "policies", "head", "n_parameters", "seconds")
    assert_same(swept(Wrapped()), swept(), ignoring=named)


def test_numbers_of_numpy_can_be_saved(tmp_path):
    """Settings may come from numpy, and the result is the same and can be saved."""
    options = {"steps": np.int64(4), "batch_size": np.int32(32), "n_seeds": np.int64(1)}
    sweep = swept(learning_rates=np.array([1e-2]), checkpoint=tmp_path / "checkpoint.json", **options)
    assert_same(sweep, swept())
    sweep.save(tmp_path / "sweep.json")
    assert_same(rs.LayerSweep.load(tmp_path / "sweep.json"), sweep, ignoring=())
    assert swept(learning_rates=np.float32([0.5]), checkpoint=tmp_path / "other.json").learning_rates == (0.5,)


def test_batches_of_one():
    """Steps of one sample are taken where they are asked for."""
    recorder = Recorder()
    swept(batch_size=1, steps=3, optimizer=recorder)
    assert [len(made.rates) for made in recorder.made] == [3] * 4


# The truth, where it is known


def exclusive_or(seed: int, *, labels: tuple[object, ...] = (0, 1)) -> tuple[Tensor, list[object]]:
    """Return samples in four dimensions whose class is whether the signs of the first two differ."""
    X = torch.randn(240, 4, generator=torch.Generator().manual_seed(seed))
    X[:, :2] = X[:, :2].sign() + 0.2 * X[:, :2]
    return X, [labels[int(differ)] for differ in X[:, 0] * X[:, 1] < 0]


@functools.cache
def knowing() -> nn.Sequential:
    """Return a network of layers "0" and "2" and a head "4" that has learnt which signs differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    X, labels = exclusive_or(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), torch.tensor(labels)).backward()
        optimizer.step()
    assert accuracy(model, exclusive_or(1)) > 0.97
    return model


def test_a_destroyed_layer_gains():
    """Where the first layer was made blind to what tells the classes apart, its training gains and no other's does."""
    model = copy.deepcopy(knowing())
    with torch.no_grad():
        model[0].weight[:, :2] = 0
    sweep = swept(model, exclusive_or(1), exclusive_or(2), test=exclusive_or(3), steps=80, learning_rates=(0.02,))
    means = sweep.mean_accuracy
    # Without the first two inputs nothing can be told: chance, of 240 samples, has a deviation of 3 points.
    for policy in ("none", "head", "head + 2"):
        assert 0.4 < means[policy] < 0.6
    assert means["head + 0"] > 0.9
    assert means["all"] > 0.9
    assert sweep.gains["0"] > 0.3
    assert abs(sweep.gains["2"]) < 0.1
    assert sweep.best in ("head + 0", "all")
    assert sweep.regret("head")[1] > 0.3


def test_a_task_for_the_head():
    """Where the classes were only exchanged the head is the best, or within noise of it."""
    sweep = swept(
        knowing(),
        exclusive_or(1),
        exclusive_or(2, labels=("same", "different")[::-1]),
        test=exclusive_or(3, labels=("same", "different")[::-1]),
        steps=40,
    )
    value, low, _ = sweep.regret("head")
    assert sweep.mean_accuracy["head"] > 0.95
    assert value < 0.02
    assert low <= 0


class Numbered(nn.Module):
    """Keeps whole numbers as a parameter, as some do with positions; with an embedding of sparse gradients if asked."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Parameter(torch.arange(4), requires_grad=False)
        self.embedding, self.mix, self.head = nn.Embedding(4, 4, sparse=sparse), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x + self.embedding(self.places).mean(dim=0)).relu())


def test_parameters_of_whole_numbers_stay():
    """What has no gradient by its type is left as it is, also where its layer is retrained."""
    model = Numbered()
    with unchanged(model):
        sweep = swept(model)
    assert np.isfinite(sweep.accuracy).all()


def test_embeddings_of_sparse_gradients():
    """They are retrained like any other, and have the needs of any other."""
    sparse, dense = Numbered(sparse=True), Numbered()
    assert_same(swept(sparse), swept(dense))
    known, unknown = samples(), samples(classes=("a", "b", "c"), seed=1)
    for kind in (rs.TangentProbe, criteria.EmpiricalFisher, criteria.RelativeGradientNorm):
        needs = [
            kind(model, random_state=0, progress=False).fit(known).score_layers(unknown).values
            for model in (sparse, dense)
        ]
        np.testing.assert_allclose(*needs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_test", [False, True])
def test_groups_are_held_out_whole(with_test):
    """No group is trained on and validated or tested on; without groups, samples are dealt as ever."""
    X, y = samples(90, classes=("a", "b", "c"), seed=1)
    groups = [f"{label}{place // 9}" for place, label in enumerate(y)]
    options = {"test": samples(30, classes=("a", "b", "c"), seed=2)} if with_test else {}
    sweep = swept(unknown=(X, y), groups=groups, n_seeds=2, **options)
    assert sum(sweep.n_samples[:2]) + (0 if with_test else sweep.n_samples[2]) == 90
    shares = Options(4, 32, (1e-2,), torch.optim.Adam, 1, 0.2, None if with_test else 0.3)
    for seed in range(5):
        split = _split(y, groups, ("a", "b", "c"), shares, np.random.default_rng(seed))
        parts = [
            {groups[row] for row in part}
            for part in (split.train, split.validation, *([] if with_test else [split.test]))
        ]
        assert all(parts)
        assert sum(map(len, parts)) == len(set(groups))
        single = _split(y, range(90), ("a", "b", "c"), shares, np.random.default_rng(seed))
        assert [len(part) for part in (single.train, single.validation)] == ([72, 18] if with_test else [51, 12])


def test_too_few_groups_to_hold_out():
    """A class of two groups cannot be trained on, validated and tested: that is said, with how many there are."""
    X, y = samples(60, classes=("a", "b"), seed=1)
    groups = [f"{label}{place // 30}" for place, label in enumerate(y)]
    message = r"class 'a' has 30 samples in 2 groups: with 4 to validate and 9 to test none is left.*at least 3 groups"
    with pytest.raises(InvalidDataError, match=message):
        swept(unknown=(X, y), groups=groups)
    with pytest.raises(InvalidDataError, match="must have one entry for each of the 60 samples of the unknown data"):
        swept(unknown=(X, y), groups=groups[:9])


@pytest.mark.parametrize(
    "sizes",
    [[80, 10, 10], [60, 10, 10, 10, 10], [40, 40, 40]],
    ids=["one large", "one large of five", "three equal"],
)
def test_few_groups_of_unequal_size_are_dealt(sizes):
    """Every part gets a group of every class where there are three, and the largest is trained on."""
    labels = [label for label in "ab" for _ in range(sum(sizes))]
    groups = [f"{label}{number}" for label in "ab" for number, size in enumerate(sizes) for _ in range(size)]
    shares = Options(4, 32, (1e-2,), torch.optim.Adam, 1, 0.2, 0.3)
    for seed in range(20):
        split = _split(labels, groups, ("a", "b"), shares, np.random.default_rng(seed))
        assert max(Counter(groups[row] for row in split.train).values()) == max(sizes)
        for part in (split.train, split.validation, split.test):
            assert {labels[row] for row in part} == {"a", "b"}
        assert sum(map(len, (split.train, split.validation, split.test))) == len(labels)


def test_groups_of_several_classes_are_dealt():
    """Patients with samples of several classes are held out whole, and every class is in every part."""
    rng = np.random.default_rng(0)
    rows = [(c, p) for p in range(20) for c in range(5) for _ in range(rng.integers(0, 12) * rng.integers(0, 2))]
    labels, groups = [c for c, _ in rows], [p for _, p in rows]
    shares = Options(4, 32, (1e-2,), torch.optim.Adam, 1, 0.2, 0.3)
    for seed in range(20):
        split = _split(labels, groups, tuple(range(5)), shares, np.random.default_rng(seed))
        parts = split.train, split.validation, split.test
        assert all({labels[row] for row in part} == set(range(5)) for part in parts)
        assert sum(len({groups[row] for row in part}) for part in parts) == len(set(groups))


def test_a_part_that_stays_empty_is_named():
    """Where groups of several classes leave a part without one, the part is named."""
    labels, groups = ["a", "a", "a", "b", "b"], [0, 1, 2, 0, 1]
    shares = Options(4, 32, (1e-2,), torch.optim.Adam, 1, 0.2, 0.3)
    with pytest.raises(InvalidDataError, match=r"class 'b' has 2 samples.* none is left to (train on|validate|test)"):
        _split(labels, groups, ("a", "b"), shares, np.random.default_rng(0))


def test_copies_are_held_out_together():
    """Samples that a loader draws more than once are not trained on and tested on; noise is then not learnt."""
    X, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    drawn = torch.randint(0, 60, (240,), generator=torch.Generator().manual_seed(1))
    sweep = swept(unknown=(X[drawn], y[drawn] + 5), steps=100, policies=[["0", "2"]])
    assert sweep.mean_accuracy["all"] < 0.75
    assert sum(sweep.n_samples[:3]) == 240


def test_samples_to_test_on_are_needed():
    """Without test data a share is held out: None would test on what is trained on."""
    with pytest.raises(InvalidDataError, match=r"'test_size' parameter must be a positive number below 1\. Got None"):
        swept(test_size=None)
    with pytest.raises(InvalidDataError, match="'learning_rates' parameter must be a sequence"):
        swept(learning_rates=iter([1e-3]))
