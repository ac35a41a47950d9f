"""train_only: what is trained, what is frozen, and what is given back."""

from dataclasses import replace

import pytest
import torch
from helpers import content_of, hook_count, model_state
from networks import classifier, samples
from torch import nn
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, UnsupportedModelError


def normed() -> nn.Sequential:
    """Return layers "0" and "3", each with batch normalisation after it, and the head "6"."""
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU()),
        nn.Linear(6, 3),
    )


def advice(model: nn.Module, *, layers: tuple[str, ...] = (), head: str = "retrain") -> rs.Recommendation:
    """Return advice to retrain these layers of the model."""
    rec = rs.recommend_layers(model, samples(), samples(classes=(5, 6), seed=1), random_state=0)
    return replace(rec, layers=layers, head=replace(rec.head, verdict=head))


def train(model: nn.Module, parameters: list[nn.Parameter], *, steps: int = 3) -> None:
    """Train as a user does, in training mode and with weight decay."""
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    model.train()
    for step in range(steps):
        loss = model(samples(seed=step)[0]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def tensors(model: nn.Module) -> dict[str, bytes]:
    """Return the bytes of every parameter and buffer."""
    return {name: content_of(tensor) for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, bytes]) -> set[str]:
    """Return the names of the tensors that differ."""
    return {name for name, content in tensors(model).items() if content != before[name]}


@pytest.mark.parametrize(
    ("layers", "head", "names"),
    [
        ((), "retrain", {"6.weight", "6.bias"}),
        (("3",), "retrain", {"3.weight", "3.bias", "6.weight", "6.bias"}),
        (("3",), "keep", {"3.weight", "3.bias"}),
        (("0",), "undecided", {"0.weight", "0.bias", "1.weight", "1.bias"}),
    ],
)
def test_only_what_is_advised_is_trained(layers, head, names):
    """Parameters of the advised layers, and of the head if it is advised, get gradients; no other does."""
    model = normed()
    with rs.train_only(model, advice(model, layers=layers, head=head)) as parameters:
        named = dict(model.named_parameters())
        assert [id(p) for p in parameters] == [id(named[name]) for name in named if name in names]
        assert {name for name, p in named.items() if p.requires_grad} == names
        model(samples()[0]).sum().backward()
        assert {name for name, p in named.items() if p.grad is not None} == names


def test_what_is_frozen_does_not_change():
    """Frozen weights and batch statistics are bit for bit the same after a training that calls model.train()."""
    model = normed()
    before = tensors(model)
    with rs.train_only(model, advice(model, layers=("3",))) as parameters:
        train(model, parameters)
    statistics = {"4.running_mean", "4.running_var", "4.num_batches_tracked"}
    assert changed(model, before) == {"3.weight", "3.bias", "6.weight", "6.bias", *statistics}


def test_names_train_what_is_inside():
    """Given names, the parameters and statistics inside those modules are trained, and only those."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), normed()[3:])
    before = tensors(model)
    with rs.train_only(model, ["0"]) as parameters:
        train(model, parameters)
    statistics = {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
    assert changed(model, before) == {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", *statistics}


def test_a_single_name_will_do():
    """One name may come without a list around it, and a name is not the beginning of others."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)))
    with rs.train_only(model, "1") as parameters:
        assert [id(p) for p in parameters] == [id(p) for p in model[1].parameters()]


def test_a_frozen_norm_normalises_as_it_did():
    """A frozen batch norm uses its running statistics, whatever the training loop calls; a trained one the batch's."""
    model, X = normed(), samples()[0]
    with torch.no_grad():
        expected = model.eval()[1](model[0](X))
    with rs.train_only(model, ["3", "4", "6"]):
        model.train()
        with rs.trace_layers(model, ["1", "4"]) as outputs:
            model(X)
    assert torch.equal(outputs["1"], expected)
    torch.testing.assert_close(outputs["4"].mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", [spectral_norm, hooked_spectral_norm])
def test_frozen_spectral_norms_keep_their_vectors(norm):
    """The vectors of a frozen spectral norm are not updated, those of a trained one are."""
    model = nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3))
    for layers in (["2", "4"], advice(model, layers=("2",))):
        before = tensors(model)
        with rs.train_only(model, layers) as parameters:
            train(model, parameters)
        moved = changed(model, before)
        assert {name.split(".")[0] for name in moved} == {"2", "4"}
        assert {name[-2:] for name in moved} >= {"_u", "_v"}


def test_a_model_with_a_buffer_of_its_own_is_not_frozen():
    """A module that holds trained layers stays in the mode that the loop sets, though it has buffers itself."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(4))
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            self.mode = self.training
            return self.head(self.body(x - self.centre))

    model = Centred()
    with rs.train_only(model, ["head"]) as parameters:
        train(model, parameters)
        assert model.mode is True


def test_a_tied_weight_is_found_by_either_name():
    """A weight that two modules share is trained whichever of them is named."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with rs.train_only(model, ["1"]) as parameters:
        assert {id(p) for p in parameters} == {id(model[0].weight), id(model[1].bias)}


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt()])
def test_flags_and_hooks_are_given_back(error):
    """On leaving, also by an exception, requires_grad, training flags and hooks are what they were."""
    model = normed()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].requires_grad_(False)
    before, hooks = model_state(model), hook_count(model)

    def block():
        with rs.train_only(model, ["3"]) as parameters:
            assert all(p.requires_grad for p in parameters)
            assert hook_count(model) > hooks
            train(model, parameters)
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(type(error)):
            block()
    after = model_state(model)
    assert after.requires_grad == before.requires_grad
    assert after.training == before.training
    assert after.hooks == before.hooks


def test_flags_are_set_before_the_loop_sets_them():
    """Frozen norms are in evaluation mode from the start, and the flags of the other modules are left alone."""
    model = normed().train()
    with rs.train_only(model, ["3", "4"]):
        assert [module.training for module in model] == [True, False, True, True, True, True, True]


def test_nothing_to_train():
    """Advice to keep everything, or no names, is an error: there would be nothing for an optimizer."""
    model = classifier()
    before = model_state(model)
    for layers in (advice(model, head="keep"), [], ["1"]):
        with pytest.raises(InvalidDataError, match="Nothing is to be trained"), rs.train_only(model, layers):
            pass
    assert model_state(model).requires_grad == before.requires_grad


def test_a_name_that_does_not_exist():
    """A misspelt layer is refused with the nearest names, and the model is left as it is."""
    model = nn.Sequential()
    model.add_module("conv1", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 2))
    message = r"no layer named 'conv2'. Did you mean 'conv1'"
    with pytest.raises(LayerNotFoundError, match=message), rs.train_only(model, ["head", "conv2"]):
        pass
    assert all(p.requires_grad for p in model.parameters())


def test_advice_for_another_model():
    """Advice whose parameters the model lacks is refused with the first of them."""
    rec = advice(normed(), layers=("3",))
    message = r"no parameter named '3.bias'. Did you mean"
    with pytest.raises(LayerNotFoundError, match=message), rs.train_only(classifier()[:3], rec):
        pass


def test_advice_outlives_buffers():
    """Advice still serves where a norm was since replaced by one without statistics."""
    model = normed()
    rec = advice(model, layers=("3",))
    model[4] = nn.Identity()
    with rs.train_only(model, rec) as parameters:
        assert len(parameters) == 4


@pytest.mark.parametrize("model", [nn.ReLU(), "model"])
def test_a_model_that_cannot_be_trained(model):
    """What has no parameters, or is no module, is refused."""
    with (
        pytest.raises(UnsupportedModelError, match=r"no parameters|must be a torch\.nn\.Module"),
        rs.train_only(model, []),
    ):
        pass


def test_loaded_advice_works(tmp_path):
    """Advice that was saved and loaded trains the same parameters."""
    model = normed()
    rec = advice(model, layers=("0",))
    rec.save(tmp_path / "rec.json")
    with rs.train_only(model, rec) as first:
        pass
    with rs.train_only(model, rs.Recommendation.load(tmp_path / "rec.json")) as second:
        assert [id(p) for p in first] == [id(p) for p in second]


def test_an_undecided_advice_is_not_called_keep():
    """Where the advice is undecided, the error says that, and how to train all the same."""
    model = classifier()
    rec = rs.recommend_layers(model, samples(400)[0], samples(400, seed=1)[0], random_state=0)
    with (
        pytest.raises(InvalidDataError, match=r"the advice is undecided.*train_only\(model, "),
        rs.train_only(model, rec),
    ):
        pass
