"""param_groups: what is trained, at which learning rate, and with which weight decay."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import content_of, unchanged
from networks import samples
from torch import nn

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, UnsupportedModelError


def deep() -> nn.Sequential:
    """Return the layers "0", "2" and "4", batch normalisation after the first, and the head "6"."""
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.BatchNorm1d(8)),
        *(nn.Linear(8, 8), nn.ReLU()),
        *(nn.Linear(8, 6), nn.ReLU()),
        nn.Linear(6, 3),
    )


def advice(model: nn.Module, *, head: str = "retrain", **needs: float) -> rs.Recommendation:
    """Return advice to retrain these layers of a model, with these needs: ``_2=0.5`` is that of the layer "2"."""
    rec = rs.recommend_layers(model, samples(), samples(classes=(5, 6), seed=1), random_state=0, layers=["0", "2", "4"])
    by_name = {name.removeprefix("_"): need for name, need in needs.items()}
    table = tuple(replace(row, need=by_name.get(row.name, row.need)) for row in rec.table)
    layers = tuple(row.name for row in table if row.name in by_name)
    head_row = replace(rec.head, verdict=head)
    return replace(rec, layers=layers, table=table, head=head_row, verdict="middle" if layers else "head")


def rates(groups: list[dict[str, object]]) -> dict[str, float]:
    """Return the learning rate of each layer, which all of its groups share."""
    found = {group["name"]: group["lr"] for group in groups}
    assert all(group["lr"] == found[group["name"]] for group in groups)
    return found


def test_groups_hold_what_is_trained_once():
    """The groups hold exactly the parameters that train_only trains, a layer after the other, the head last."""
    model = deep()
    rec = advice(model, _0=0.1, _4=0.2)
    groups = rs.param_groups(model, rec, 0.1, weight_decay=0.01)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        (name, 0.1, decay) for name in ("0", "4", "6") for decay in (0.01, 0.0)
    ]
    assert all(set(group) == {"params", "lr", "weight_decay", "name"} for group in groups)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    with rs.train_only(model, rec) as parameters:
        assert sorted(held) == sorted(map(id, parameters))


def test_biases_and_normalisations_do_not_decay():
    """What has one dimension or none, or belongs to a normalisation, gets no weight decay; all else does."""
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(1, 2, 3))
    model.add_module("norm", nn.LayerNorm((2, 4, 4)))
    model.add_module("head", nn.Linear(32, 2))
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.head.scale = model.scale
    groups = rs.param_groups(model, ["conv", "norm", "head"], 0.1, weight_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {name for name, decay in decays.items() if decay == 0.5} == {"conv.weight", "head.weight"}
    assert {name for name, decay in decays.items() if decay == 0.0} == set(names.values()) - {
        "conv.weight",
        "head.weight",
    }


def test_one_group_a_layer_without_weight_decay():
    """Where nothing decays, each layer has one group."""
    groups = rs.param_groups(deep(), ["0", "6"], 0.1)
    assert [(group["name"], len(group["params"])) for group in groups] == [("0", 2), ("6", 2)]


def test_layer_decay_counts_the_trained_layers_above():
    """The head learns at lr, and each trained layer below by the factor more slowly; untrained ones do not count."""
    model = deep()
    groups = rs.param_groups(model, advice(model, _0=0.0, _4=0.0), 0.8, layer_decay=0.5)
    assert rates(groups) == {"0": 0.2, "4": 0.4, "6": 0.8}
    groups = rs.param_groups(model, advice(model, head="keep", _0=0.0, _4=0.0), 0.8, layer_decay=0.5)
    assert rates(groups) == {"0": 0.4, "4": 0.8}


def test_layer_decay_of_names_goes_by_their_order():
    """Named layers are in the order in which they are named; those without parameters do not count."""
    groups = rs.param_groups(deep(), ["2", "0", "5", "6"], 1, layer_decay=0.1)
    assert rates(groups) == pytest.approx({"2": 0.01, "0": 0.1, "6": 1.0})


def test_a_parameter_in_two_named_layers_counts_with_the_first():
    """No parameter is in two groups, which an optimizer would refuse."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    groups = rs.param_groups(model, ["0.0", "0", "1"], 1.0, layer_decay=0.5)
    assert [(group["name"], [id(p) for p in group["params"]]) for group in groups] == [
        ("0.0", [*map(id, model[0][0].parameters())]),
        ("0", [*map(id, model[0][1].parameters())]),
        ("1", [*map(id, model[1].parameters())]),
    ]


def test_rates_by_need():
    """A layer learns at the share of its need in the largest, not below a tenth, and the head at lr."""
    model = deep()
    assert rates(rs.param_groups(model, advice(model, _0=0.5, _2=2.0, _4=-1.0), 0.4, by_need=True)) == pytest.approx(
        {"0": 0.1, "2": 0.4, "4": 0.04, "6": 0.4}
    )
    assert rates(rs.param_groups(model, advice(model), 0.4, by_need=True)) == {"6": 0.4}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizers_take_the_groups(optimizer):
    """A step of any optimizer changes what is in the groups and nothing else, the lower layers less with SGD."""
    model = deep()
    layers = ["0", "4", "6"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = rs.param_groups(model, layers, 0.1, layer_decay=0.5, weight_decay=0.01)
    with rs.train_only(model, layers):
        stepper = optimizer(groups)
        nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        stepper.step()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    moved = {name for name, parameter in model.named_parameters() if content_of(parameter) != content_of(before[name])}
    assert moved == {name for name in before if name.startswith(("0.", "4.", "6."))}
    if optimizer is torch.optim.SGD:
        for name, rate, decay in (("0.weight", 0.025, 0.01), ("4.bias", 0.05, 0.0), ("6.weight", 0.1, 0.01)):
            expected = before[name] - rate * (gradients[name] + decay * before[name])
            torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected)


def test_the_model_is_not_changed():
    """Nothing of the model changes, nor in an error."""
    model = deep()
    rec = advice(model, _2=0.5)
    with unchanged(model):
        rs.param_groups(model, rec, 0.1, by_need=True, weight_decay=0.1)
        with pytest.raises(LayerNotFoundError, match="no layer named '7'"):
            rs.param_groups(model, ["0", "7"], 0.1)


def test_a_data_parallel_model():
    """A model in DataParallel is taken as the model inside."""
    model = deep()
    inside = rs.param_groups(model, ["0", "6"], 0.1)
    assert rs.param_groups(nn.DataParallel(model), ["0", "6"], 0.1) == inside


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_model_is_refused():
    """Of a compiled model, the groups are those of the model inside."""
    with pytest.raises(UnsupportedModelError, match=r"Give the model inside it: model\._orig_mod"):
        rs.param_groups(torch.compile(deep()), ["0"], 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"The 'lr' parameter must be zero or a positive number\. Got -0\.1"),
        ({"lr": math.nan}, r"The 'lr' parameter must be"),
        ({"weight_decay": -1}, r"The 'weight_decay' parameter must be zero or a positive number"),
        ({"layer_decay": 0}, r"The 'layer_decay' parameter must be a positive number\. Got 0"),
        ({"layer_decay": 1.5}, r"The 'layer_decay' parameter must be at most 1\. Got 1\.5"),
        ({"layer_decay": 0.5, "by_need": True}, r"by layer_decay= or by need\. Leave one"),
        ({"by_need": True}, r"Names have no needs\. Give a Recommendation"),
    ],
)
def test_bad_options(options, message):
    """Numbers out of their limits, and options that do not go together, are refused."""
    with pytest.raises(InvalidDataError, match=message):
        rs.param_groups(deep(), ["0", "6"], **{"lr": 0.1, **options})


def test_needs_that_give_no_rates():
    """A need that is no number, or none above 0, is refused where rates are to go by it."""
    model = deep()
    with pytest.raises(InvalidDataError, match=r"The need of the layer '2' is nan"):
        rs.param_groups(model, advice(model, _0=0.5, _2=math.nan), 0.1, by_need=True)
    with pytest.raises(InvalidDataError, match=r"No layer to be trained has a need above 0"):
        rs.param_groups(model, advice(model, _0=-0.5, _2=0.0), 0.1, by_need=True)


def test_layers_that_cannot_be_trained():
    """Misspelt layers, empty advice, and advice for another model are refused as by train_only."""
    model = deep()
    with pytest.raises(LayerNotFoundError, match=r"no layer named '10'. Did you mean '1' or '0'"):
        rs.param_groups(model, ["10"], 0.1)
    with pytest.raises(
        InvalidDataError, match="Nothing is to be trained: no layer with parameters is advised or named"
    ):
        rs.param_groups(model, replace(advice(model, head="keep"), verdict="none"), 0.1)
    with pytest.raises(InvalidDataError, match="The advice is undecided, so it does not tell what to train"):
        rs.param_groups(model, replace(advice(model, head="keep"), verdict="undecided"), 0.1)
    with pytest.raises(LayerNotFoundError, match=r"for another model: it names the layers '4', '6', whose parameters"):
        rs.param_groups(model[:3], advice(model, _0=0.1, _4=0.1), 0.1)
