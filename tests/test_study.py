"""The MNIST study, run for real: once for all of these tests."""

import json
import shutil

import numpy as np
import pytest

from retrainscope.cli import main
from retrainscope.exceptions import DataUnavailableError, OutputError
from retrainscope.saving import load_json
from retrainscope.studies.mnist import paper
from retrainscope.studies.mnist.experiments import LAYERS, POLICIES, UNKNOWN, SeedResult, mirrored_decoder
from retrainscope.studies.mnist.run import run_study
from retrainscope.studies.mnist.tables import mean_sd, tables


@pytest.fixture(scope="module")
def result(study_folder):
    return load_json(SeedResult, study_folder / "seeds" / "seed-0.json")


def test_network_knows_the_digits(result):
    """The network classifies the known digits."""
    assert result.accuracy >= 0.98


def test_advice_names_fc1_and_keeps_conv1(result):
    """The advice for unknown digits is to retrain the fully connected layer, not the first convolution."""
    assert "fc1" in result.advice.layers
    assert "conv1" not in result.advice.layers
    assert result.advice.head.verdict == "retrain"


def test_known_digits_need_nothing(result):
    """Held-out digits that the network knows give the verdict none."""
    assert result.null.verdict == "none"


def test_advice_is_worth_following(result):
    """Retraining what is advised beats a converged head alone and comes near to retraining everything."""
    assert result.check["advised"] > result.check["head"] + 0.02
    assert result.check["advised"] > result.check["everything"] - 0.02


def test_sweep_covers_every_choice(result):
    """The sweep has an accuracy for every task, policy and number of samples."""
    assert list(result.sweep) == [*(f"0-4 and {digit}" for digit in UNKNOWN), "0-9"]
    for policies in result.sweep.values():
        assert list(policies) == list(POLICIES)
        for accuracies in policies.values():
            assert list(accuracies) == [20, 200]
            assert all(0.5 < accuracy <= 1 for accuracy in accuracies.values())


def test_errors_of_decoders_follow_the_paper(result):
    """The decoders' errors at layer 2 order the digits as the paper's do."""
    assert paper.correlation(paper.DECODING[:, 1], paper.columns(result.decoding)["conv2"]) > 0.8


def test_rule_says_what_the_paper_says():
    """Applied to the paper's printed numbers, the rule gives the paper's verdict on every digit."""
    margins = paper.verdict_margins(paper.DECODING[:, 0], paper.DECODING[:, 1])
    assert {digit: margin > 0 for digit, margin in margins.items()} == paper.PAPER_VERDICT


def test_rule_needs_both_reasons():
    """A digit is to be retrained only if its error is high and has grown more than any known digit's."""
    layer_1 = np.ones(10)
    layer_2 = np.array([2, 2, 2, 2, 2, 3, 2, 1.5, 2.5, 2.0])
    margins = paper.verdict_margins(layer_1, layer_2)
    assert margins[5] == pytest.approx(np.log(1.5))
    assert margins[6] == pytest.approx(0)
    assert margins[7] == pytest.approx(np.log(0.75))
    high_but_not_grown = paper.verdict_margins(np.where(np.arange(10) == 8, 2.5, 1.0), layer_2)
    assert high_but_not_grown[8] == pytest.approx(np.log(0.5))


def test_growth_is_parted_in_the_paper():
    """In the paper's numbers the errors of 5, 6 and 8 grow more than those of 7 and 9."""
    assert paper.growth_parted(paper.DECODING[:, 0], paper.DECODING[:, 1]) > 0


@pytest.mark.parametrize(
    ("held", "word"),
    [
        (0, "not reproduced"),
        (1, "not reproduced"),
        (2, "depends"),
        (3, "depends"),
        (4, "reproduced"),
        (5, "reproduced"),
    ],
)
def test_status_counts_runs(held, word):
    """A claim is reproduced in four runs of five, and not in one of five."""
    claim = paper.Claim("", "", "", value=float, holds=lambda value: value > 0)
    assert paper.status(claim, [1] * held + [0] * (5 - held)) == (word, held)


def test_claims_are_many_and_measured(result):
    """Every claim has a quote, a criterion and a figure."""
    assert len(paper.CLAIMS) >= 12
    for claim in paper.CLAIMS:
        assert claim.quote
        assert claim.criterion
        assert np.isfinite(claim.value(result)), claim.quote


@pytest.mark.parametrize(("layer", "shape"), [("conv1", (10, 12, 12)), ("conv2", (20, 4, 4)), ("fc1", (50,))])
def test_decoders_mirror_the_network(layer, shape):
    """Every layer's decoder leads back to an image."""
    import torch

    assert mirrored_decoder(shape, (1, 28, 28))(torch.zeros(2, *shape)).shape == (2, 1, 28, 28)


def test_outputs_are_whole(study_folder):
    """The folder has the report, the numbers and every figure twice."""
    document = json.loads((study_folder / "study.json").read_text())
    assert document["settings"]["full"] is False
    assert {"retrainscope", "torch", "numpy", "scikit-learn", "python"} <= set(document["versions"])
    assert len(document["claims"]) == len(paper.CLAIMS)
    assert document["seeds"][0]["accuracy"] >= 0.98
    pngs = {path.stem for path in study_folder.glob("*.png")}
    assert pngs == {path.stem for path in study_folder.glob("*.svg")}
    assert {"needs", "maps", "inversion", "decoders", "sweep", "decoder-loss", "inversion-loss"} <= pngs


def test_report_has_every_table(study_folder, result):
    """The page holds each table of the study and no reference to another host."""
    page = (study_folder / "report.html").read_text()
    for table in tables([result]).values():
        assert table.title in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_finished_seeds_are_kept(study_folder, tmp_path, capsys):
    """A second run of the same study computes nothing and writes the same report."""
    folder = tmp_path / "study"
    shutil.copytree(study_folder, folder)
    before = (folder / "study.json").read_text()
    assert main(["mnist", "--seeds", "1", "--out", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "kept from an earlier run" in err
    assert "training" not in err
    assert "Verdict: upper" in out
    assert (folder / "study.json").read_text() == before


def test_quiet_says_only_where_the_report_is(study_run):
    """With --quiet nothing is printed but the report's place."""
    assert study_run.out == f"\nReport: {study_run.folder / 'report.html'}\n"
    assert study_run.err == ""


def test_other_settings_are_refused(study_folder, tmp_path):
    """A folder of a run with other settings is refused, and what differs is named."""
    folder = tmp_path / "study"
    shutil.copytree(study_folder, folder)
    text = (folder / "settings.json").read_text()
    (folder / "settings.json").write_text(text.replace('"full": false', '"full": true'))
    with pytest.raises(OutputError, match=r"other settings .full was True, now False"):
        run_study(seeds=[0], out=folder)


def test_damaged_settings_are_refused(tmp_path):
    """A folder whose settings cannot be read is refused."""
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(OutputError, match=r"not a JSON file.*Name another folder"):
        run_study(seeds=[0], out=tmp_path)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_damaged_seed_is_refused(study_folder, tmp_path, suffix):
    """A damaged file of a finished seed is named, not computed over."""
    folder = tmp_path / "study"
    shutil.copytree(study_folder, folder)
    (folder / "seeds" / f"seed-0.{suffix}").write_text("damaged")
    with pytest.raises(OutputError, match="damaged file"):
        run_study(seeds=[0], out=folder)


def test_unwritable_folder(tmp_path):
    """A folder that cannot be made is refused before any work."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written .Not a directory"):
        run_study(seeds=[0], out=tmp_path / "file" / "study")


def test_missing_images_come_before_any_work(tmp_path):
    """Missing IDX files are refused before training starts."""
    said = []
    with pytest.raises(DataUnavailableError, match="has no file"):
        run_study(seeds=[0], full=True, mnist_folder=tmp_path, say=said.append)
    assert said == []


def test_mean_and_deviation():
    """Several runs show their standard deviation, a single one does not."""
    assert mean_sd([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert mean_sd([2.0], 1) == "2.0"


def test_layers_are_the_papers(result):
    """The layers measured are the two convolutions of the paper, and the layer that it left out."""
    assert result.spread.layers == LAYERS == ("conv1", "conv2", "fc1")


def test_heads_are_fitted_to_convergence():
    """The head that every policy starts from is as good as logistic regression on the frozen features."""
    import torch
    from sklearn.linear_model import LogisticRegression

    from retrainscope.data import load_mnist
    from retrainscope.studies.mnist import experiments

    split = experiments.split_roles(load_mnist())
    X, y = experiments.few_of(split.unknown, UNKNOWN, 20)
    network = experiments.paper_network()
    renewed = experiments._with_new_head(network, X, y - 5)
    with torch.no_grad():
        features, ours = network[:3](X).numpy(), renewed(X).softmax(dim=1).numpy()
    theirs = LogisticRegression(max_iter=5000).fit(features, y - 5).predict_proba(features)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_truncated_pictures_are_refused(study_folder, tmp_path):
    """A file that was cut off is named as damaged."""
    folder = tmp_path / "study"
    shutil.copytree(study_folder, folder)
    path = folder / "seeds" / "seed-0.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(OutputError, match="damaged file"):
        run_study(seeds=[0], out=folder)
