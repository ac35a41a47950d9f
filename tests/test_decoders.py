"""Decoders: built from two shapes, and the standardisation before them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retrainscope.decoders import Standardise, build_decoder

side = st.integers(1, 9)


def decoded_shape(activation_shape, input_shape):
    """Build a decoder and return the shape of what it makes of two samples."""
    with torch.no_grad():
        return tuple(build_decoder(activation_shape, input_shape)(torch.zeros(2, *activation_shape)).shape[1:])


@pytest.mark.parametrize(
    ("activation_shape", "input_shape"),
    [
        ((5,), (7,)),  # vector to vector
        ((3, 4, 4), (7,)),  # map to vector
        ((6, 5), (6, 3)),  # a sequence, token by token
        ((6, 5), (4, 3)),  # a map along one axis
        ((5,), (3, 28)),
        ((16, 7), (1, 28)),
        ((16, 7, 7), (1, 28, 28)),
        ((16, 28, 28), (3, 28, 28)),  # as wide as the goal
        ((4, 40, 40), (1, 28, 28)),  # wider than the goal
        ((4, 3, 9), (1, 7, 8)),
        ((8, 1, 1), (3, 33, 31)),
        ((10,), (1, 28, 28)),
        ((6, 5), (1, 9, 9)),  # a sequence of vectors to a map
        ((4, 2, 2, 2), (1, 5, 6, 7)),
        ((9,), (2, 3, 4, 5)),
        ((2, 2), (2, 2, 2, 2, 2)),  # of no known kind: as vectors
    ],
)
def test_decoder_reaches_the_input(activation_shape, input_shape):
    """Whatever the two shapes, the decoder leads from the one to the other."""
    assert decoded_shape(activation_shape, input_shape) == input_shape


@given(n_axes=st.integers(1, 3), data=st.data())
@settings(deadline=None, max_examples=60)
def test_maps_of_any_size(n_axes, data):
    """Maps of any sides, odd or even, smaller or bigger than the input, are decoded to it."""
    start = tuple(data.draw(st.lists(side, min_size=n_axes + 1, max_size=n_axes + 1)))
    goal = tuple(data.draw(st.lists(side, min_size=n_axes + 1, max_size=n_axes + 1)))
    assert decoded_shape(start, goal) == goal


@given(start=st.lists(side, min_size=1, max_size=4), goal=st.lists(side, min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_two_shapes(start, goal):
    """No pair of shapes is without a decoder."""
    assert decoded_shape(tuple(start), tuple(goal)) == tuple(goal)


def test_sequences_are_decoded_token_by_token():
    """What is rebuilt of a token depends on that token alone."""
    torch.manual_seed(0)
    decoder = build_decoder((4, 5), (4, 3))
    tokens = torch.randn(2, 4, 5)
    changed = tokens.clone()
    changed[:, 1] += 1.0
    same = (decoder(tokens) == decoder(changed)).all(dim=-1)
    assert same.tolist() == [[True, False, True, True]] * 2


def test_the_last_step_can_give_any_number():
    """No activation function bounds what is rebuilt."""
    for activation_shape, input_shape in [((3,), (4,)), ((2, 4, 4), (1, 8, 8)), ((2, 8, 8), (1, 8, 8)), ((3,), (1, 8))]:
        with torch.no_grad():
            decoders = [build_decoder(activation_shape, input_shape) for _ in range(20)]
            values = torch.stack([decoder(torch.randn(5, *activation_shape)) for decoder in decoders])
        assert values.min() < 0 < values.max()


def test_decoders_of_all_depths_do_about_the_same_work():
    """The operations of the decoders of one network's layers differ by less than a third."""
    operations = []
    for shape in [(16, 28, 28), (32, 14, 14), (64, 7, 7), (128, 3, 3), (128,)]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            build_decoder(shape, (1, 28, 28))(torch.zeros(1, *shape))
        operations.append(counter.get_total_flops())
    assert max(operations) < 4 / 3 * min(operations)


def standardised(values, shape, **options):
    """Standardise by what the values themselves tell, in two batches."""
    scale = Standardise(shape, **options)
    scale.update(values[:3])
    scale.update(values[3:])
    scale.finish()
    return scale


@pytest.mark.parametrize(
    ("shape", "over"),
    [((5,), (0,)), ((3, 4, 2), (0, 2, 3)), ((6, 5), (0, 1)), ((2, 3, 2, 2), (0, 2, 3, 4)), ((), (0,))],
)
def test_standardise_by_channel(shape, over):
    """Mean and variance are those of each channel: the first axis, and the last one of a sequence."""
    torch.manual_seed(0)
    values = torch.randn(11, *shape) * torch.rand(shape) + torch.randn(shape)
    scale = standardised(values, shape)
    wide = values.double().numpy()
    variance = wide.var(axis=over, keepdims=True)
    expected = (wide - wide.mean(axis=over, keepdims=True)) / np.sqrt(variance + 1e-4 * variance.mean())
    np.testing.assert_allclose(scale(values).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_standardise_all_alike():
    """Told so, it measures one mean and one variance over everything."""
    torch.manual_seed(0)
    values = torch.randn(11, 3, 4, 4) * torch.tensor([1.0, 5.0, 9.0])[:, None, None]
    scale = standardised(values, (3, 4, 4), by_channel=False)
    assert scale.mean.numel() == scale.std.numel() == 1
    np.testing.assert_allclose(scale.mean.item(), values.numpy().mean(dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(scale.std.item(), values.numpy().std(dtype=np.float64) * 1.0001**0.5, rtol=1e-5)


@given(st.integers(0, 2**31), st.floats(0.01, 100.0), st.floats(-100.0, 100.0))
@settings(deadline=None, max_examples=30)
def test_undo_is_the_inverse(seed, spread, centre):
    """Undoing the standardisation gives the values back."""
    values = spread * torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) + centre
    scale = standardised(values, (3, 2, 2))
    np.testing.assert_allclose(scale.undo(scale(values)), values, rtol=1e-4, atol=1e-4 * (spread + abs(centre)))


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**-3, 2.0**40])
def test_standardise_does_not_see_the_scale(factor):
    """A layer whose output is rescaled looks the same to its decoder."""
    torch.manual_seed(0)
    values = torch.randn(11, 3, 2, 2)
    a, b = standardised(values, (3, 2, 2)), standardised(values * factor, (3, 2, 2))
    np.testing.assert_allclose(b(values * factor), a(values), rtol=1e-6)


def test_a_constant_channel_is_not_blown_up():
    """A channel that hardly varies stays small, and one that does not vary at all gives zeros."""
    torch.manual_seed(0)
    values = torch.randn(11, 3)
    values[:, 0] *= 1e-6
    values[:, 1] = 4.0
    out = standardised(values, (3,))(values)
    assert out[:, 0].abs().max() < 1e-3
    assert (out[:, 1] == 0).all()
    assert torch.isfinite(standardised(torch.ones(11, 2), (2,))(torch.ones(1, 2))).all()


def test_standardise_travels_with_the_module():
    """Mean and scale are buffers: they are saved and moved with the decoder, and not trained."""
    chain = nn.Sequential(standardised(torch.randn(6, 2), (2,)), nn.Linear(2, 2))
    assert {"0.mean", "0.std"} <= set(chain.state_dict())
    assert [name for name, _ in chain.named_parameters()] == ["1.weight", "1.bias"]
