"""Inversion by depth: how trained and random weights are compared, shown and drawn."""

import io
import math
import statistics
import sys

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from retrainscope.cli import main
from retrainscope.exceptions import MissingExtraError
from retrainscope.studies.depth import (
    MEASURES,
    Measures,
    contrast,
    contrast_table,
    image_quality,
    measures_table,
    plot_contrasts,
    plot_pictures,
)
from retrainscope.studies.vgg19.loading import load_images, named_convolutions, random_network, trained_network


def measures(input_error, **others):
    """Return measures with that input error of shape (n_layers, n_images), and others like it where not given."""
    input_error = np.array(input_error, dtype=float)
    given = {"feature_error": input_error, "psnr": -10 * np.log10(input_error), "ssim": 1 - input_error, **others}
    pictures = np.zeros((*input_error.shape, 4, 5, 3), np.uint8)
    arrays = {name: np.array(value, dtype=float) for name, value in given.items()}
    return Measures(input_error=input_error, **arrays, n_diverged=0, pictures=pictures)


def drawn(seed, n_layers=2, n_images=5):
    return measures(np.random.default_rng(seed).uniform(0.1, 1, (n_layers, n_images)))


def test_contrast_of_errors_by_hand():
    """Errors, with 1e-4 added, are compared by the log of their ratio; images and inits both widen the interval."""
    a, b = 0.01 + 1e-4, 0.02 + 1e-4
    trained = measures([[0.01, 0.02]])
    # log ratios: of the first initialisation 1 and 3, of the second 2 and 4
    random = [
        measures([[a * math.e - 1e-4, b * math.e**3 - 1e-4]]),
        measures([[a * math.e**2 - 1e-4, b * math.e**4 - 1e-4]]),
    ]
    mean, interval = contrast(trained, random, "input_error")
    assert mean == pytest.approx([2.5])
    # image means 1.5, 3.5: variance 2, over two images; means of initialisations 2, 3: variance 0.5, over two
    reach = 6.313752 * math.sqrt(2 / 2 + 0.5 / 2)
    np.testing.assert_allclose(interval, [[2.5 - reach, 2.5 + reach]], rtol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("n_inits", "n_images"), [(2, 5), (3, 2), (4, 4)])
def test_contrast_agrees_with_a_sum_by_loops(measure, n_inits, n_images):
    """Mean and interval are those of a computation without arrays, whichever number is smaller."""
    trained, random = drawn(0, n_images=n_images), [drawn(seed, n_images=n_images) for seed in range(1, n_inits + 1)]
    mean, interval = contrast(trained, random, measure)

    def take(value):
        return math.log(value + 1e-4) if measure in ("input_error", "feature_error") else float(value)

    for layer in range(2):
        table = [
            [take(getattr(one, measure)[layer, i]) - take(getattr(trained, measure)[layer, i]) for i in range(n_images)]
            for one in random
        ]
        centre = statistics.fmean(value for row in table for value in row)
        images = [statistics.fmean(column) for column in zip(*table, strict=True)]
        inits = [statistics.fmean(row) for row in table]
        variance = statistics.variance(images) / n_images + statistics.variance(inits) / n_inits
        reach = student.ppf(0.95, min(n_inits, n_images) - 1) * math.sqrt(variance)
        assert mean[layer] == pytest.approx(centre)
        assert interval[layer].tolist() == pytest.approx([centre - reach, centre + reach])


@pytest.mark.parametrize(("n_inits", "n_images"), [(1, 5), (3, 1), (1, 1)])
def test_one_of_either_has_no_interval(n_inits, n_images):
    """With one initialisation, or one image, there is a mean and no interval."""
    random = [drawn(seed, n_images=n_images) for seed in range(1, n_inits + 1)]
    mean, interval = contrast(drawn(0, n_images=n_images), random, "ssim")
    assert np.isfinite(mean).all()
    assert interval.shape == (2, 2)
    assert np.isnan(interval).all()


def test_errors_of_zero_are_compared():
    """Two errors of zero differ by nothing, and one of them by a finite lot."""
    nothing = measures([[0.5, 0.5]], feature_error=[[0.0, 0.0]])
    something = measures([[0.5, 0.5]], feature_error=[[1.0, 1.0]])
    assert contrast(nothing, [nothing, nothing], "feature_error")[0].tolist() == [0]
    mean, interval = contrast(nothing, [something, something], "feature_error")
    assert mean == pytest.approx([math.log(1.0001 / 0.0001)])
    assert np.isfinite(interval).all()


def test_table_says_which_weights_are_better():
    """A layer is given to the weights on whose side of 0 the whole interval of the input error lies."""
    trained = measures([[0.1, 0.1], [0.1, 0.1], [0.1, 0.1]])
    random = [measures([[0.4, 0.41], [0.02, 0.021], [0.05, 0.2]])] * 2
    table = contrast_table(trained, random, ["conv1", "conv2", "conv3"], title="Random against trained")
    assert [row[0] for row in table.rows] == ["conv1", "conv2", "conv3"]
    assert [row[-1] for row in table.rows] == ["trained", "random", "not shown"]
    assert table.title == "Random against trained"
    assert all(len(row) == len(table.header) for row in table.rows)
    assert "over 2 initialisations and 2 images" in table.note


def test_better_weights_are_told_by_the_input_error_alone():
    """The other measures do not have a say in which weights are better."""
    trained, random = measures([[0.1, 0.1]], ssim=[[0.1, 0.1]]), measures([[0.4, 0.41]], ssim=[[0.9, 0.9]])
    assert contrast_table(trained, [random, random], ["conv1"], title="").rows[0][-1] == "trained"


def test_contrast_table_cells():
    """A cell has the mean with its sign and the interval in brackets."""
    trained = measures([[1.0, 1.0]], psnr=[[20.0, 20.0]], ssim=[[0.5, 0.5]])
    random = measures([[math.e, math.e]], psnr=[[18.0, 18.0]], ssim=[[0.75, 0.75]])
    (row,) = contrast_table(trained, [random, random], ["conv1"], title="").rows
    assert row == [
        "conv1", "+1.00 [1.00, 1.00]", "+1.00 [1.00, 1.00]", "-2.00 [-2.00, -2.00]", "+0.25 [0.25, 0.25]", "trained"
    ]  # fmt: skip


def test_one_initialisation_shows_nothing():
    """With one initialisation the means stand without interval, and no weights are called better."""
    (row,) = contrast_table(measures([[0.1, 0.1]]), [measures([[0.4, 0.4]])], ["conv1"], title="").rows
    assert row[1] == "+1.39 -"
    assert row[-1] == "not shown"


def test_measures_table_cells():
    """Cells are means over images, with the spread over initialisations where there are several."""
    trained = measures([[0.01, 0.03], [0.1, 0.3]], psnr=[[20, 22], [10, 12]], ssim=[[0.8, 0.9], [0.4, 0.5]])
    random = [
        measures([[0.1, 0.3], [0.2, 0.2]], psnr=[[10, 12], [9, 9]], ssim=[[0.1, 0.3], [0.5, 0.5]]),
        measures([[0.3, 0.5], [0.2, 0.2]], psnr=[[12, 14], [9, 9]], ssim=[[0.3, 0.5], [0.5, 0.5]]),
    ]
    table = measures_table({"trained": [trained], "random": random}, ["conv1", "conv2"], title="Rebuilt")
    assert table.title == "Rebuilt"
    assert table.header == ["layer", "weights", "input error", "feature error", "PSNR", "SSIM"]
    assert table.rows == [
        ["conv1", "trained", "0.02", "0.02", "21.0", "0.85"],
        ["conv1", "random", "0.3 ± 0.14", "0.3 ± 0.14", "12.0 ± 1.4", "0.30 ± 0.14"],
        ["conv2", "trained", "0.2", "0.2", "11.0", "0.45"],
        ["conv2", "random", "0.2 ± 0", "0.2 ± 0", "9.0 ± 0.0", "0.50 ± 0.00"],
    ]


@pytest.mark.parametrize("n_inits", [1, 3])
def test_plot_of_contrasts(n_inits):
    """Both errors are drawn by layer, a curve for each kind of random weights, with or without intervals."""
    layers = ["conv1", "features.7"]
    kinds = {"random": [drawn(seed) for seed in range(1, n_inits + 1)], "matched": [drawn(9) for _ in range(n_inits)]}
    figure = plot_contrasts(kinds, drawn(0), layers)
    figure.savefig(io.BytesIO(), format="svg")
    assert [ax.get_title() for ax in figure.axes] == [
        "input error: above 0 trained is better", "feature error: above 0 trained is better"
    ]  # fmt: skip
    for ax, measure in zip(figure.axes, ("input_error", "feature_error"), strict=True):
        assert [label.get_text() for label in ax.get_xticklabels()] == layers
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert len(ax.containers) == 2
        for curve, networks in zip(ax.containers, kinds.values(), strict=True):
            np.testing.assert_allclose(curve.lines[0].get_ydata(), contrast(drawn(0), networks, measure)[0])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["random", "matched"]


def test_plot_of_pictures():
    """A row for each network has the original and what is rebuilt of that image from every layer, with its SSIM."""
    image = torch.full((3, 4, 5), 0.5)
    first, second = (measures([[0.1, 0.2], [0.3, 0.4]], ssim=[[0.9, s], [0.7, s / 2]]) for s in (0.8, 0.4))
    first.pictures[1, 1] = 200
    figure = plot_pictures(image, {"trained": first, "random": second}, ["conv1", "conv2"], place=1)
    figure.savefig(io.BytesIO(), format="svg")
    assert len(figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes] == ["original", "conv1", "conv2", "", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["trained", "", "", "random", "", ""]
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "SSIM 0.80", "SSIM 0.40", "", "SSIM 0.40", "SSIM 0.20"]
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert all(picture.shape == (4, 5, 3) for picture in shown)
    assert (shown[0] == 0.5).all()
    assert (shown[2] == 200).all()
    assert (shown[5] == 0).all()


@pytest.fixture
def absent(monkeypatch):
    """Return a function that makes packages fail to be imported, whether they are installed or not."""

    def hide(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_quality_needs_scikit_image(absent):
    """Without scikit-image, the message names it and the extra that brings it."""
    absent("skimage", "skimage.metrics")
    with pytest.raises(MissingExtraError, match=r"scikit-image is needed.*pip install 'retrainscope\[vision\]'"):
        image_quality(np.zeros((8, 8, 3)), np.ones((8, 8, 3)))


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda: named_convolutions(["1"]), id="named_convolutions"),
        pytest.param(lambda: random_network(0), id="random_network"),
        pytest.param(lambda: trained_network("imagenet"), id="trained_network"),
    ],
)
def test_network_needs_torchvision(use, absent):
    """Without torchvision, the message names it and the extra that brings it."""
    absent("torchvision", "torchvision.models")
    with pytest.raises(MissingExtraError, match=r"torchvision is needed.*pip install 'retrainscope\[vision\]'"):
        use()


def test_images_need_pillow(absent):
    """Without Pillow, the message names it and the extra that brings it."""
    absent("PIL", "PIL.Image")
    with pytest.raises(MissingExtraError, match=r"Pillow is needed.*pip install 'retrainscope\[vision\]'"):
        load_images((), 32)


def test_command_says_what_is_missing(absent, capsys, tmp_path):
    """Without the extra, the command ends with status 2 and one line, and makes no folder."""
    absent("torchvision", "torchvision.models")
    assert main(["vgg19", "--weights", "random", "--out", str(tmp_path / "study")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "retrainscope: torchvision is needed for this. Install it with: pip install 'retrainscope[vision]'\n"
    assert not (tmp_path / "study").exists()
