"""train_only, freeze_rest and unfreeze: what is trained, what is frozen, and what is given back."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import content_of, model_state, needs_pieces, unchanged
from networks import classifier, samples
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
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
    return replace(rec, layers=layers, head=replace(rec.head, verdict=head), verdict="middle" if layers else "head")


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
    """A weight that two modules share is trained whichever is named, with a warning that the other changes too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    message = r"Training one layer changes another, .*: '1.weight' is also '0.weight' \(tied weights\)"
    with pytest.warns(UserWarning, match=message) as caught, rs.train_only(model, ["1"]) as parameters:
        assert {id(p) for p in parameters} == {id(model[0].weight), id(model[1].bias)}
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="'0.weight' is also '1.weight'") as caught:
        rs.freeze_rest(model, ["0"])
    assert caught[0].filename == __file__


def test_tied_weights_that_are_all_trained():
    """There is no warning where both users of a weight are trained, nor for one module under two names."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    with rs.train_only(model, ["0", "1"]) as parameters:
        assert len(parameters) == 3
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model.alias = model[0]
    with rs.train_only(model, ["0"]) as first, rs.train_only(model, ["alias"]) as second:
        assert [id(p) for p in first] == [id(p) for p in second] == [id(p) for p in model[0].parameters()]


def test_a_tied_weight_of_advice():
    """Of advice, a tied weight counts with its owner; a user outside of what is advised is warned of."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    with (
        pytest.warns(UserWarning, match=r"'0.weight' is also '2.weight'"),
        rs.train_only(model, advice(model, layers=("0",))),
    ):
        pass
    with rs.train_only(model, advice(model, layers=("0", "2"))) as parameters:
        assert len(parameters) == 5
    with rs.train_only(model, advice(model, layers=("2",))) as parameters:
        assert id(model[2].weight) not in {id(p) for p in parameters}


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt()])
def test_flags_and_hooks_are_given_back(error):
    """On leaving, also by an exception, requires_grad, training flags and hooks are what they were."""
    model = normed()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].requires_grad_(False)
    before, attributes = model_state(model), [dict(vars(module)) for module in model.modules()]

    def block():
        with rs.train_only(model, ["3"]) as parameters:
            assert all(p.requires_grad for p in parameters)
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
    assert [dict(vars(module)) for module in model.modules()] == attributes


def test_flags_are_set_before_the_loop_sets_them():
    """What is frozen is in evaluation mode from the start, and the flags of the other modules are left alone."""
    model = normed().train()
    with rs.train_only(model, ["3", "4"]):
        assert [module.training for module in model] == [False, False, True, True, True, True, False]


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
    """Advice whose parameters the model lacks is refused with its layers and the nearest parameters."""
    rec = advice(normed(), layers=("3",))
    message = r"The advice is for another model: it names the layers '3', '6', whose .* named '3.weight'. Did you mean"
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


def test_an_undecided_advice_trains_nothing():
    """Where the forecast does not decide it, not even the new head is trained alone, which was seldom enough."""
    model = classifier()
    few = samples(6, classes=(5, 6), seed=1)
    rec = rs.recommend_layers(model, samples(), few, random_state=0)
    assert (rec.verdict, rec.head.verdict) == ("undecided", "retrain")
    message = r"undecided, so it does not tell what to train\. A class of the unknown data has 3 independent samples"
    for act in (rs.freeze_rest, rs.param_groups):
        with unchanged(model), pytest.raises(InvalidDataError, match=message):
            act(model, rec, **({"lr": 0.1} if act is rs.param_groups else {}))
    with rs.train_only(model, [rec.head.name]) as parameters:
        assert len(parameters) == 2


def test_an_undecided_advice_is_not_called_keep():
    """Where the advice is undecided, the error says that, and how to train all the same."""
    model = classifier()
    rec = rs.recommend_layers(model, samples(400)[0], samples(400, seed=1)[0], random_state=0)
    with (
        pytest.raises(InvalidDataError, match=r"The advice is undecided.*train_only\(model, "),
        rs.train_only(model, rec),
    ):
        pass


def test_advice_serves_a_replaced_head():
    """Of a head that was replaced since the advice was given, all parameters are trained, whatever their names."""
    model = normed()
    rec = advice(model, layers=("3",))
    model[6] = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with rs.train_only(model, rec) as parameters:
        assert [id(p) for p in parameters] == [id(p) for part in (model[3], model[6]) for p in part.parameters()]


def test_what_is_no_floating_number_is_not_trained():
    """Of a layer that is named, parameters that cannot have a gradient are left alone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with rs.train_only(model, ["1"]) as parameters:
        assert [id(p) for p in parameters] == [id(model[1].weight), id(model[1].bias)]


def forms() -> list[Any]:
    """Return both ways to freeze, as context managers."""

    @contextmanager
    def frozen(model: nn.Module, layers: Any) -> Iterator[list[nn.Parameter]]:
        parameters = rs.freeze_rest(model, layers)
        yield parameters
        rs.unfreeze(model)

    return [pytest.param(rs.train_only, id="train_only"), pytest.param(frozen, id="freeze_rest")]


class Block(nn.Module):
    """A convolution, a normalisation and a dropout."""

    def __init__(self, n_in: int, n_out: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(n_in, n_out, 3, padding=1), norm, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.norm(self.conv(x))))


def conv_net() -> nn.Sequential:
    """Return three blocks, with batch and group normalisation and dropout, and the head "head"."""
    net = nn.Sequential()
    net.add_module("low", Block(1, 4, nn.BatchNorm2d(4)))
    net.add_module("middle", Block(4, 6, nn.GroupNorm(2, 6)))
    net.add_module("high", Block(6, 8, nn.BatchNorm2d(8)))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("drop", nn.Dropout(0.5))
    net.add_module("head", nn.Linear(8, 3))
    return net


@pytest.mark.parametrize("form", forms())
def test_an_epoch_leaves_what_is_frozen_bit_for_bit(form):
    """After an epoch of SGD with momentum and weight decay, every frozen tensor is what it was; all others changed."""
    model = conv_net()
    X, y = torch.randn(48, 1, 8, 8), torch.arange(48) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=8, shuffle=True)
    before = tensors(model)
    with form(model, ["high", "head"]) as parameters:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert changed(model, before) == {name for name in before if name.startswith(("high.", "head."))}


@pytest.mark.parametrize("form", forms())
def test_dropout_is_off_in_what_is_frozen(form):
    """A dropout goes with the nearest module around it that has parameters; of one that is trained, it stays on."""
    model = conv_net()
    with form(model, ["high", "head"]):
        model.train()
        training = {name for name, module in model.named_modules() if module.training}
        assert training == {"", "high", "high.conv", "high.norm", "high.drop", "pool", "flat", "drop", "head"}
        x = torch.ones(4, 1, 8, 8)
        assert torch.equal(model[:2](x), model[:2](x))
        assert not torch.equal(model[:3](x), model[:3](x))


def test_a_shared_dropout_stays_on_where_one_of_its_users_is_trained():
    """A dropout in two blocks is off only if both are frozen."""
    drop = nn.Dropout()
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), drop), nn.Sequential(nn.Linear(4, 4), drop), nn.Linear(4, 3))
    for layers, on in ((["1"], True), (["0"], True), (["2"], False)):
        with rs.train_only(model, layers):
            assert model.train()[1][1].training is on


def test_what_has_buffers_alone_is_frozen_without_its_dropout():
    """A positional encoding among trained layers keeps its buffer, and the dropout in it stays on."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("places", torch.zeros(4))
            self.drop = nn.Dropout()

        def forward(self, x):
            return self.drop(x + self.places)

    model = nn.Sequential(Positions(), nn.Linear(4, 3)).eval()
    with rs.train_only(model, ["1"]):
        assert [module.training for module in model.train().modules()] == [True, False, True, True]


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize(
    "frozen",
    [
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True), 2),
        lambda: nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True),
    ],
    ids=["layer", "encoder", "lstm"],
)
def test_dropout_inside_attention_and_recurrent_modules_is_off(form, frozen):
    """Frozen, these return what they do in evaluation mode, also between trained layers; given back, they drop."""
    model = nn.ModuleDict({"below": nn.Linear(4, 4), "frozen": frozen(), "head": nn.Linear(4, 3)})

    def run() -> Tensor:
        out = model["frozen"](model["below"](torch.ones(5, 3, 4)))
        return model["head"](out[0] if isinstance(out, tuple) else out)

    model.eval()
    expected = run()
    model.train()
    with form(model, ["below", "head"]):
        model.train()
        torch.testing.assert_close(run(), expected)
        run().sum().backward()
    assert model["below"].weight.grad is not None
    assert not torch.allclose(run(), run())


@pytest.mark.parametrize("layers", [["head"], ["encoder.layers.1", "head"], ["encoder.layers.0", "head"]])
def test_parts_of_a_transformer_with_padding(layers):
    """Some of torch's transformer layers can be frozen where there is padding; the samples are told apart as before."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, ids, padding):
            return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=padding)[:, 0])

    model, ids = Reader(), torch.randint(10, (4, 5))
    padding = torch.arange(5).expand(4, 5) > 3
    expected = model(ids, padding)
    with rs.train_only(model, layers) as parameters:
        model.train()
        out = model(ids, padding)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)
    assert model.encoder.use_nested_tensor


def test_names_of_a_data_parallel_model_are_those_inside():
    """A model in DataParallel is taken as the model inside, for names and for advice."""
    model = normed()
    for layers in (["3", "6"], advice(model, layers=("3",))):
        wrapped = nn.DataParallel(model)
        before = tensors(model)
        with rs.train_only(wrapped, layers) as parameters:
            train(wrapped, parameters)
        assert {name.split(".")[0] for name in changed(model, before)} - {"4"} == {"3", "6"}
        assert "1.running_mean" not in changed(model, before)


def test_freeze_rest_until_unfreeze():
    """What is frozen stays so through train() and eval(), and all flags are given back by unfreeze alone."""
    model = normed()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before, attributes = model_state(model), [dict(vars(module)) for module in model.modules()]
    keys = list(model.state_dict())
    parameters = rs.freeze_rest(model, ["3"])
    assert [id(p) for p in parameters] == [id(p) for p in model[3].parameters()]
    assert list(model.state_dict()) == keys
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert [module.training for module in model] == [False, False, True, True, False, True, False]
    assert [p.requires_grad for p in model.parameters()] == [False, False, False, False, True, True, False, False]
    rs.unfreeze(model)
    after = model_state(model)
    assert (after.requires_grad, after.training) == (before.requires_grad, before.training)
    assert [dict(vars(module)) for module in model.modules()] == attributes


def through_file(model: nn.Module) -> nn.Module:
    """Save and load a model as a whole."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_of_a_frozen_model_is_frozen(copied):
    """A copy trains the same layers as the model, leaves that alone, and can be given free by itself."""
    model = normed()
    rs.freeze_rest(model, advice(model, layers=("3",)))
    before = tensors(model)
    twin = copied(model)
    train(twin, [p for p in twin.parameters() if p.requires_grad])
    statistics = {"4.running_mean", "4.running_var", "4.num_batches_tracked"}
    assert changed(twin, before) == {"3.weight", "3.bias", "6.weight", "6.bias", *statistics}
    assert not changed(model, before)
    rs.unfreeze(twin)
    assert all(p.requires_grad for p in twin.parameters())
    assert all(module.training for module in twin.modules())
    assert not model[0].weight.requires_grad
    assert not model.train()[1].training


def test_freezing_again_replaces():
    """A second freeze_rest replaces the first, and unfreeze goes back to before both; a refused one changes nothing."""
    model = normed()
    rs.freeze_rest(model, ["0", "1"])
    rs.freeze_rest(model, ["3", "4"])
    with pytest.raises(LayerNotFoundError, match="no layer named '7'"):
        rs.freeze_rest(model, ["7"])
    assert [module.training for module in model.train()] == [False, False, True, True, True, True, False]
    rs.unfreeze(model)
    assert all(module.training for module in model.train())
    assert all(p.requires_grad for p in model.parameters())


def test_a_context_in_a_frozen_model():
    """Inside freeze_rest, train_only decides for as long as it lasts; then the former holds again."""
    model = nn.ModuleDict({"one": nn.LSTM(4, 4, 2, dropout=0.5), "two": nn.BatchNorm1d(4), "head": nn.Linear(4, 2)})
    rs.freeze_rest(model, ["head"])
    with rs.train_only(model, ["one", "two"]):
        assert [module.training for module in model.train().values()] == [True, True, False]
        assert model["one"].dropout == 0.5
    assert [module.training for module in model.train().values()] == [True, False, True]
    assert model["one"].dropout == 0.0
    assert [p.requires_grad for p in model["head"].parameters()] == [True, True]
    rs.unfreeze(model)
    assert model["one"].dropout == 0.5
    assert all(module.training for module in model.train().values())


def test_unfreezing_what_is_not_frozen():
    """Where nothing is frozen, unfreeze says so."""
    model = normed()
    model[0].requires_grad_(False)
    with pytest.raises(InvalidDataError, match=r"not frozen, so there is nothing to unfreeze.*freeze_rest\(model"):
        rs.unfreeze(model)
    assert not model[0].weight.requires_grad


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """Be a group of one process, over gloo."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # which needs no C++ compiler


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, compiled], ids=["distributed", "compiled"])
def test_a_model_is_frozen_before_it_is_wrapped(wrap: Callable[[nn.Module], nn.Module]):
    """Frozen first, then wrapped, a model trains what it should and nothing else; to freeze it later is refused."""
    model = conv_net()
    parameters = rs.freeze_rest(model, ["high", "head"])
    wrapped = wrap(model)
    before = tensors(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        wrapped.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(torch.randn(6, 1, 8, 8)), torch.arange(6) % 3).backward()
        optimizer.step()
        wrapped.eval()
    assert changed(model, before) == {name for name in before if name.startswith(("high.", "head."))}
    message = r"is wrapped in (\w+), which .* Freeze first, then wrap: freeze_rest\(model, layers\), then .*\(model\)\."
    with pytest.raises(UnsupportedModelError, match=message), rs.train_only(wrapped, ["head"]):
        pass
    with pytest.raises(UnsupportedModelError, match=message):
        rs.freeze_rest(wrapped, ["head"])
    rs.unfreeze(wrapped)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")
def test_a_sharded_model_of_the_first_kind_is_refused():
    """FullyShardedDataParallel flattens the parameters, so it has to come after freezing."""
    wrapped = FullyShardedDataParallel(normed(), device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"Freeze first, .* then FullyShardedDataParallel\(model\)"):
        rs.freeze_rest(wrapped, ["3"])


@needs_pieces
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("freeze_first", [True, False])
def test_a_fully_sharded_model(freeze_first):
    """A model in the shards of fully_shard can be frozen before and after."""
    model = conv_net()
    if freeze_first:
        rs.freeze_rest(model, ["high", "head"])
    mesh = init_device_mesh("cpu", (1,))
    for part in (model.low, model.middle, model.high, model):
        fully_shard(part, mesh=mesh)
    if not freeze_first:
        rs.freeze_rest(model, ["high", "head"])
    before = {name: content_of(tensor) for name, tensor in whole(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(6, 1, 8, 8)), torch.arange(6) % 3).backward()
        optimizer.step()
    moved = {name for name, tensor in whole(model).items() if content_of(tensor) != before[name]}
    assert moved == {name for name in before if name.startswith(("high.", "head."))}
    rs.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a sharded model in one piece."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, distributed.tensor.DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
