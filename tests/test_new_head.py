"""A new head in the place of the old one: which layer that is, what its rows are, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from advised import BlockNet, advise, labelled
from helpers import assert_same_state, content_of, model_state, random_states, small_mlp
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, UnsupportedModelError
from retrainscope.new_head import replace_head

transformers = pytest.importorskip("transformers", reason="the group test brings it")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def rows_of(head: nn.Module) -> list[bytes]:
    """Return the weights and the bias of each output, bit for bit."""
    biases = [b"" for _ in head.weight] if head.bias is None else [content_of(b) for b in head.bias]
    return [content_of(weight) + bias for weight, bias in zip(head.weight, biases, strict=True)]


class Told(nn.Module):
    """Tells its number of classes; the head is registered first, and an inner layer has as many outputs."""

    def __init__(self, n_classes: int = 4) -> None:
        super().__init__()
        self.num_classes = n_classes
        self.head = nn.Linear(6, n_classes)
        self.body = nn.Sequential(nn.Linear(3, n_classes), nn.ReLU(), nn.Linear(n_classes, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


# Rows


def test_the_new_head_is_in_the_model(mlp):
    """The last layer is another one with as many outputs as asked for, is returned, and runs in the model."""
    old, below = mlp[4], model_state(mlp[:4])
    head = replace_head(mlp, 5)
    assert_same_state(below, model_state(mlp[:4]))
    assert head is mlp[4] is not old
    assert (head.in_features, head.out_features, head.weight.shape, head.bias.shape) == (6, 5, (5, 6), (5,))
    assert mlp(torch.randn(7, 3)).shape == (7, 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: nn.Linear(6, n),
        lambda n: nn.Linear(6, n, bias=False),
        lambda n: nn.Linear(6, n, dtype=torch.bfloat16),
        lambda n: nn.Conv1d(6, n, 1),
        lambda n: nn.Conv2d(6, n, 1, stride=2, padding=1, bias=False),
        lambda n: nn.Conv3d(6, n, 1, dtype=torch.float64),
    ],
)
def test_new_rows_are_those_of_torch(make):
    """The new layer is what torch makes of the same class, type and settings after seeding, and is trainable."""
    model = nn.Sequential(nn.Linear(3, 6), make(2)).requires_grad_(False)
    head = replace_head(model, 4, random_state=np.random.RandomState(3))
    torch.manual_seed(np.random.RandomState(3).randint(2**31))
    expected = make(4)
    assert repr(head) == repr(expected)
    assert type(head) is type(expected)
    assert rows_of(head) == rows_of(expected)
    assert head.weight.dtype == expected.weight.dtype
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert not any(parameter.requires_grad for parameter in model[0].parameters())


@pytest.mark.parametrize("random_state", [None, 0, np.random.RandomState(1)])
def test_random_states_stay(mlp, random_state):
    """The global random generators are where they were."""
    before = random_states()
    replace_head(mlp, 3, random_state=random_state)
    assert random_states() == before


def test_random_state_decides():
    """The same random state gives the same rows, another one or none gives others."""
    drawn = [rows_of(replace_head(small_mlp(), 3, random_state=state)) for state in (0, 0, 1, None, None)]
    assert drawn[0] == drawn[1]
    assert len({*map(tuple, drawn)}) == 4


def test_mode_and_device_stay():
    """The new head is in the mode and on the device of the old one."""
    for training in (True, False):
        assert replace_head(small_mlp().train(training), 3).training is training
    with torch.device("meta"):
        model = small_mlp()
    assert replace_head(model, 3, keep="all").weight.is_meta


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (None, {}),
        ([], {}),
        ({}, {}),
        ([3, 1], {0: 3, 1: 1}),
        (range(2), {0: 0, 1: 1}),
        (np.array([2]), {0: 2}),
        (torch.tensor([2, 0]), {0: 2, 1: 0}),
        ((3, 3), {0: 3, 1: 3}),
        ({4: 0, np.int64(2): 3}, {4: 0, 2: 3}),
        ("all", {0: 0, 1: 1, 2: 2, 3: 3}),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "without bias", "convolution"])
def test_kept_rows(keep, expected, kind):
    """Kept rows are the old ones bit for bit, in the places asked for; every other row is a new one."""
    layer = {"linear": nn.Linear(6, 4), "without bias": nn.Linear(6, 4, bias=False), "convolution": nn.Conv2d(6, 4, 1)}
    model = nn.Sequential(nn.Linear(3, 6), layer[kind])
    with torch.no_grad():
        model[1].weight[3].view(-1)[:2] = torch.tensor([float("nan"), -0.0])
    old, before = rows_of(model[1]), copy.deepcopy(model[1])
    new = rows_of(replace_head(model, 5, keep=keep, random_state=0))
    fresh = rows_of(replace_head(nn.Sequential(nn.Linear(3, 6), before), 5, random_state=0))
    assert new == [old[expected[place]] if place in expected else fresh[place] for place in range(5)]
    assert not {*fresh} & {*old}


def test_the_old_head_stays_as_it_was(mlp):
    """Whoever holds the old head, such as for distillation, has it as it was."""
    old = mlp[4]
    before = rows_of(old)
    head = replace_head(mlp, 2, keep="all")
    with torch.no_grad():
        head.weight.zero_()
    assert rows_of(old) == before


def test_kept_outputs_stay():
    """What the model puts out for kept classes is what it was."""
    model, X = small_mlp().eval(), torch.randn(5, 3)
    before = model(X)
    replace_head(model, 6, keep={5: 0, 2: 1})
    torch.testing.assert_close(model(X)[:, [5, 2]], before, rtol=0, atol=1e-6)


# Which layer


def test_the_told_number_of_classes_finds_the_head():
    """The layer with as many outputs as the model tells is the head, of several the one least deep inside."""
    model = Told()
    inner = model.body[0]
    head = replace_head(model, 7)
    assert head is model.head
    assert model.num_classes == 7
    assert model.body[0] is inner


@pytest.mark.parametrize("name", ["classifier", "classifier.1"])
def test_the_name_of_what_ends_in_the_head(name):
    """A module that ends in the head stands for it, as torchvision's classifier does."""
    model = nn.ModuleDict(
        {"classifier": nn.Sequential(nn.Dropout(), nn.Conv2d(3, 2, 1), nn.ReLU()), "b": nn.Linear(2, 2)}
    )
    head = replace_head(model, 4, head=name)
    assert head is model["classifier"][1]
    assert head.out_channels == 4


def test_a_head_inside_another_model():
    """What models around the head note of the number of classes is brought in line, and what others note is not."""
    outer, other = nn.Module(), Told(4)
    outer.inner, outer.other, outer.num_labels = Told(4), other, 9
    replace_head(outer, 3, head="inner.head")
    assert (outer.inner.num_classes, other.num_classes, outer.num_labels) == (3, 4, 9)


def test_the_head_of_the_advice():
    """A recommendation names the head, and its advice fits the model with the new one."""
    model, (X, _) = BlockNet(), labelled()
    rec = advise(model, X, ("blocks.2",), ["blocks.0", "blocks.1", "blocks.2"])
    head = replace_head(model, 5, head=rec)
    assert head is model.head
    with rs.train_only(model, rec) as parameters:
        assert {id(parameter) for parameter in head.parameters()} <= {id(parameter) for parameter in parameters}


def test_a_subclass_stays_one():
    """A subclass with the constructor of its parent, as timm's, stays what it is."""

    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 6), Own(6, 2))
    assert type(replace_head(model, 3)) is Own


# Hugging Face


def text_classifier(kind: str, **settings: object) -> nn.Module:
    """Build a small classifier of token ids with random weights, in evaluation mode."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    small |= {"vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0, "num_key_value_heads": 2}
    config = transformers.CONFIG_MAPPING[kind]
    known = {*config().to_dict(), *getattr(config, "attribute_map", {})}
    chosen = {name: value for name, value in small.items() if name in known}
    return transformers.AutoModelForSequenceClassification.from_config(config(**chosen, **settings)).eval()


IDS = torch.randint(3, 50, (6, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bert", "classifier"),
        ("distilbert", "classifier"),
        ("roberta", "classifier.out_proj"),
        ("funnel", "classifier.linear_out"),
        ("gpt2", "score"),
        ("llama", "score"),
        ("xlm", "sequence_summary.summary"),
    ],
)
@pytest.mark.parametrize("n_labels", [2, 5])
def test_text_classifiers_of_hugging_face(kind, name, n_labels, tmp_path):
    """The head is found, a loss with new labels works, kept logits stay, and what is saved is loaded again."""
    model = text_classifier(kind, num_labels=n_labels)
    before = model(input_ids=IDS).logits.detach()
    head = replace_head(model, 4, keep={3: 0, 0: 1}, random_state=0)
    assert head is model.get_submodule(name)
    labels = torch.tensor([0, 1, 2, 3, 3, 2])
    output = model(input_ids=IDS, labels=labels)
    torch.testing.assert_close(output.logits[:, [3, 0]], before[:, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert head.weight.grad.any()
    assert (model.num_labels, model.config.num_labels) == (4, 4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert rows_of(again.get_submodule(name)) == rows_of(head)


def test_images_of_hugging_face():
    """A classifier of images is given a new head as one of texts is."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    head = replace_head(model, 3)
    assert head is model.classifier
    output = model(torch.randn(4, 3, 16, 16), labels=torch.tensor([0, 1, 2, 2]))
    assert output.logits.shape == (4, 3)
    assert output.loss.isfinite()


def test_names_of_kept_classes_stay():
    """Kept classes keep the names of their own in the configuration; others are numbered by their new place."""
    model = text_classifier("bert", id2label={0: "cat", 1: "dog", 2: "LABEL_2"})
    replace_head(model, 4, keep=[2, 0])
    assert model.config.id2label == {0: "LABEL_0", 1: "cat", 2: "LABEL_2", 3: "LABEL_3"}
    assert model.config.label2id == {"LABEL_0": 0, "cat": 1, "LABEL_2": 2, "LABEL_3": 3}


def test_names_of_dropped_classes_go():
    """As many classes as before are others, whose names are not those of the old ones."""
    model = text_classifier("bert", id2label={0: "cat", 1: "dog"})
    replace_head(model, 2)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert model.config.label2id == {"LABEL_0": 0, "LABEL_1": 1}


def test_a_regression_becomes_a_classifier():
    """The loss of a model that had one output, and so noted that it is a regression, is that of classes."""
    model = text_classifier("bert", num_labels=1)
    model(input_ids=IDS, labels=torch.randn(6))
    assert model.config.problem_type == "regression"
    replace_head(model, 3)
    model(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
    assert model.config.problem_type == "single_label_classification"


def test_a_layer_that_is_no_classifier_changes_no_number():
    """Where another number of outputs is replaced, the number of classes stays."""
    model = text_classifier("roberta", num_labels=3)
    replace_head(model, 5, head="classifier.dense")
    assert model.config.num_labels == 3


def test_tied_heads_are_refused():
    """A language model's head that is its embedding too is refused, and both names are told."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(UnsupportedModelError, match=r"the model tells of 2 classes, and no layer has as many.*lm_head"):
        replace_head(model, 3)
    with pytest.raises(UnsupportedModelError, match=r"'lm_head' shares .*lm_head\.weight is also transformer\.wte\.w"):
        replace_head(model, 3, head="lm_head")


def test_models_with_adapters_are_refused():
    """In a model with adapters of peft it is not clear what the head is; without them it is."""
    peft = pytest.importorskip("peft", reason="the group test brings it")
    model = text_classifier("bert")
    settings = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    replace_head(model, 3)
    tuned = peft.get_peft_model(model, settings)
    assert tuned(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0, 1, 2])).logits.shape == (6, 3)
    with pytest.raises(UnsupportedModelError, match=r"adapters of peft.*Replace the head first"):
        replace_head(tuned, 4, head="base_model.model.classifier")


# What is refused


@pytest.mark.parametrize("n_classes", [1, 0, -3, 2.5, "3", True, None])
def test_bad_number_of_classes(mlp, n_classes):
    """The number of classes is a whole number, at least two."""
    with pytest.raises(InvalidDataError, match=r"'n_classes' parameter must be a positive integer, at least 2\. Got"):
        replace_head(mlp, n_classes)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([0, 2], r"names the old place 2, and the old head's outputs are numbered from 0 to 1"),
        ([-1], r"names the old place -1"),
        ({3: 0}, r"names the new place 3, and the new head's outputs are numbered from 0 to 2"),
        ({-1: 0}, r"names the new place -1"),
        ([0, 1, 0, 1], r"names the new place 3"),
        ([True, False], r"names the old place True"),
        (np.array([True]), r"names the old place (np\.)?True"),
        ([0.0], r"names the old place 0.0"),
        ({"cat": 0}, r"names the new place 'cat'"),
        ("some", r"must be 'all', the old places to keep, such as \[3, 5\], or .*Got 'some' instead"),
        (2, r"must be 'all', .*Got 2 instead"),
    ],
)
def test_bad_keep(mlp, keep, message):
    """Places to keep are whole numbers that the heads have, and the model is untouched where they are not."""
    before = model_state(mlp)
    with pytest.raises(InvalidDataError, match=message):
        replace_head(mlp, 3, keep=keep)
    assert_same_state(before, model_state(mlp))


def test_all_rows_need_their_places():
    """To keep all, there must be a place for each."""
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(InvalidDataError, match=r"at least as many classes as the old head has outputs, 4\. Got .*=3; "):
        replace_head(model, 3, keep="all")


def test_unknown_name(mlp):
    """A misspelt head is refused with the nearest names."""
    model = nn.ModuleDict({"classifier": nn.Linear(3, 2)})
    with pytest.raises(LayerNotFoundError, match=r"no head named 'clasifier'. Did you mean 'classifier'"):
        replace_head(model, 3, head="clasifier")


class OwnLayer(nn.Module):
    """A layer of an unknown kind."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))


class OtherConstructor(nn.Linear):
    """A linear layer that is made in its own way."""

    def __init__(self) -> None:
        super().__init__(3, 2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Identity(), r"The head '1' is a Identity; an nn.Linear, or .* model.set_submodule\('1', \.\.\.\)"),
        (OwnLayer(), r"The head '1' is a OwnLayer"),
        (OtherConstructor(), r"The head '1' is a OtherConstructor"),
        (nn.Conv2d(3, 2, 3), r"The head '1' is a Conv2d; .*kernel size 1"),
        (nn.Conv2d(4, 2, 1, groups=2), r"The head '1' is a Conv2d; .*without groups"),
        (nn.Bilinear(3, 3, 2), r"The head '1' is a Bilinear"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
            r"'1' is made from other .*\.original0, .*\.original1",
        ),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), r"'1' is made from other tensors .*\.original"),
    ],
)
def test_other_kinds_are_refused(layer, message):
    """What has no rows of its own for each output is refused, and what to do is told."""
    model = nn.Sequential(nn.Linear(3, 3), layer)
    before = model_state(model)
    with pytest.raises(UnsupportedModelError, match=message):
        replace_head(model, 3, head="1")
    assert_same_state(before, model_state(model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)), r"lazy parameters.*Run one batch through it first"),
        (nn.Linear(3, 2), r"The model is one Linear, .*Wrap it in an nn\.Sequential"),
        (nn.DataParallel(small_mlp()), r"wrapped in DataParallel.*model\.module"),
        (nn.ReLU(), r"no parameters"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
            r"not clear: the last module with parameters is '1', a BatchNorm1d\. Candidates: '0'\. Name it with head=",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"not clear: the last module with parameters is '0', a Conv2d\. Name it"),
    ],
)
def test_models_without_a_clear_head(model, message):
    """A model whose last layer is no head that can be replaced is refused with the reason."""
    with pytest.raises(UnsupportedModelError, match=message):
        replace_head(model, 3)


def test_two_heads_are_refused():
    """Of two layers that could be the head none is chosen; each can be named, one after the other."""
    model = Told(4)
    model.head_dist = nn.Linear(6, 4)
    with pytest.raises(
        UnsupportedModelError, match=r"2 layers have one output .* 4 classes\. Candidates: 'head', 'head_"
    ):
        replace_head(model, 3)
    for name in ("head", "head_dist"):
        replace_head(model, 3, head=name)
    assert (len(model.head.weight), len(model.head_dist.weight), model.num_classes) == (3, 3, 3)


def test_a_model_without_a_head():
    """A model that tells of classes but has no layer for them, as a body alone, is refused."""
    model = text_classifier("bert", num_labels=3).bert
    with pytest.raises(UnsupportedModelError, match=r"the model tells of 3 classes, and no layer has as many outputs"):
        replace_head(model, 4)


def test_one_head_under_two_names():
    """A head that is registered twice is refused, since only one place would be changed."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    model["b"] = model["a"]
    with pytest.raises(
        UnsupportedModelError, match=r"'a' shares its weights with another module: a\.weight is also b\.w"
    ):
        replace_head(model, 3, head="a")
