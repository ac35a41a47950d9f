"""`retrainscope recommend`: it advises as `recommend_layers` does, and says what is wrong with what it is given."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import retrainscope as rs
from retrainscope.cli import main
from retrainscope.commands.data_paths import draw_samples

NETWORK = """
import sys

import torch
from torch import nn


def network():
    print("a word of the network's own")
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


ready = network().eval()


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, left, right):
        return self.net(torch.cat([left, right], dim=1))


def pixels():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def accented():
    net = nn.Sequential()
    for name, part in zip(["\u00e9t\u00e9", "relu", "head"], [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)]):
        net.add_module(name, part)
    return net


def failing():
    raise ValueError("the disk is full of stars")


def leaving():
    sys.exit("usage: network")


def interrupted():
    raise KeyboardInterrupt


def nothing():
    return 3


number = 3
"""
HOSTILE = ["<script>alert(1)</script>", '"it\'s" & $\\frac{$', "\N{FOX FACE} fox", "x" * 300]


def arrays(classes, n=60, seed=0):
    """Return samples in four dimensions, parted along the first, and their classes in turn."""
    rng = np.random.default_rng(seed)
    places = np.arange(n) % len(classes)
    X = rng.normal(size=(n, 4)).astype(np.float32)
    X[:, 0] += 2 * places
    return X, np.array([classes[place] for place in places])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder that has the network and the data."""
    monkeypatch.chdir(tmp_path)
    Path("network.py").write_text(NETWORK, encoding="utf-8")
    for name, classes in (("known", [0, 1, 2]), ("unknown", [3, 4])):
        X, y = arrays(classes)
        np.savez(f"{name}.npz", X=X, y=y)
    return tmp_path


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def arguments(*more, model="network.py:network", known="known.npz", unknown="unknown.npz"):
    return ["recommend", model, "--known", str(known), "--unknown", str(unknown), *more]


def advice_of(capsys, *more, **named):
    """Run the command, and return the document that it prints."""
    status = main(arguments("--format", "json", "--quiet", *more, **named))
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def document_of(rec, path="expected.json"):
    rec.save(path)
    return Path(path).read_text(encoding="utf-8")


def error_of(capsys, *more, **named):
    """Run the command, which fails, and return its message."""
    assert main(arguments("--quiet", *more, **named)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *_, line = err.splitlines()
    assert line.startswith("retrainscope: ")
    assert "Traceback" not in err
    return line


def process(*command, **environment):
    """Run the command as a process of its own."""
    run = [sys.executable, "-m", "retrainscope", *command]
    return subprocess.run(run, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_the_advice_is_that_of_the_library():
    """Printed is the table of `recommend_layers`, alone: what the network prints goes to standard error."""
    done = process(*arguments("--quiet", model="network:network"))
    rec = rs.recommend_layers(network(), arrays([0, 1, 2]), arrays([3, 4]), random_state=0)
    assert (done.returncode, done.stdout) == (0, f"{rec}\n")
    assert set(done.stderr.splitlines()) == {"a word of the network's own"}


def test_messages_go_to_standard_error(capsys):
    """What is being done, and where the advice is, is said on standard error."""
    assert main(arguments("--out", "new/advice")) == 0
    out, err = capsys.readouterr()
    assert str(rs.Recommendation.load("new/advice/advice.json")) + "\n" == out
    assert "Loading network.py:network\n" in err
    assert f"Written: {Path('new/advice/advice.json')} and {Path('new/advice/advice.html')}\n" in err
    assert sorted(path.name for path in Path("new/advice").iterdir()) == ["advice.html", "advice.json"]
    assert "<title>Advice for network.py:network</title>" in Path("new/advice/advice.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["network:network", "network.py:network", "network:ready", "./network.py:ready"])
def test_models_by_import(model, capsys, monkeypatch):
    """A callable and a module, from a module and from a file, are the same network; the path is given back."""
    monkeypatch.delitem(sys.modules, "network", raising=False)
    before = list(sys.path)
    rec = rs.recommend_layers(network(), arrays([0, 1, 2]), arrays([3, 4]), random_state=0)
    assert advice_of(capsys, model=model) == document_of(rec)
    assert sys.path == before


def test_the_document_is_what_is_saved(capsys):
    """The JSON that is printed is the file that is written."""
    printed = advice_of(capsys, "--out", "advice")
    assert printed == Path("advice/advice.json").read_text(encoding="utf-8")


def test_every_option_arrives(capsys):
    """The options are those of `recommend_layers`."""
    options = ["--layers", "0, 2", "--head", "4", "--batch-size", "16", "--device", "cpu", "--seed", "3",
               "--threshold", "0.4", "--budget", "parameters=0.9, backward=0.8", "--input-layer", "1"]  # fmt: skip
    expected = rs.recommend_layers(
        network(), arrays([0, 1, 2]), arrays([3, 4]), layers=["0", "2"], head="4", batch_size=16, device="cpu",
        random_state=3, threshold=0.4, budget={"parameters": 0.9, "backward": 0.8}, input_layer="1",
    )  # fmt: skip
    assert advice_of(capsys, *options) == document_of(expected)


def test_estimators_that_are_named_decide(capsys):
    """The estimators are made with the options given, and with their own defaults else."""
    model = network()
    made = [
        kind(model, layers=["0"], random_state=5)
        for kind in (rs.ActivationSpread, rs.TangentProbe, rs.LayerDecoderProbe, rs.GradientInverter)
    ]
    expected = rs.recommend_layers(model, arrays([0, 1, 2]), arrays([3, 4]), estimators=made)
    named = ["--estimators", "spread,tangent,probe,inverter,spread", "--layers", "0", "--seed", "5"]
    found = json.loads(advice_of(capsys, *named))["result"]
    ours = json.loads(document_of(expected))["result"]
    assert found["table"] == ours["table"]
    assert [scores["estimator"] for scores in found["scores"]] == [type(estimator).__name__ for estimator in made]


def columns(X, y):
    return {"X": X, "y": y}


@pytest.mark.parametrize(
    "written",
    [columns, lambda X, y: {"inputs": X, "labels": y}, lambda X, y: {"X": X, "label": y}, lambda X, _: {"X": X}],
)
def test_arrays(written, capsys):
    """Arrays are inputs and labels by either name, and need no labels."""
    data = [arrays([0, 1, 2]), arrays([3, 4])]
    for name, (X, y) in zip(("known", "unknown"), data, strict=True):
        np.savez(f"{name}.npz", **written(X, y))
    known, unknown = data if len(written(*data[0])) == 2 else [X for X, _ in data]
    rec = rs.recommend_layers(network(), known, unknown, random_state=0)
    assert advice_of(capsys) == document_of(rec)


def test_several_arrays_go_by_keyword(capsys):
    """Arrays of other names are what the forward takes by these names."""
    for name, classes in (("known", [0, 1, 2]), ("unknown", [3, 4])):
        X, y = arrays(classes)
        np.savez(f"{name}.npz", right=X[:, 1:], left=X[:, :1], y=y)
    found = json.loads(advice_of(capsys, model="network.py:ByName"))["result"]
    plain = rs.recommend_layers(network(), arrays([0, 1, 2]), arrays([3, 4]), random_state=0)
    assert found["layers"] == [f"net.{name}" for name in plain.layers]
    assert found["forecast"]["accuracy"] == json.loads(document_of(plain))["result"]["forecast"]["accuracy"]


def test_samples_of_each_class(capsys):
    """--samples takes so many of each class."""
    scores = json.loads(advice_of(capsys, "--samples", "12", "--estimators", "spread"))["result"]["scores"]
    assert scores[0]["classes"] == [3, 4]
    assert scores[0]["n_samples"] == [36, 24]


def test_samples_are_drawn_from_all():
    """At most so many of each class are drawn, in the order of the data, by the seed."""
    labels = ["a"] * 50 + ["b"] * 3
    rows = draw_samples(labels, 53, 5, seed=0)
    assert list(rows) == sorted(set(rows.tolist()))
    assert (rows < 50).sum() == 5
    assert rows[rows < 50].max() > 5
    assert rows[5:].tolist() == [50, 51, 52]
    assert np.array_equal(rows, draw_samples(labels, 53, 5, seed=0))
    assert not np.array_equal(rows, draw_samples(labels, 53, 5, seed=1))


def grouped(seed=0):
    """Return 60 samples of two classes, of which each three in turn are near copies, and what they are copies of."""
    rng = np.random.default_rng(seed)
    parts = np.repeat(np.arange(20), 3)
    X = rng.normal(size=(20, 4)).astype(np.float32)[parts]
    y = np.array([3, 4])[parts % 2]
    return X + 0.01 * rng.normal(size=X.shape).astype(np.float32), y, parts


def test_groups(capsys):
    """--groups names the array that tells what belongs together; it is no input, and is drawn with the samples."""
    X, y, parts = grouped()
    np.savez("unknown.npz", X=X, y=y, patient=parts)
    rec = rs.recommend_layers(network(), arrays([0, 1, 2]), (X, y), groups=parts, random_state=0)
    assert advice_of(capsys, "--groups", "patient") == document_of(rec)
    rows = draw_samples(y.tolist(), 60, 24, seed=0)
    some = rs.recommend_layers(network(), arrays([0, 1, 2]), (X[rows], y[rows]), groups=parts[rows], random_state=0)
    assert advice_of(capsys, "--groups", "patient", "--samples", "24") == document_of(some)


def test_groups_of_a_saved_data_set(text_model, capsys):
    """A column is taken as the groups, and is no input."""
    options = ["--input-layer", "bert.embeddings"]
    paths = {"model": f"hf:{text_model}", "known": "known", "unknown": "unknown"}
    for name, classes in (("known", [0, 1, 2]), ("unknown", [0, 1])):
        save_texts(name, classes)
    (Path("grouped")).mkdir()
    made = save_texts("plain", [0, 1])
    made.add_column("author", [place // 4 for place in range(len(made))]).save_to_disk("grouped/unknown")
    without = json.loads(advice_of(capsys, *options, **paths))["result"]["forecast"]
    found = json.loads(advice_of(capsys, *options, "--groups", "author", **paths | {"unknown": "grouped/unknown"}))
    assert found["result"]["forecast"]["policies"] == without["policies"]
    assert found["result"]["forecast"]["error"] != without["error"]


def test_bad_groups(capsys):
    """What names no array, or one that is too short, is refused."""
    assert "unknown.npz has no array or column 'patient' (--groups)." in error_of(capsys, "--groups", "patient")
    X, y, parts = grouped()
    np.savez("unknown.npz", X=X, y=y, patient=parts[:50])
    assert "unknown.npz has 60 samples and 50 patient" in error_of(capsys, "--groups", "patient", "--samples", "24")
    assert "60" in error_of(capsys, "--groups", "patient")


def test_trial(capsys):
    """--trial trains for real, as many steps as are told."""
    found = json.loads(advice_of(capsys, "--trial", "--trial-steps", "7"))["result"]["trial"]
    rec = rs.recommend_layers(network(), arrays([0, 1, 2]), arrays([3, 4]), trial={"steps": 7}, random_state=0)
    assert found["steps"] == 7
    assert found["accuracy"] == json.loads(document_of(rec))["result"]["trial"]["accuracy"]
    assert json.loads(advice_of(capsys, "--trial"))["result"]["trial"]["steps"] == 300


def write_images(folder, classes, n=6, size=(8, 8)):
    """Write images in a folder a class; return them in the order of the names, and their classes."""
    rng = np.random.default_rng(0)
    pictures, labels = [], []
    for place, label in enumerate(sorted(classes)):
        (Path(folder) / label).mkdir(parents=True)
        for number in range(n):
            picture = rng.integers(0, 200, (*size, 3), dtype=np.uint8)
            picture[:, :, place % 3] += 50
            Image.fromarray(picture).save(Path(folder) / label / f"{number}.png")
            pictures.append(picture)
            labels.append(label)
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).contiguous().float() / 255, labels


def test_images_by_class(capsys):
    """A folder a class is its images, with the names of the folders as labels; hidden folders are none."""
    known, unknown = write_images("known", ["cat", "dog"]), write_images("unknown", ["owl", "cow"])
    (Path("known") / ".cache").mkdir()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    rec = rs.recommend_layers(model, known, unknown, random_state=0)
    paths = {"model": "network.py:pixels", "known": "known", "unknown": "unknown"}
    assert advice_of(capsys, "--image-size", "8", **paths) == document_of(rec)


def test_images_are_cut_to_squares(capsys):
    """Images of several sizes, in grey, with 16 bits, or turned by a note in the file, become squares of one."""
    write_images("known", ["cat", "dog"], size=(20, 31))
    write_images("unknown", ["owl", "cow"], size=(9, 8))
    ramp = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(ramp).save("known/cat/deep.png")
    Image.fromarray((ramp // 256).astype(np.uint8)).save("known/dog/grey.png")
    turned = Image.new("RGB", (30, 20))
    turned.getexif()[0x0112] = 6
    turned.save("known/dog/turned.jpg", exif=turned.getexif())
    paths = {"model": "network.py:pixels", "known": "known", "unknown": "unknown"}
    found = json.loads(advice_of(capsys, "--image-size", "8", "--estimators", "spread", **paths))["result"]
    assert found["scores"][0]["n_samples"] == [15, 12]


def test_samples_of_folders(capsys):
    """--samples takes so many images of each class, and looks at no others."""
    for name, classes in (("known", ["cat", "dog"]), ("unknown", ["owl", "cow"])):
        write_images(name, classes, n=8)
    paths = {"model": "network.py:pixels", "known": "known", "unknown": "unknown"}
    options = ["--image-size", "8", "--estimators", "spread", "--samples", "5"]
    assert json.loads(advice_of(capsys, *options, **paths))["result"]["scores"][0]["n_samples"] == [10, 10]


def test_weights(capsys):
    """The weights of a file are put into the network."""
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    torch.save(model.state_dict(), "weights.pt")
    rec = rs.recommend_layers(model, arrays([0, 1, 2]), arrays([3, 4]), random_state=0)
    assert advice_of(capsys, "--weights", "weights.pt") == document_of(rec)


@pytest.fixture
def text_model():
    """Write a small text classifier, and return its folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        max_position_embeddings=8,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained("text")
    transformers.BertModel(config).save_pretrained("base")
    return "text"


def save_texts(name, classes, n=24):
    datasets = pytest.importorskip("datasets")
    y = [classes[place % len(classes)] for place in range(n)]
    ids = np.random.default_rng(0).integers(1, 10, (n, 6)) + 4 * np.array(y)[:, None]
    data = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist(), "labels": y}
    made = datasets.Dataset.from_dict(data)
    made.save_to_disk(name)
    return made


def test_text(text_model, capsys):
    """A classifier and data sets of Hugging Face are taken from their folders."""
    import transformers

    known, unknown = save_texts("texts", [0, 1, 2]), save_texts("others", [3, 4])
    model = transformers.AutoModelForSequenceClassification.from_pretrained("text")
    rec = rs.recommend_layers(model, known, unknown, input_layer="bert.embeddings", random_state=0)
    paths = {"model": f"hf:{text_model}", "known": "texts", "unknown": "others"}
    assert advice_of(capsys, "--input-layer", "bert.embeddings", **paths) == document_of(rec)
    options = ["--input-layer", "bert.embeddings", "--weights", "random", "--samples", "5", "--estimators", "spread"]
    found = json.loads(advice_of(capsys, *options, **paths))["result"]
    assert found["scores"][0]["n_samples"] == [15, 10]


def test_bad_text_models_and_data(text_model, capsys):
    """A model without a classifier's head, several splits, and a damaged folder are refused, with the remedy."""
    import datasets

    assert "its architectures are ['BertModel']" in error_of(capsys, model="hf:base")
    assert "configuration of hf:./no/such cannot be read or fetched" in error_of(capsys, model="hf:./no/such")
    datasets.DatasetDict(train=save_texts("texts", [0, 1]), test=save_texts("more", [0, 1])).save_to_disk("splits")
    options = {"model": "hf:text", "known": "splits"}
    assert f"holds the splits train, test. Give one of them: {Path('splits/train')}." in error_of(capsys, **options)
    for file in Path("texts").glob("*.arrow"):
        file.write_bytes(b"no")
    assert "texts cannot be read as a saved data set" in error_of(capsys, model="hf:text", known="texts")
    write_images("images", ["a"])
    assert "does not tell how it takes them" in error_of(capsys, model="hf:text", known="images")


def test_a_library_that_is_missing(capsys, monkeypatch):
    """Without the library, the message says how to get it."""
    save_texts("texts", [0, 1])
    for package in ("timm", "torchvision", "transformers", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    for model, package in (("timm:x", "timm"), ("torchvision:x", "torchvision"), ("hf:x", "transformers")):
        assert f"Install it with: pip install {package}" in error_of(capsys, model=model)
    assert "Install it with: pip install datasets" in error_of(capsys, known="texts")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("network", r"must be named module:callable, file.py:callable, .* Got 'network'\."),
        ("timm:", r"must be named module:callable"),
        (":network", r"must be named module:callable"),
        ("nowhere.py:network", r"There is no file nowhere\.py"),
        ("no_such:network", r"no_such cannot be imported \(ModuleNotFoundError: No module named 'no_such'\)"),
        ("broken.py:network", r"broken\.py cannot be imported \(SyntaxError: "),
        ("stopping.py:network", r"stopping\.py cannot be imported \(SystemExit: 3\)"),
        ("network.py:netwrok", r"network\.py has no 'netwrok'\. Did you mean 'network'\?"),
        (
            "network.py:failing",
            r"network\.py:failing failed \(ValueError: the disk is full of stars\)\. See .* --debug",
        ),
        ("network.py:leaving", r"network\.py:leaving failed \(SystemExit: usage: network\)"),
        ("network.py:nothing", r"network\.py:nothing must return an nn\.Module\. Got int instead"),
        ("network.py:number", r"network\.py:number failed \(TypeError: 'int' object is not callable\)"),
        ("network.py:pixels", r"The model fails on the data \(RuntimeError: .*\)\. See where with --debug"),
    ],
)
def test_bad_models(model, message, capsys):
    """What cannot be imported, called or measured is said in one line."""
    Path("broken.py").write_text("def network(:\n", encoding="utf-8")
    Path("stopping.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    assert re.search(message, error_of(capsys, model=model))


def test_debug_shows_where(capsys):
    """--debug adds the traceback, with the place in the network's own code."""
    assert main(arguments("--debug", model="network.py:failing")) == 2
    err = capsys.readouterr().err
    assert 'raise ValueError("the disk is full of stars")' in err
    assert err.splitlines()[-1].startswith("retrainscope: network.py:failing failed")


def test_bad_arrays(capsys):
    """A file that is no archive of plain arrays, or lacks inputs, is refused."""
    X, y = arrays([0, 1])
    Path("text.npz").write_text("X", encoding="utf-8")
    np.savez("pickled.npz", X=X, y=np.array([{"a": 1}] * 60, dtype=object))
    np.savez("no-names.npz", X, y)
    np.savez("no-inputs.npz", y=y)
    np.savez("bytes.npz", X=X, y=np.array([b"a"] * 60))
    np.savez("short.npz", X=X, y=y[:7])
    np.save("single.npy", X)
    Path("cut.npz").write_bytes(Path("known.npz").read_bytes()[:-200])
    messages = {
        "nowhere.npz": r"There is no file or folder nowhere\.npz \(--known\)\.",
        "text.npz": r"text\.npz cannot be read as a \.npz file of plain arrays",
        "pickled.npz": r"pickled\.npz cannot be read .* \(Object arrays cannot be loaded when allow_pickle=False\)",
        "single.npy": r"single\.npy cannot be read as a \.npz file",
        "cut.npz": r"cut\.npz cannot be read as a \.npz file",
        "no-names.npz": r"must hold an array X, .* Got arr_0, arr_1\.",
        "no-inputs.npz": r"Got no inputs\. Write it with np\.savez\(file, X=X, y=y\)",
        "bytes.npz": r"labels in bytes\.npz must be numbers or text\. Got \|S1; try y\.astype\(str\)",
        "short.npz": r"The known data has 60 samples but 7 labels",
    }
    for name, message in messages.items():
        assert re.search(message, error_of(capsys, known=name)), name
    assert re.search(messages["short.npz"], error_of(capsys, "--samples", "3", known="short.npz"))


def test_pickled_code_is_not_run(capsys):
    """Neither arrays nor weights run code of the file that they are read from."""

    class Evil:
        def __reduce__(self):
            return Path("ran").touch, ()

    np.savez("evil.npz", X=np.array([Evil()], dtype=object))
    torch.save({"0.weight": Evil()}, "evil.pt")
    assert "evil.npz cannot be read" in error_of(capsys, known="evil.npz")
    assert "with weights_only=True" in error_of(capsys, "--weights", "evil.pt")
    assert not Path("ran").exists()


def test_bad_weights(capsys):
    """Weights that are not of the network, or no weights, are refused; what does not fit is named."""
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 7))
    torch.save(other.state_dict(), "other.pt")
    torch.save({"state_dict": network().state_dict()}, "checkpoint.pt")
    torch.save([1, 2], "list.pt")
    line = error_of(capsys, "--weights", "other.pt")
    assert line.startswith("retrainscope: other.pt is not of network.py:network (Missing key(s)")
    assert '"4.weight"' in line
    assert "size mismatch for 2.weight" in line
    assert 'Unexpected key(s) in state_dict: "state_dict"' in error_of(capsys, "--weights", "checkpoint.pt")
    assert "list.pt is not of network.py:network" in error_of(capsys, "--weights", "list.pt")
    assert "There is no file none.pt" in error_of(capsys, "--weights", "none.pt")
    assert "--weights random is for models of timm" in error_of(capsys, "--weights", "random")


def test_bad_images(capsys):
    """An empty folder, one without images, a file that is no image, and a damaged one are named."""
    paths = {"model": "network.py:pixels", "unknown": "images"}
    write_images("images", ["cat", "dog"])
    Path("empty").mkdir()
    Path("hollow/cat").mkdir(parents=True)
    (Path("hollow") / "cat" / "notes.txt").write_text("none", encoding="utf-8")
    write_images("false", ["cat"])
    (Path("false") / "cat" / "9.png").write_text("none", encoding="utf-8")
    write_images("cut", ["cat", "dog"], size=(40, 40))
    file = Path("cut/dog/3.png")
    file.write_bytes(file.read_bytes()[:1500])
    messages = {
        "empty": "The folder empty has no folders in it",
        "hollow": f"The folder {Path('hollow/cat')} holds no images",
        "false": f"{Path('false/cat/9.png')} cannot be read as an image",
        "cut": f"{file} cannot be read as an image",
    }
    for name, message in messages.items():
        assert message in error_of(capsys, "--image-size", "8", known=name, **paths), name
    assert "Give --image-size N" in error_of(capsys, known="images", **paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimators", "spread,sprad"], "--estimators takes spread, tangent, probe, inverter. Got 'sprad'."),
        (["--estimators", "spread", "--budget", "parameters=0.2"], "--budget is for the forecast."),
        (["--estimators", "spread", "--trial"], "--trial is for the forecast."),
        (["--estimators", "spread", "--groups", "X"], "--groups is for the forecast."),
        (["--trial-steps", "5"], "--trial-steps is for --trial"),
        (["--device", "warp"], "The 'device' parameter must be a device that this machine has"),
    ],
)
def test_bad_options_before_any_work(options, message, capsys):
    """Options that cannot be met are refused before the model is loaded."""
    assert message in error_of(capsys, *options, model="network.py:failing")


@pytest.mark.parametrize("budget", ["0.2", "parameters=x", "forward=0.2", "parameters=0", "backward=1.5", ""])
def test_bad_budget(budget, capsys):
    """A budget is shares of what can be bounded."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments("--budget", budget))
    assert stopped.value.code == 2
    assert "must be like parameters=0.2" in capsys.readouterr().err


def test_errors_of_the_library(capsys):
    """A misspelt layer is one line, with the names that are near."""
    assert "The model has no layer named 'O'" in error_of(capsys, "--layers", "O")
    assert "must be a finite number of nats" in error_of(capsys, "--threshold", "nan")


def test_advice_that_is_there_is_kept(capsys):
    """Advice in the folder is refused before any work, and written over with --force only."""
    Path("advice").mkdir()
    Path("advice/advice.html").write_text("old", encoding="utf-8")
    message = "advice has advice.html already. Name another folder, or give --force."
    assert message in error_of(capsys, "--out", "advice", model="network.py:failing")
    assert Path("advice/advice.html").read_text(encoding="utf-8") == "old"
    advice_of(capsys, "--out", "advice", "--force")
    assert "Verdict" in Path("advice/advice.html").read_text(encoding="utf-8")
    assert "known.npz cannot be written" in error_of(capsys, "--out", "known.npz", model="network.py:failing")


def test_without_the_extra_there_is_no_page(capsys, monkeypatch):
    """Without the extra report, the advice is saved all the same, an old page goes, and how to get one is said."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    Path("advice").mkdir()
    Path("advice/advice.html").write_text("old", encoding="utf-8")
    assert main(arguments("--out", "advice", "--force")) == 0
    err = capsys.readouterr().err
    assert "There will be no advice.html: jinja2 is needed" in err
    assert "pip install 'retrainscope[report]'" in err
    assert [path.name for path in Path("advice").iterdir()] == ["advice.json"]


@pytest.mark.filterwarnings("ignore:Glyph")  # the fonts of matplotlib have no foxes
def test_hostile_class_names(capsys):
    """A class may have any name: it is kept as it is, and is text and nothing else on the page."""
    X, y = arrays(HOSTILE, n=48)
    np.savez("unknown.npz", X=X, y=y)
    known, labels = arrays([0, 1, 2])
    np.savez("known.npz", X=known, y=labels.astype(str))
    printed = advice_of(capsys, "--out", "advice")
    assert {label for label, _ in json.loads(printed)["result"]["per_class"]} == set(HOSTILE)
    page = Path("advice/advice.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert main(arguments()) == 0
    assert "Verdict: " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_folder_names(capsys):
    """So may a folder of images, as far as the file system lets it; what is no text is written in ASCII."""
    write_images("known", ["cat", "dog"])
    names = ["<script>alert(1)<", '"it\'s" & $\\frac{$', "\N{FOX FACE}", "x" * 250]
    write_images("unknown", names)
    odd = os.fsdecode(b"caf\xe9")
    write_images("unknown", [odd])
    paths = {"model": "network.py:pixels", "known": "known", "unknown": "unknown"}
    printed = advice_of(capsys, "--image-size", "8", "--out", "advice", **paths)
    assert {label for label, _ in json.loads(printed)["result"]["per_class"]} == {*names, "caf\\xe9"}
    assert "<script" not in Path("advice/advice.html").read_text(encoding="utf-8")


def test_a_terminal_without_the_letters():
    """Letters that the terminal lacks are written in ASCII, and are no error."""
    done = process(*arguments("--quiet", model="network.py:accented"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "\\xe9t\\xe9" in done.stdout


def test_interrupted(capsys):
    """Ctrl-C ends with status 130, and nothing is written."""
    assert main(arguments("--out", "advice", model="network.py:interrupted")) == 130
    assert "retrainscope: interrupted; nothing is written." in capsys.readouterr().err
    assert list(Path("advice").iterdir()) == []


def test_a_checkpoint(capsys):
    """With --checkpoint finished parts are kept, the same command gives the same, and another one is refused."""
    first = advice_of(capsys, "--checkpoint", "parts")
    assert Path("parts/0-ActivationSpread.unknown.bin").exists()
    assert advice_of(capsys, "--checkpoint", "parts") == first == advice_of(capsys)
    assert "parts holds parts of another run" in error_of(capsys, "--checkpoint", "parts", "--seed", "1")
    assert main(arguments("--checkpoint", "parts", model="network.py:interrupted")) == 130
    assert "interrupted; what is finished is in parts." in capsys.readouterr().err


def test_the_page_runs(capsys):
    """What docs/command.md says can be typed, and each command gives advice."""
    page = (Path(__file__).parents[1] / "docs" / "command.md").read_text(encoding="utf-8")
    network, data = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    Path("network.py").write_text(network, encoding="utf-8")
    exec(compile(data, "data.py", "exec"), {})
    commands = "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).splitlines()
    assert len(commands) == 6
    for command in commands:
        _, *typed = shlex.split(command)
        assert main(typed) == 0
        assert "erdict" in capsys.readouterr().out
    assert rs.Recommendation.load("advice/advice.json").verdict
