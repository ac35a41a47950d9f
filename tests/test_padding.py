"""Padding: whatever holds the place of tokens that are not there changes no score."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import unchanged
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import BertConfig, BertForSequenceClassification

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.padding import joined_tokens, token_mask

N, VOCABULARY, LONGEST = 16, 20, 6
LABELS = [place % 2 for place in range(N)]
ESTIMATORS = {
    "spread": lambda model, **options: rs.ActivationSpread(model, random_state=0, **options),
    "probe": lambda model, **options: rs.LayerDecoderProbe(model, max_epochs=2, random_state=0, **options),
    "inverter": lambda model, **options: rs.GradientInverter(
        model, max_iter=2, samples_per_class=2, random_state=0, **options
    ),
}
NUMBERS = ("values", "interval", "per_class", "known", "unknown", "known_reference", "unknown_reference")


def sentences(seed: int) -> list[Tensor]:
    """Token ids of N samples of two to six tokens; the first sample is the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LONGEST + 1, (N,), generator=generator)
    lengths[0] = LONGEST
    return [torch.randint(2, VOCABULARY, (int(n),), generator=generator) for n in lengths]


KNOWN, UNKNOWN = sentences(0), sentences(1)


def padded(
    samples: list[Tensor], n_tokens: int = 8, *, pad_id: int = 0, left: bool = False, key: str = "attention_mask"
) -> dict[str, Tensor]:
    """Pad samples to so many tokens, and tell what is padding by `key`."""
    ids = torch.full((len(samples), n_tokens), pad_id)
    real = torch.zeros(len(samples), n_tokens, dtype=torch.long)
    for row, sample in enumerate(samples):
        place = slice(n_tokens - len(sample), None) if left else slice(len(sample))
        ids[row, place], real[row, place] = sample, 1
    told = {
        "attention_mask": real,
        "key_padding_mask": real == 0,
        "src_key_padding_mask": real == 0,
        "lengths": real.sum(dim=1),
    }
    return {"input_ids": ids, key: told[key]}


def labelled(**options: Any) -> tuple[Any, Any]:
    """Known and unknown data, padded in one way."""
    return (padded(KNOWN, **options), LABELS), (padded(UNKNOWN, **options), LABELS)


def in_batches(samples: list[Tensor], n_tokens: int | None, size: int = 4) -> list[Any]:
    """Cut samples into batches, each padded to so many tokens, or to its own longest."""
    parts = [(samples[at : at + size], LABELS[at : at + size]) for at in range(0, len(samples), size)]
    return [(padded(part, n_tokens or max(map(len, part))), labels) for part, labels in parts]


def real_mean(tokens: Tensor, real: Tensor) -> Tensor:
    return (tokens * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)


class Text(nn.Module):
    """Ids and a mask: words, attention, a layer a token, a layer on the mean of the real tokens, and a head.

    It knows no positions, so that padding may come first.
    """

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.attention = (
            nn.Embedding(VOCABULARY, hidden),
            nn.MultiheadAttention(hidden, 2, batch_first=True),
        )
        self.mix, self.pooled, self.head = nn.Linear(hidden, hidden), nn.Linear(hidden, 5), nn.Linear(5, 2)

    def forward(self, input_ids: Tensor, **told: Tensor) -> Tensor:
        h = self.words(input_ids)
        real = self.real(h, **told)
        h = h + self.attention(h, h, h, key_padding_mask=~real, need_weights=False)[0]
        return self.head(torch.tanh(self.pooled(real_mean(self.mixed(h, real), real))))

    def mixed(self, h: Tensor, real: Tensor) -> Tensor:
        """Return what is pooled."""
        return torch.tanh(self.mix(h))

    def real(self, h: Tensor, **told: Tensor) -> Tensor:
        """Return which tokens are real, whatever tells it."""
        ((key, given),) = told.items()
        if key == "lengths":
            return torch.arange(h.shape[1]) < given[:, None]
        return given == 0 if key.endswith("key_padding_mask") else given != 0


class Encoded(nn.Module):
    """Like `Text`, of torch's own encoder with positions: two blocks, and a head on the first token."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.position = nn.Embedding(VOCABULARY, hidden), nn.Parameter(torch.randn(32, hidden))
        layer = nn.TransformerEncoderLayer(hidden, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(hidden, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.words(input_ids) + self.position[: input_ids.shape[1]]
        return self.head(self.encoder(h, src_key_padding_mask=attention_mask == 0)[:, 0])


def bert(hidden: int = 4) -> nn.Module:
    """Return a tiny BERT with a head for two classes."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=32,
            pad_token_id=None,
        )
    )


BERT = {"input_layer": "bert.embeddings", "layers": ["bert.encoder.layer.*"]}
MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "own": (Text, {"input_layer": "words", "layers": ["attention", "mix"]}),
    "torch": (Encoded, {"input_layer": "words", "layers": ["encoder.layers.*"]}),
    "bert": (bert, BERT),
}


def scores_of(model: nn.Module, data: tuple[Any, Any], name: str, **options: Any) -> rs.LayerScores:
    """Run one estimator, which must leave the model as it was."""
    known, unknown = data
    with unchanged(model):
        return ESTIMATORS[name](model, **options).fit(known).score_layers(unknown)


def assert_same_scores(first: rs.LayerScores, second: rs.LayerScores) -> None:
    assert first.layers == second.layers
    for number in NUMBERS:
        got, expected = getattr(first, number), getattr(second, number)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=number)
        assert np.isfinite(got).all()


@cache
def plain_scores(kind: str, name: str, hidden: int = 4, **options: Any) -> rs.LayerScores:
    """Return the scores of one of the models for data padded to eight tokens on the right."""
    make, by_default = MODELS[kind]
    return scores_of(make(hidden), labelled(), name, **(options or by_default))


each_estimator = pytest.mark.parametrize("name", ESTIMATORS)
each_model = pytest.mark.parametrize("kind", MODELS)


@each_estimator
@each_model
def test_pad_id_changes_nothing(kind, name):
    """What holds the place of padding changes no score."""
    make, options = MODELS[kind]
    scores = scores_of(make(), labelled(pad_id=1), name, **options)
    assert_same_scores(scores, plain_scores(kind, name))


@each_estimator
@each_model
@pytest.mark.parametrize("hidden", [4, 8], ids=["", "as many features as tokens"])
def test_more_padding_changes_nothing(kind, name, hidden):
    """Padding may be added: the scores stay, also where a sample has as many features as tokens."""
    make, options = MODELS[kind]
    scores = scores_of(make(hidden), labelled(n_tokens=13), name, **options)
    assert_same_scores(scores, plain_scores(kind, name, hidden))


@each_estimator
@each_model
def test_each_batch_may_be_padded_to_its_own_longest(kind, name):
    """Batches padded each to its own longest sample give the scores of batches padded alike."""
    make, options = MODELS[kind]
    alone = in_batches(KNOWN, None), in_batches(UNKNOWN, None)
    assert len({batch[0]["input_ids"].shape for batch in (*alone[0], *alone[1])}) > 1
    alike = in_batches(KNOWN, 8), in_batches(UNKNOWN, 8)
    scores = scores_of(make(), alone, name, **options)
    assert_same_scores(scores, scores_of(make(), alike, name, **options))


@pytest.mark.parametrize("name", ["spread", "probe"])
def test_padding_may_come_first(name):
    """Padding on the left, more of it, and padding on the right give the same scores where positions do not count."""
    options = MODELS["own"][1]
    scores = scores_of(Text(), labelled(left=True), name, **options)
    assert_same_scores(scores_of(Text(), labelled(left=True, n_tokens=11), name, **options), scores)
    assert_same_scores(plain_scores("own", name), scores)


@pytest.mark.parametrize("n_tokens", [8, 11])
def test_inverter_with_padding_first(n_tokens):
    """The pad id does not matter on the left either; the starts do, as they are drawn place by place."""
    options = MODELS["own"][1]
    scores = scores_of(Text(), labelled(left=True, n_tokens=n_tokens), "inverter", **options)
    other = scores_of(Text(), labelled(left=True, n_tokens=n_tokens, pad_id=1), "inverter", **options)
    assert_same_scores(other, scores)


class NothingInPlace(Text):
    """Has NaN in the place of padding, as a softmax over nothing gives."""

    def mixed(self, h: Tensor, real: Tensor) -> Tensor:
        """Return what is pooled."""
        return torch.tanh(self.mix(h.masked_fill(~real[..., None], torch.nan))).nan_to_num()


@each_estimator
def test_padding_may_be_nan(name):
    """What a layer makes of padding may be anything, NaN too."""
    options = MODELS["own"][1]
    assert_same_scores(scores_of(NothingInPlace(), labelled(), name, **options), plain_scores("own", name))


@each_estimator
@pytest.mark.parametrize("key", ["key_padding_mask", "src_key_padding_mask", "lengths"])
def test_whatever_tells_the_padding(key, name):
    """A mask of padding, as torch has it, and lengths tell the same as an attention mask."""
    options = MODELS["own"][1]
    assert_same_scores(scores_of(Text(), labelled(key=key), name, **options), plain_scores("own", name))


# Layers that pool their tokens, or have others


@pytest.mark.parametrize("name", ["spread", "inverter"])
def test_layer_that_pools_tokens(name):
    """A layer on the mean of the real tokens is measured as a vector, and padding changes nothing."""
    scores = scores_of(Text(), labelled(n_tokens=13, pad_id=1), name, input_layer="words")
    assert scores.layers == ("attention", "mix", "pooled")
    assert_same_scores(scores, plain_scores("own", name, input_layer="words"))


def test_probe_of_a_layer_that_pools_needs_one_length():
    """A decoder from a vector to the tokens is for one length: another one is refused, with what to do."""
    model = Text()
    scores = scores_of(model, labelled(pad_id=1), "probe", input_layer="words")
    assert_same_scores(scores, plain_scores("own", "probe", input_layer="words"))
    probe = ESTIMATORS["probe"](model, input_layer="words").fit(labelled()[0])
    message = (
        r"to 8 tokens in one batch and to 11 in another.* 'pooled' .*needs one length. Pad all samples to the same"
    )
    with unchanged(model), pytest.raises(InvalidDataError, match=message):
        probe.score_layers((padded(UNKNOWN, 11), LABELS))


@pytest.mark.parametrize("hidden", [4, 8], ids=["", "as many features as tokens"])
@pytest.mark.parametrize("n_tokens", [8, 9])
def test_axes_of_tokens(hidden, n_tokens):
    """The axis of tokens is told from that of features, and what is pooled has none."""
    found = rs.find_layers(Text(hidden), padded(KNOWN, n_tokens), input_layer="words")
    assert found.token_axes == {"words": 1, "attention": 1, "mix": 1}
    assert found.shapes == {"attention": (n_tokens, hidden), "mix": (n_tokens, hidden), "pooled": (5,)}


class Convolved(Text):
    """Convolves the tokens, which come last then, without letting padding in."""

    def __init__(self, stride: int, hidden: int = 4) -> None:
        super().__init__(hidden)
        self.mix = nn.Conv1d(hidden, hidden, kernel_size=stride, stride=stride)

    def mixed(self, h: Tensor, real: Tensor) -> Tensor:
        """Return the convolved tokens, as many as there were."""
        found = torch.tanh(self.mix((h * real[..., None]).transpose(1, 2)))
        return nn.functional.interpolate(found, size=h.shape[1]).transpose(1, 2)


@each_estimator
@pytest.mark.parametrize("hidden", [4, 8], ids=["", "as many features as tokens"])
def test_tokens_may_come_last(name, hidden):
    """A convolution has its tokens last, and padding changes nothing."""
    options = {"input_layer": "words", "layers": ["attention", "mix"]}
    known = labelled()[0]
    assert rs.find_layers(Convolved(1, hidden), known, **options).token_axes == {"words": 1, "attention": 1, "mix": 2}
    scores = scores_of(Convolved(1, hidden), labelled(pad_id=1, n_tokens=12), name, **options)
    assert_same_scores(scores, scores_of(Convolved(1, hidden), labelled(), name, **options))


@pytest.mark.parametrize("name", ["spread", "inverter"])
def test_every_few_tokens_may_be_gathered_into_one(name):
    """A convolution with a stride has fewer tokens, each real where its middle is, and padding changes nothing."""
    options = {"input_layer": "words", "layers": ["attention", "mix"]}
    found = rs.find_layers(Convolved(2), labelled()[0], **options)
    assert (found.shapes["mix"], found.token_axes["mix"]) == ((4, 4), 2)
    scores = scores_of(Convolved(2), labelled(pad_id=1, n_tokens=16), name, **options)
    assert_same_scores(scores, scores_of(Convolved(2), labelled(), name, **options))


class WithClassToken(Text):
    """Puts a class token before the others: its last layer has one token more than the data."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def mixed(self, h: Tensor, real: Tensor) -> Tensor:
        """Return the class token, for each token."""
        found = self.mix(torch.cat([self.token.expand(len(h), -1, -1), h], dim=1))
        return torch.tanh(found[:, :1]).expand_as(h)


@each_estimator
def test_layer_with_a_token_more_than_the_data(name):
    """Where a class token is put before the others, padding is not told from tokens: refused by name, no default."""
    model, data = WithClassToken(), labelled()
    message = r"In the output of the layer 'mix', of shape .* padding cannot be told from tokens.* with layers="
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        scores_of(model, data, name, input_layer="words", layers=["mix"])
    assert scores_of(model, data, name, input_layer="words").layers == ("attention", "pooled")
    owned = rs.find_layers(model, data[0], input_layer="words").parameters
    assert {"token", "mix.weight", "mix.bias"} < {*owned["pooled"]}


# Inputs of real numbers, and packed sequences


class Sequences(nn.Module):
    """Takes sequences of vectors, in any way that tells their padding: torch's encoder, then a mean, then a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        found = self.encoder(x, src_key_padding_mask=src_key_padding_mask)
        return self.head(found[:, 0])


class Packed(nn.Module):
    """Packs its sequences, so that a recurrent network does not see the padding."""

    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(4, 6, batch_first=True, bidirectional=bidirectional)
        width = 12 if bidirectional else 6
        self.mix, self.head = nn.Linear(width, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        found = self.rnn(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))[0]
        tokens = pad_packed_sequence(found, batch_first=True)[0]
        return self.head(torch.tanh(self.mix(tokens)).mean(dim=1))


def vectors(samples: list[Tensor], n_tokens: int, key: str, filler: float) -> dict[str, Tensor]:
    """Turn samples into sequences of vectors, with something in the place of padding."""
    told = padded(samples, n_tokens, key=key)
    table = torch.randn(VOCABULARY, 4, generator=torch.Generator().manual_seed(5))
    x = table[told["input_ids"]]
    x[padded(samples, n_tokens)["attention_mask"] == 0] = filler
    return {"x": x, key: told[key]}


def vector_data(n_tokens: int, key: str, filler: float = 0.0) -> tuple[Any, Any]:
    return (vectors(KNOWN, n_tokens, key, filler), LABELS), (vectors(UNKNOWN, n_tokens, key, filler), LABELS)


@each_estimator
@pytest.mark.parametrize("layers", [["encoder"], ["encoder.layers.*"]], ids=["whole", "blocks"])
def test_mask_of_torch_with_sequences_of_vectors(name, layers):
    """The encoder of torch, whole or its blocks, gives the same scores whatever and however much is padded."""
    scores = scores_of(Sequences(), vector_data(8, "src_key_padding_mask"), name, layers=layers)
    other = scores_of(Sequences(), vector_data(12, "src_key_padding_mask", 7.0), name, layers=layers)
    assert_same_scores(scores, other)


@each_estimator
@pytest.mark.parametrize(("kind", "bidirectional"), [(nn.LSTM, True), (nn.GRU, False), (nn.RNN, True)])
def test_packed_sequences(kind, bidirectional, name):
    """A recurrent network that packs its sequences gives the same scores whatever and however much is padded."""
    model = Packed(kind, bidirectional)
    found = rs.find_layers(model, vector_data(8, "lengths")[0], layers=["rnn"])
    assert found.shapes == {"rnn": (8, 12 if bidirectional else 6)}
    assert found.token_axes == {"rnn": 1}
    scores = scores_of(model, vector_data(8, "lengths"), name, layers=["rnn"])
    other = scores_of(model, vector_data(11, "lengths", 7.0), name, layers=["rnn"])
    assert_same_scores(scores, other)


@each_estimator
def test_packed_sequences_without_lengths_are_refused(name):
    """Where the data does not tell the lengths, a layer that returns a packed sequence is refused by name."""
    model, X = Packed(nn.LSTM, False), vectors(KNOWN, 8, "lengths", 0.0)["x"]
    message = r"The layer 'rnn' returns a packed sequence.* Give the data as a mapping with 'lengths'"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        ESTIMATORS[name](model, layers=["rnn"]).fit((X, LABELS))


# Masks that do not fit


@each_estimator
@pytest.mark.parametrize("key", ["attention_mask", "key_padding_mask", "lengths"])
def test_sample_without_a_token_is_refused(name, key):
    """A sample that is all padding has nothing to measure: it is named."""
    model, data = Text(), padded([*KNOWN[:-1], torch.empty(0, dtype=torch.long)], key=key)
    message = f"By the '{key}' of the known data, sample 15 of a batch has no token that is not padding. Leave such"
    with unchanged(model), pytest.raises(InvalidDataError, match=message):
        ESTIMATORS[name](model, input_layer="words").fit((data, LABELS))


@each_estimator
def test_mask_of_four_dimensions_is_refused(name):
    """A mask for each head and pair of tokens does not tell which tokens are real."""
    data = padded(KNOWN)
    data["attention_mask"] = data["attention_mask"][:, None, None].expand(-1, 1, 8, -1)
    message = r"The 'attention_mask' of the known data .*shape \(n_samples, n_tokens\). Got \(4, 1, 8, 8\)"
    model = Text()
    with unchanged(model), pytest.raises(InvalidDataError, match=message):
        ESTIMATORS[name](model, input_layer="words").fit((data, LABELS))


def test_spread_by_hand():
    """What is measured of a sample is the mean of its real tokens."""
    model, data = Text(), padded(KNOWN)
    spread = ESTIMATORS["spread"](model, input_layer="words", layers=["mix"]).fit((data, LABELS))
    with rs.trace_layers(model.eval(), ["words", "mix"]) as outputs, torch.no_grad():
        model(**data)
    for name, key in (("", "words"), ("mix", "mix")):
        rows = [outputs[key][row, : len(sample)].mean(dim=0) for row, sample in enumerate(KNOWN)]
        sums = torch.stack(rows).double().sum(dim=0)
        np.testing.assert_allclose(spread.moments_[name].sums.sum(axis=(0, 1)), sums, rtol=1e-5, atol=1e-5)


class Marked(nn.Module):
    """Words with a picture: a mark, the largest id, stands where the picture goes, once in each text."""

    def __init__(self):
        super().__init__()
        self.words, self.sight, self.mix = nn.Embedding(20, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask, picture):
        places = input_ids == 19
        if int(places.sum()) != len(input_ids):
            raise ValueError("marks and pictures do not match")
        seen = self.sight(picture)
        words = torch.where(places[..., None], seen.mean(dim=1, keepdim=True), self.words(input_ids))
        return self.head((self.mix(words) * attention_mask[..., None]).mean(dim=1))


def test_values_that_mean_more_than_a_word():
    """A model that fails where padding holds another value is measured; its maps without tokens are no layers."""
    model = Marked()
    ids = torch.randint(1, 19, (12, 8))
    ids[:, 0] = 19
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "picture": torch.randn(12, 5, 3)}
    with unchanged(model):
        assert rs.find_layers(model, data, input_layer="words").names == ("mix",)
    with pytest.raises(UnsupportedModelError, match="'sight', of shape \\(4, 5, 4\\), padding cannot be told"):
        rs.find_layers(model, data, input_layer="words", layers=["sight"])


def test_batches_of_different_lengths_are_joined():
    """Samples of a shorter batch have NaN in the place of the tokens that they lack."""
    joined = joined_tokens([torch.ones(2, 3, 4), torch.ones(1, 5, 4)])
    assert joined.shape == (3, 5, 4)
    assert joined[:2, 3:].isnan().all()
    assert int(joined.isnan().sum()) == 2 * 2 * 4
    assert torch.equal(joined_tokens([torch.ones(2), torch.zeros(1)]), torch.tensor([1.0, 1.0, 0.0]))


class OfOneLength(nn.Module):
    """Takes eight tokens and no fewer, and pools them to eight features."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.pool = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(64, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        return self.head(self.pool((self.mix(self.words(input_ids)) * attention_mask[..., None]).flatten(1)))


def test_as_many_features_as_tokens_in_a_model_of_one_length():
    """Where the model cannot be run on fewer tokens, what could be tokens or features is refused by name."""
    ids = torch.randint(1, 20, (12, 8))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(UnsupportedModelError, match=r"'words', of shape \(4, 8, 8\), padding cannot be told"):
        rs.find_layers(OfOneLength(), data, input_layer="words")
    with pytest.raises(UnsupportedModelError, match=r"'pool', of shape \(4, 8\), padding cannot be told"):
        rs.find_layers(OfOneLength(), data, layers=["pool"])


def test_a_mask_that_is_added_to_scores_is_refused():
    """An additive mask has 0 for what is real and something negative for padding: read as the other it would lie."""
    mask = torch.tensor([[0.0, 0.0, -1e4], [0.0, -1e4, -1e4]])
    with pytest.raises(InvalidDataError, match=r"'attention_mask' of the given data has negative values.* Give 1 for"):
        token_mask({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask})
    real = token_mask({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": (mask == 0).float()})
    assert torch.equal(real, mask == 0)
