"""The VGG-19 study, run for real on small images with few steps; needs the extra vision."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_states
from torch import nn

from retrainscope.cli import main
from retrainscope.descent import Descent
from retrainscope.exceptions import DataUnavailableError, InvalidDataError, LayerNotFoundError
from retrainscope.studies.depth import Measures, image_quality, measure_network
from retrainscope.studies.vgg19.loading import load_images, named_convolutions, random_network, trained_network
from retrainscope.studies.vgg19.run import Settings, Study, write_study

pytestmark = pytest.mark.vision

QUICK = ("--weights", "random", "--layers", "1,2,features.7", "--size", "32", "--max-iter", "5", "--inits", "2")


@dataclass(frozen=True)
class Run:
    status: int
    out: str
    err: str
    folder: Path | None = None


def command(*arguments, folder=None):
    """Run the command, and return its exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    to = () if folder is None else ("--out", str(folder))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["vgg19", *arguments, *to])
    return Run(status, out.getvalue(), err.getvalue(), folder)


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    """Return the study without trained weights."""
    return command(*QUICK, folder=tmp_path_factory.mktemp("vgg19") / "random")


@dataclass(frozen=True)
class Trained:
    path: Path
    features: nn.Module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a file with a state dict of torchvision's VGG-19, drawn with seed 7, and its convolutions."""
    from torchvision.models import vgg19

    torch.manual_seed(7)
    network = vgg19(weights=None)
    state = network.state_dict()
    for name in state:
        if name.startswith("classifier"):  # not used, and 500 MB: one number takes its place in the file
            state[name] = torch.zeros(1).expand(state[name].shape)
    path = tmp_path_factory.mktemp("weights") / "vgg19.pt"
    torch.save(state, path)
    return Trained(path, network.features)


@pytest.fixture
def light():
    """Build networks without memory: quick, and enough for what is refused or only read."""
    with torch.device("meta"):
        yield


# The command


def test_command_succeeds(random_run):
    """The study ends with status 0, says what it computes, and ends with the report's path."""
    assert random_run.status == 0
    assert random_run.err.splitlines() == [
        "[1 of 2] random-0 weights: 2 images from 3 layers",
        "[2 of 2] random-1 weights: 2 images from 3 layers",
    ]
    assert random_run.out.splitlines()[-1] == f"Report: {(random_run.folder / 'report.html').resolve()}"


def test_table_is_printed(random_run):
    """The table has a row for every layer as it was named, with the spread over initialisations; and no contrast."""
    rows = [line.split() for line in random_run.out.splitlines()]
    (header,) = [place for place, row in enumerate(rows) if row[:2] == ["layer", "weights"]]
    assert [row[:2] for row in rows[header + 2 : header + 5]] == [
        ["conv1", "random"], ["conv2", "random"], ["features.7", "random"]
    ]  # fmt: skip
    assert all(row.count("±") == 4 for row in rows[header + 2 : header + 5])
    assert "against trained" not in random_run.out


def test_outputs_are_whole(random_run):
    """The folder has the report, the numbers, the settings, the networks and every figure twice."""
    folder = random_run.folder
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    figures = {f"image-{n}.{suffix}" for n in (1, 2) for suffix in ("png", "svg")}
    networks = {"networks/random-0.npz", "networks/random-1.npz"}
    assert names == {"report.html", "vgg19.json", "settings.json", *figures, *networks}


def test_numbers_are_whole(random_run):
    """The numbers hold settings, versions, names, and all measures of every network but the pictures."""
    document = json.loads((random_run.folder / "vgg19.json").read_text())
    assert document["settings"]["weights"] == "random"
    assert document["settings"]["layers"] == ["features.0", "features.2", "features.7"]
    assert document["settings"]["descent"]["max_iter"] == "5"
    assert document["layers"] == ["conv1", "conv2", "features.7"]
    assert document["images"] == ["china.jpg", "flower.jpg"]
    assert set(document["versions"]) == {"retrainscope", "torch", "torchvision", "scikit-image", "numpy", "python"}
    assert list(document["networks"]) == ["random"]
    assert len(document["networks"]["random"]) == 2
    for network in document["networks"]["random"]:
        assert set(network) == {"input_error", "feature_error", "psnr", "ssim", "n_diverged"}
        assert network["n_diverged"] == 0
        for name in ("input_error", "feature_error", "psnr", "ssim"):
            assert np.array(network[name]).shape == (3, 2), name
    first, second = document["networks"]["random"]
    assert first["input_error"] != second["input_error"]
    assert np.array(first["feature_error"]).max() < 1


def test_report_stands_alone(random_run):
    """The page shows the table and the pictures, and takes nothing from another host."""
    page = (random_run.folder / "report.html").read_text()
    for words in (
        "How well the images are rebuilt",
        "china.jpg",
        "flower.jpg",
        "No inversions diverged",
        "2 random initialisations",
    ):
        assert words in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "Trained beside random" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_finished_networks_are_kept(random_run, tmp_path, light):
    """A second run computes nothing, says so, and writes and prints the same results."""
    folder = tmp_path / "study"
    shutil.copytree(random_run.folder, folder)
    before = (folder / "vgg19.json").read_text()
    (folder / "vgg19.json").unlink()
    again = command(*QUICK, folder=folder)
    assert again.status == 0
    assert again.err.splitlines() == [
        "[1 of 2] random-0 weights: kept from an earlier run",
        "[2 of 2] random-1 weights: kept from an earlier run",
    ]
    assert again.out.splitlines()[:-1] == random_run.out.splitlines()[:-1]
    assert (folder / "vgg19.json").read_text() == before


def test_fewer_networks_are_taken_from_a_larger_run(random_run, tmp_path, light):
    """The number of initialisations may change: what is there is used."""
    folder = tmp_path / "study"
    shutil.copytree(random_run.folder, folder)
    fewer = command(*QUICK[:-1], "1", "--quiet", folder=folder)
    assert fewer.status == 0
    assert fewer.err == ""
    networks = json.loads((folder / "vgg19.json").read_text())["networks"]["random"]
    assert networks == json.loads((random_run.folder / "vgg19.json").read_text())["networks"]["random"][:1]


def test_quiet_prints_no_table(random_run, tmp_path, light):
    """With --quiet nothing is printed but where the report is."""
    folder = tmp_path / "study"
    shutil.copytree(random_run.folder, folder)
    quiet = command(*QUICK, "--quiet", folder=folder)
    assert quiet == Run(0, f"Report: {(folder / 'report.html').resolve()}\n", "", folder)


def test_quiet_without_folder_prints_nothing():
    """With --quiet and without --out nothing at all is printed."""
    smallest = ("--weights", "random", "--layers", "1", "--size", "32", "--max-iter", "1", "--inits", "1")
    assert command(*smallest, "--quiet") == Run(0, "", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-iter", "6"), "descent was {"),
        (("--layers", "2,1,features.7"), "layers was ('features.0', 'features.2', 'features.7'), now ('features.2'"),
        (("--seed", "1"), "seed was 0, now 1"),
        (("--size", "33"), "images was "),
    ],
)
def test_other_settings_are_refused(arguments, words, random_run, light):
    """A folder of a run with other settings is refused, what differs is named, and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in random_run.folder.rglob("*")}
    refused = command(*QUICK, *arguments, folder=random_run.folder)
    assert refused.status == 2
    assert refused.out == ""
    (line,) = refused.err.splitlines()
    assert f"retrainscope: {random_run.folder} holds a run with other settings (" in line
    assert words in line
    assert "Name another folder." in line
    assert {path: path.stat().st_mtime_ns for path in random_run.folder.rglob("*")} == before


def test_damaged_network_is_refused(random_run, tmp_path, light):
    """A damaged file of a finished network is an error, not computed over."""
    folder = tmp_path / "study"
    shutil.copytree(random_run.folder, folder)
    (folder / "networks" / "random-1.npz").write_text("damaged")
    refused = command(*QUICK, folder=folder)
    assert refused.status == 2
    assert "damaged file" in refused.err
    assert "Delete it to run it again" in refused.err
    assert (folder / "networks" / "random-1.npz").read_text() == "damaged"


def test_weights_of_a_file(trained, tmp_path):
    """With weights of a file there is a row for them and for random ones, and a table of how they differ."""
    folder = tmp_path / "study"
    arguments = ("--weights", str(trained.path), "--layers", "1,3", "--size", "32", "--max-iter", "2", "--inits", "2")
    run = command(*arguments, "--seed", "5", folder=folder)
    assert run.status == 0
    assert [line.split(" weights")[0] for line in run.err.splitlines()] == [
        "[1 of 3] trained", "[2 of 3] random-5", "[3 of 3] random-6"
    ]  # fmt: skip
    document = json.loads((folder / "vgg19.json").read_text())
    assert {kind: len(networks) for kind, networks in document["networks"].items()} == {"trained": 1, "random": 2}
    assert len(document["settings"]["weights"]) == 64
    rows = [line.split()[:2] for line in run.out.splitlines() if line.startswith("conv")]
    assert rows[:4] == [["conv1", "trained"], ["conv1", "random"], ["conv3", "trained"], ["conv3", "random"]]
    assert [row[0] for row in rows[4:]] == ["conv1", "conv3"]
    assert "Random weights against trained ones" in run.out
    page = (folder / "report.html").read_text()
    for words in (
        "trained ones from a file, and 2 random initialisations",
        "Trained beside random",
        "Random weights against trained ones",
    ):
        assert words in page
    assert {"contrasts.png", "contrasts.svg"} <= {path.name for path in folder.iterdir()}


# What the command refuses


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Return a folder of files that are no weights of VGG-19 and no images."""
    from PIL import Image
    from torchvision.models import vgg19

    folder = tmp_path_factory.mktemp("bad")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in vgg19(weights=None).state_dict().items()}
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    first = "features.0.weight"
    (folder / "text.pt").write_text("not a state dict\n")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "dot.pt").write_text("./weights/vgg19.pt\n")
    (folder / "cut.pt").write_bytes(b"PK\x03\x04")
    for name, content in {
        "object": Fraction(1, 2),
        "tensor": torch.ones(3),
        "list": [torch.ones(3)],
        "wrapped": {"state_dict": state, "epoch": 3},
        "missing": {name: tensor for name, tensor in state.items() if name != first},
        "unexpected": {**state, "head.weight": torch.ones(2)},
        "shape": {**state, first: torch.zeros(1).expand(64, 1, 3, 3)},
        "other": {"conv.weight": torch.ones(2), "features.0.bias": torch.ones(3)},
    }.items():
        torch.save(content, folder / f"{name}.pt")
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (64, 40)).save(folder / "small.png")
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("no image")
    return folder


def _refused(arguments):
    """Return the one line with which the command refuses."""
    run = command("--weights", "random", "--size", "32", *arguments)
    assert run.status == 2
    assert run.out == ""
    (line,) = run.err.splitlines()
    assert line.startswith("retrainscope: ")
    return line


NOT_READ = "holds no state dict that torch.load takes with weights_only=True ("
SAVE = "Save model.state_dict()"


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("text", [NOT_READ, SAVE]),
        ("empty", [NOT_READ, SAVE]),
        ("dot", [NOT_READ, SAVE]),
        ("cut", [NOT_READ, SAVE]),
        ("object", [NOT_READ, SAVE]),
        ("tensor", ["holds no state dict, which maps names to tensors, but a Tensor.", SAVE]),
        ("list", ["holds no state dict, which maps names to tensors, but a list.", SAVE]),
        ("wrapped", ["holds no state dict, which maps names to tensors, but the keys state_dict, epoch.", SAVE]),
        ("missing", ["is not of torchvision's VGG-19. Parameters missing: features.0.weight."]),
        ("unexpected", ["is not of torchvision's VGG-19. Parameters unexpected: head.weight."]),
        ("shape", ["Parameters of another shape: features.0.weight is (64, 1, 3, 3), not (64, 3, 3, 3)."]),
        (
            "other",
            [
                "Parameters missing: features.0.weight, features.2.weight, features.2.bias, features.5.weight, "
                "features.5.bias and 32 more; unexpected: conv.weight; of another shape: features.0.bias is (3,), "
                "not (64,)."
            ],
        ),
        ("absent", ["There is no file ", "Give a file, 'imagenet' or 'random' as weights."]),
    ],
)
def test_bad_weights(file, parts, bad, light):
    """A file that holds no weights of VGG-19 is refused with its name and what it holds."""
    line = _refused(["--weights", str(bad / f"{file}.pt")])
    assert str(bad / f"{file}.pt") in line
    for part in parts:
        assert part in line


def test_folder_as_weights(bad, light):
    """A folder is no file of weights."""
    assert f"There is no file {bad}." in _refused(["--weights", str(bad)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "{bad}/text.png"], "{bad}/text.png cannot be read as an image (cannot identify image file"),
        (["--images", "{bad}/small.png", "{bad}/text.png"], "{bad}/text.png cannot be read as an image ("),
        (["--images", "{bad}/absent.png"], "{bad}/absent.png cannot be read as an image ([Errno 2] No such file"),
        (["--images", "{bad}/folder"], "The folder {bad}/folder holds no images. Name files, or another folder."),
        (
            ["--images", "{bad}/small.png", "--size", "48"],
            "{bad}/small.png has 64 x 40 pixels, and 48 x 48 are needed. Give a larger image, or a smaller size "
            "(--size 40).",
        ),
        (["--size", "31"], "VGG-19 takes images of 32 pixels and more. Got 31."),
        (["--layers", "0"], "VGG-19 has the convolutions 1 to 16. Got 0."),
        (["--layers", "1,17"], "VGG-19 has the convolutions 1 to 16. Got 17."),
        (["--layers", "feature.7"], "no convolution number or layer named 'feature.7'. Did you mean 'features.7'"),
        (["--layers", "classifier.0"], "The model has no convolution number or layer named 'classifier.0'."),
        (["--layers", "conv1"], "The model has no convolution number or layer named 'conv1'."),
        (["--layers", "-1"], "The model has no convolution number or layer named '-1'."),
        (["--layers", ""], "No layer was named. Give numbers from 1 to 16, or names."),
        (["--layers", " , "], "No layer was named. Give numbers from 1 to 16, or names."),
    ],
)
def test_bad_input(arguments, message, bad, light):
    """Images and layers that do not do are refused in one line that says which."""
    joined = [argument.format(bad=bad) for argument in arguments]
    if joined[0] == "--layers":
        joined = [f"--layers={joined[1]}"]
    assert message.format(bad=bad) in _refused(joined)


def test_folder_that_cannot_be_written(bad, light):
    """A folder below a file is refused before anything is computed."""
    line = _refused(["--out", str(bad / "text.png" / "study")])
    assert "text.png/study cannot be written (Not a directory). Name another folder." in line


def test_device_that_is_not_there(light):
    """A device that torch does not know is refused in one line."""
    assert "nonsense" in _refused(["--device", "nonsense"]).splitlines()[-1]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Return the empty cache of torch.hub of a machine without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_weights_that_cannot_be_fetched(offline, light):
    """Without a network, the message has the address of the weights and how to give the file."""
    url = r"https://download\.pytorch\.org/models/vgg19-dcbb9e9d\.pth"
    with pytest.raises(DataUnavailableError, match=rf"cannot be fetched, .*Fetch {url} elsewhere.*\(--weights FILE\)"):
        trained_network("imagenet")


def test_damaged_weights_in_the_cache(offline, light):
    """Weights that were fetched earlier and are damaged are refused."""
    (offline / "hub" / "checkpoints").mkdir(parents=True)
    (offline / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth").write_text("damaged")
    with pytest.raises(DataUnavailableError, match="vgg19-dcbb9e9d"):
        trained_network("imagenet")


# The network


def test_numbers_become_names(light):
    """Numbers count the convolutions; names of layers stand for themselves; the order is kept, once each."""
    assert named_convolutions(["16", "1", "features.36", "4", "features.7", "1"]) == {
        "conv16": "features.34",
        "conv1": "features.0",
        "features.36": "features.36",
        "conv4": "features.7",
        "features.7": "features.7",
    }
    assert list(named_convolutions(["16", "1"])) == ["conv16", "conv1"]


def test_every_convolution_has_a_number(light):
    """The sixteen numbers name the sixteen convolutions, in order."""
    network = random_network(0)
    names = list(named_convolutions([str(number) for number in range(1, 17)]).values())
    assert names == [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def test_unknown_layer_in_a_list(light):
    """One unknown layer among others is refused."""
    with pytest.raises(LayerNotFoundError, match=r"convolutions 1 to 16\. Got 17\."):
        named_convolutions(["1", "17"])


def test_random_network_repeats(trained):
    """A seed gives torchvision's weights of that seed, another seed others, and the random states stay."""
    before = random_states()
    network = random_network(7)
    assert random_states() == before
    assert not network.training
    for (name, ours), theirs in zip(network.features.named_parameters(), trained.features.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(random_network(8).features[0].weight, network.features[0].weight)


def test_trained_network_takes_pixels(trained):
    """The weights of a file are loaded, and pixels in [0, 1] are normalised as ImageNet's."""
    network = trained_network(str(trained.path))
    assert not network.training
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = trained.features((x - mean[:, None, None]) / std[:, None, None])
        torch.testing.assert_close(network(x), expected)


# The images


def _image(mode, size, colour):
    from PIL import Image

    return Image.new(mode, size, colour)


def test_photographs_of_scikit_learn():
    """Without paths the images are the two photographs of scikit-learn."""
    names, images = load_images((), 48)
    assert names == ("china.jpg", "flower.jpg")
    assert images.shape == (2, 3, 48, 48)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert 0.5 < images.max() <= 1


def test_files_and_folders_keep_their_order(tmp_path):
    """Files come in the order given; those of a folder by name, and what is no image is left out there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, level in {"folder/b.png": 20, "folder/a.PNG": 10, "z.png": 30}.items():
        _image("RGB", (40, 40), (level, 0, 0)).save(tmp_path / name)
    (folder / "notes.txt").write_text("no image")
    names, images = load_images([folder, tmp_path / "z.png"], 32)
    assert names == ("a.PNG", "b.png", "z.png")
    assert (images[:, 0, 5, 5] * 255).round().tolist() == [10, 20, 30]
    names, images = load_images([str(tmp_path / "z.png"), str(folder)], 32)
    assert names == ("z.png", "a.PNG", "b.png")
    assert (images[:, 0, 5, 5] * 255).round().tolist() == [30, 10, 20]


def test_folder_with_other_documents(tmp_path):
    """A PDF beside the images of a folder is left out."""
    _image("RGB", (40, 40), 0).save(tmp_path / "a.png")
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4\n")
    assert load_images([tmp_path], 32)[0] == ("a.png",)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 7), (100, 100, 100)),
        ("RGBA", (10, 20, 30, 128), (10, 20, 30)),
        ("1", 1, (255, 255, 255)),
        ("RGB", (0, 128, 255), (0, 128, 255)),
    ],
)
def test_colours_become_rgb(mode, colour, expected, tmp_path):
    """Images of other modes become red, green and blue, as parts of 1."""
    _image(mode, (32, 32), colour).save(tmp_path / "image.png")
    _, images = load_images([tmp_path / "image.png"], 32)
    assert images.shape == (1, 3, 32, 32)
    wanted = torch.tensor(expected)[:, None, None].expand(3, 32, 32) / 255
    torch.testing.assert_close(images[0], wanted)


def test_palettes_become_rgb(tmp_path):
    """A pixel of an image with a palette has the colour that the palette gives."""
    image = _image("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "image.png")
    _, images = load_images([tmp_path / "image.png"], 32)
    assert (images[0, :, 3, 3] * 255).round().tolist() == [200, 100, 50]


def test_deep_grey_is_scaled(tmp_path):
    """A grey image of 16 bits keeps its greys."""
    from PIL import Image

    Image.fromarray(np.full((32, 32), 32768, np.uint16)).save(tmp_path / "image.png")
    _, images = load_images([tmp_path / "image.png"], 32)
    assert float(images.mean()) == pytest.approx(0.5, abs=0.01)


def test_the_middle_is_cut(tmp_path):
    """An image whose shorter side fits is not scaled: its middle is taken as it is."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2).copy()).save(tmp_path / "high.png")
    _, images = load_images([tmp_path / "wide.png", tmp_path / "high.png"], 40)
    wanted = torch.from_numpy(pixels[:, 12:52]).movedim(-1, 0) / 255
    torch.testing.assert_close(images[0], wanted)
    torch.testing.assert_close(images[1], wanted.transpose(1, 2))


def test_the_shorter_side_is_scaled(tmp_path):
    """A larger image is scaled by its shorter side, and only then cut."""
    from PIL import Image

    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:, :18, 0], pixels[:, 18:46, 1], pixels[:, 46:, 2] = 255, 255, 255
    Image.fromarray(pixels).save(tmp_path / "stripes.png")
    _, images = load_images([tmp_path / "stripes.png"], 32)
    # 51 pixels wide, of which 9 to 40 are left: the stripes end at 14.3 and 36.7
    assert images.shape == (1, 3, 32, 32)
    assert images[0, :, 16, 16].tolist() == [0, 1, 0]
    largest = images[0, :, 16].argmax(dim=0).tolist()
    assert largest == [0] * 5 + [1] * 23 + [2] * 4
    assert images.min() >= 0
    assert images.max() <= 1


def test_size_is_a_positive_integer():
    """A size that is no whole number is refused."""
    with pytest.raises(InvalidDataError, match=r"'size' parameter must be a positive integer\. Got 40\.5"):
        load_images((), 40.5)


def test_damaged_image_is_named(tmp_path):
    """An image whose inside is damaged is refused with its name."""
    path = tmp_path / "image.png"
    _image("RGB", (40, 40), 0).save(path)
    whole = path.read_bytes()
    place = whole.index(b"IDAT") - 4
    path.write_bytes(whole[:place] + b"\0\0\0\x01" + whole[place + 4 :])
    with pytest.raises(DataUnavailableError, match=r"image\.png cannot be read as an image"):
        load_images([path], 32)


# The measures


def test_quality_of_the_same_image():
    """An image rebuilt without error has an SSIM of 1, and the highest PSNR that is told."""
    image = np.random.default_rng(0).random((16, 16, 3))
    assert image_quality(image, image) == (60, pytest.approx(1))


def test_quality_by_hand():
    """A mean squared error of 0.01 is a PSNR of 20 dB, and flat images have the SSIM of their means."""
    psnr, ssim = image_quality(np.full((8, 8, 3), 0.5), np.full((8, 8, 3), 0.6))
    assert psnr == pytest.approx(20)
    assert ssim == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4))


def test_the_numbers_are_those_measured(tmp_path):
    """The JSON file has every measure as it is, and the report tells of what diverged."""
    measures = Measures(
        input_error=np.array([[0.0, 0.25]]),
        feature_error=np.array([[0.0, 0.5]]),
        psnr=np.array([[60.0, 6.0]]),
        ssim=np.array([[1.0, 0.75]]),
        n_diverged=1,
        pictures=np.zeros((1, 2, 32, 32, 3), np.uint8),
    )
    settings = Settings("random", ("features.0",), "", {"optimizer": "adam", "max_iter": "1"}, 0, "0", "0", "0")
    study = Study(settings, {"random": [measures]}, ("conv1",), ("a", "b"), torch.zeros(2, 3, 32, 32), 60.0)
    report = write_study(study, tmp_path)
    assert "1 inversion diverged" in report.read_text()
    (network,) = json.loads((tmp_path / "vgg19.json").read_text())["networks"]["random"]
    assert network == {
        "input_error": [[0.0, 0.25]],
        "feature_error": [[0.0, 0.5]],
        "psnr": [[60.0, 6.0]],
        "ssim": [[1.0, 0.75]],
        "n_diverged": 1,
    }


def test_measures_are_those_of_the_pictures():
    """The input error is the mean squared error of the pictures, and PSNR and SSIM are of the same pixels."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3, stride=2))
    images = torch.rand(3, 3, 16, 16)
    measures = measure_network(network, images, ["2", "0"], descent=Descent("lbfgs", max_iter=10), seed=0)
    assert measures.pictures.shape == (2, 3, 16, 16, 3)
    assert measures.pictures.dtype == np.uint8
    true = images.movedim(1, -1).double().numpy()
    squares = (measures.pictures / 255 - true) ** 2
    np.testing.assert_allclose(measures.input_error, squares.mean(axis=(2, 3, 4)), rtol=0.02, atol=1e-5)
    np.testing.assert_allclose(measures.psnr, -10 * np.log10(measures.input_error), rtol=1e-5)
    ssim = [[image_quality(a, b / 255)[1] for a, b in zip(true, layer, strict=True)] for layer in measures.pictures]
    np.testing.assert_allclose(measures.ssim, ssim, atol=0.01)
    assert measures.feature_error.shape == (2, 3)
    assert measures.n_diverged == 0
    # The second layer named, which is the lower one, is rebuilt from better.
    assert measures.input_error[1].mean() < measures.input_error[0].mean()


def test_measures_do_not_depend_on_the_batch_size():
    """Images in batches give the measures that they give all at once."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    images = torch.rand(3, 3, 12, 12)
    whole, parts = (
        measure_network(network, images, ["0"], descent=Descent("adam", max_iter=5), seed=0, batch_size=size)
        for size in (3, 2)
    )
    np.testing.assert_allclose(whole.input_error, parts.input_error, rtol=1e-4)
    np.testing.assert_allclose(whole.feature_error, parts.feature_error, rtol=1e-4)
