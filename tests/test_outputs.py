"""What counts as a module's output, in whatever form it comes."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from helpers import Apply
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from retrainscope.outputs import output_of, with_output
from retrainscope.tracing import replace_output, run_layers, trace_layers

INPUTS = torch.tensor([[0.0, 3.0], [5.0, 1.0]])
Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    "output",
    [
        lambda x: (x + 1, x),
        lambda x: [None, "text", torch.arange(3), x + 1],
        lambda x: ((torch.arange(3), x + 1), x),
        lambda x: Pair(x + 1, x),
        lambda x: {"states": x, "last_hidden_state": x + 1},
        lambda x: {"last_hidden_state": x, "logits": x + 1},
        lambda x: OrderedDict(positions=torch.arange(3), scores=x + 1, other=x),
    ],
)
def test_the_main_tensor_of_a_compound_output(output):
    """Of a tuple, list or mapping the first floating tensor counts, of Hugging Face's names the logits."""
    model = nn.Sequential(nn.Identity(), Apply(output))
    with trace_layers(model, ["1"]) as outputs:
        model(INPUTS)
    assert torch.equal(outputs["1"], INPUTS + 1)
    visited = {}
    run_layers(model, INPUTS, ["1"], lambda name, found: visited.update({name: found.clone()}))
    assert torch.equal(visited["1"], INPUTS + 1)


@pytest.mark.parametrize(
    ("output", "rest"),
    [
        (lambda x: (x, 1), lambda found: found[1] == 1),
        (lambda x: [None, x], lambda found: found[0] is None),
        (lambda x: Pair(x, 2), lambda found: found.second == 2),
        (lambda x: {"other": x, "logits": x}, lambda found: "other" in found),
        (lambda x: ((x, 3), 4), lambda found: found[0][1] == 3 and found[1] == 4),
    ],
)
def test_the_main_tensor_is_replaced_in_its_place(output, rest):
    """What stands in for a layer's output takes the place of its main tensor; the rest stays as it was."""
    model = nn.Sequential(Apply(output))
    with replace_output(model, "0", torch.full((2, 2), 7.0)):
        found = model(INPUTS)
    assert type(found) is type(output(INPUTS))
    assert rest(found)
    assert torch.equal(output_of(model[0], found), torch.full((2, 2), 7.0))


def test_samples_second_are_brought_to_the_front():
    """A recurrent or attention module that has the samples second is traced with the samples first, and back."""
    x = torch.randn(7, 3, 4)  # 7 steps, 3 samples
    model = nn.Sequential(OrderedDict(gru=nn.GRU(4, 5), last=Apply(lambda out: out[0][-1])))
    with trace_layers(model, ["gru"]) as outputs:
        final = model(x)
    assert outputs["gru"].shape == (3, 7, 5)
    assert torch.equal(outputs["gru"][:, -1], final)
    with replace_output(model, "gru", outputs["gru"] + 1):
        assert torch.equal(model(x), final + 1)


@pytest.mark.parametrize("sort", [False, True])
def test_a_packed_sequence_is_replaced_as_it_was_packed(sort):
    """What stands in for a packed sequence is packed in the same way, whatever the order of the samples."""
    lengths = [4, 3, 1] if sort else [1, 4, 3]
    x = torch.randn(3, 4, 2)
    returned = nn.LSTM(2, 5, batch_first=True)(
        pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=sort)
    )
    output = output_of(nn.Identity(), returned, 4)
    replaced = with_output(nn.Identity(), returned, output + 1)
    real = torch.arange(4) < torch.tensor(lengths)[:, None]
    assert torch.equal(output_of(nn.Identity(), replaced, 4)[real], output[real] + 1)
    assert torch.equal(replaced[0].batch_sizes, returned[0].batch_sizes)
    assert replaced[1] is returned[1]
