"""The bundled sample of MNIST, and the ways to the whole set."""

import gzip
import re

import numpy as np
import pytest
import sklearn.datasets

from retrainscope.data import Mnist, load_mnist, read_idx
from retrainscope.exceptions import DataUnavailableError

SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


def idx(array):
    """Write an array of bytes in the IDX format: two zeros, type 8, the dimensions, then the data."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def sample():
    return load_mnist()


@pytest.mark.parametrize(("part", "a_digit"), [("train", 600), ("test", 200)])
def test_sample_is_balanced(sample, part, a_digit):
    """The sample has the same number of images of each digit, in the shapes and types that are promised."""
    images, labels = getattr(sample, f"{part}_images"), getattr(sample, f"{part}_labels")
    assert images.shape == (10 * a_digit, 1, 28, 28)
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [a_digit] * 10


def test_sample_is_ink_on_paper(sample):
    """Images reach from 0 to 1, and every one has ink in its middle and none in its corners."""
    for images in (sample.train_images, sample.test_images):
        assert (images.min(), images.max()) == (0.0, 1.0)
        assert (images[:, 0, 4:24, 4:24].max(axis=(1, 2)) > 0.5).all()
        assert images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].max() == 0


def test_sample_repeats_no_image(sample):
    """No image is there twice, and none of the test images is among the training images."""
    images = np.concatenate([sample.train_images, sample.test_images]).reshape(8000, -1)
    assert len(np.unique(images, axis=0)) == 8000


def test_digits_can_be_told_apart(sample):
    """Images carry the label of their digit: the nearest class mean is right for three in four."""
    means = np.array([sample.train_images[sample.train_labels == digit].mean(axis=0).ravel() for digit in range(10)])
    test = sample.test_images.reshape(len(sample.test_labels), -1)
    nearest = np.argmin(np.square(means).sum(axis=1) - 2 * test @ means.T, axis=1)
    # LeCun et al. 1998 report an error of 12 % for a linear classifier; means do a little worse.
    assert np.mean(nearest == sample.test_labels) > 0.75


def test_parts_are_named(sample):
    """The parts can be taken apart in the order of their names."""
    assert Mnist._fields == ("train_images", "train_labels", "test_images", "test_labels")
    assert sample[0] is sample.train_images


# --- IDX files


@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (0, 28, 28)])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_idx_file_is_read(tmp_path, shape, packed):
    """An IDX file is read as it was written, gzipped or not."""
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    content = gzip.compress(idx(array)) if packed else idx(array)
    found = read_idx(write(tmp_path / ("data.gz" if packed else "data"), content))
    assert found.dtype == np.uint8
    assert np.array_equal(found, array)
    assert found.shape == shape


def test_idx_file_may_be_named_by_a_string(tmp_path):
    """A path may come as a string."""
    assert read_idx(str(write(tmp_path / "data", idx(np.arange(3))))).tolist() == [0, 1, 2]


GOOD = idx(np.arange(12).reshape(3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], r"is damaged: its header tells an array of shape \(3, 4\), and 11 bytes follow. Get it anew"),
        (GOOD + b"\0", r"is damaged: its header tells an array of shape \(3, 4\), and 13 bytes follow"),
        (GOOD[:10], "is not an IDX file of unsigned bytes. Get it anew"),
        (b"", "is not an IDX file of unsigned bytes"),
        (GOOD[:3], "is not an IDX file of unsigned bytes"),
        (b"\x00\x00\x0d" + GOOD[3:], "is not an IDX file of unsigned bytes"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is not an IDX file of unsigned bytes"),
        (gzip.compress(GOOD), "is not an IDX file of unsigned bytes"),
    ],
    ids=["cut off", "too long", "half a header", "empty", "no dimensions", "floats", "an image", "gzipped"],
)
def test_file_that_is_no_whole_idx_file_is_refused(tmp_path, content, message):
    """A file that is no whole IDX file of bytes is refused with its path."""
    path = write(tmp_path / "data", content)
    with pytest.raises(DataUnavailableError, match=f"{re.escape(str(path))} {message}"):
        read_idx(path)


@pytest.mark.parametrize(
    "content",
    [b"", GOOD, gzip.compress(GOOD)[:-9], gzip.compress(GOOD)[:12] + b"\xff" * 30],
    ids=["empty", "not gzipped", "cut off", "broken"],
)
def test_damaged_gzip_file_is_refused(tmp_path, content):
    """A file that cannot be unpacked, or holds nothing, is refused with its path."""
    path = write(tmp_path / "data.gz", content)
    message = "is damaged|is not an IDX file" if content == b"" else r"is damaged \(.+\)\. Get it anew"
    with pytest.raises(DataUnavailableError, match=f"{re.escape(str(path))} ({message})"):
        read_idx(path)


@pytest.mark.parametrize(("name", "reason"), [("absent", "No such file or directory"), ("", "Is a directory")])
def test_file_that_cannot_be_read_is_refused(tmp_path, name, reason):
    """A file that is missing or no file is refused with its path and the reason."""
    with pytest.raises(DataUnavailableError, match=f"{re.escape(str(tmp_path / name))} cannot be read .{reason}"):
        read_idx(tmp_path / name)


# --- the whole set


def test_folder_is_for_the_whole_set(tmp_path):
    """A folder without full=True is a mistake that is told, rather than ignored."""
    with pytest.raises(ValueError, match="The 'folder' parameter is for the whole set: pass full=True with it"):
        load_mnist(folder=tmp_path)


@pytest.mark.parametrize("missing", SHAPES)
def test_folder_without_the_files_is_refused(tmp_path, missing, monkeypatch):
    """A folder that lacks one of the four files is refused with the name of that file."""
    monkeypatch.setattr("retrainscope.data._IDX_FILES", tuple((name, (2,)) for name in SHAPES))
    for name in SHAPES:
        if name != missing:
            write(tmp_path / name, idx(np.zeros(2)))
    with pytest.raises(DataUnavailableError, match=f"{re.escape(str(tmp_path))} has no file '{missing}' or"):
        load_mnist(full=True, folder=tmp_path)


def test_folder_that_is_not_there_is_refused(tmp_path):
    """A folder that does not exist is refused with the first file that it lacks."""
    with pytest.raises(DataUnavailableError, match="has no file 'train-images-idx3-ubyte'"):
        load_mnist(full=True, folder=str(tmp_path / "absent"))


def test_file_of_another_shape_is_refused(tmp_path):
    """A file of another shape than MNIST's is refused with both shapes."""
    for name, shape in SHAPES.items():
        write(tmp_path / name, idx(np.zeros((3, *shape[1:]))))
    message = r"train-images-idx3-ubyte holds an array of shape \(3, 28, 28\); MNIST's is \(60000, 28, 28\)"
    with pytest.raises(DataUnavailableError, match=message):
        load_mnist(full=True, folder=tmp_path)


def test_whole_set_is_read_from_a_folder(tmp_path):
    """The four files, gzipped or not, become images in [0, 1] and labels; a gzipped one goes before a plain one."""
    for name, shape in SHAPES.items():
        array = np.zeros(shape, dtype=np.uint8)
        array[1] = 51
        packed = name.startswith("t10k")
        write(tmp_path / (f"{name}.gz" if packed else name), gzip.compress(idx(array), 1) if packed else idx(array))
    write(tmp_path / "t10k-labels-idx1-ubyte", b"not to be read")
    mnist = load_mnist(full=True, folder=tmp_path)
    assert [part.shape for part in mnist] == [(60_000, 1, 28, 28), (60_000,), (10_000, 1, 28, 28), (10_000,)]
    assert [part.dtype for part in mnist] == [np.float32, np.int64, np.float32, np.int64]
    for images in (mnist.train_images, mnist.test_images):
        assert np.array_equal(images[:3, 0, 0, 0], np.array([0, 0.2, 0], dtype=np.float32))
    for labels in (mnist.train_labels, mnist.test_labels):
        assert labels[:3].tolist() == [0, 51, 0]


def test_whole_set_is_fetched_and_split(monkeypatch):
    """What OpenML gives is split into the first 60,000 for training and the rest for testing."""

    def fetch(name, *, version, return_X_y, as_frame, parser):
        assert (name, version, return_X_y, as_frame) == ("mnist_784", 1, True, False)
        assert parser == "liac-arff"  # the other needs pandas, which is no dependency
        images = np.zeros((60_003, 784))
        images[60_000:] = 255
        return images, np.array(["7"] * 60_000 + ["1", "2", "3"], dtype=object)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    mnist = load_mnist(full=True)
    assert mnist.train_images.shape == (60_000, 1, 28, 28)
    assert mnist.train_images.max() == 0
    assert set(mnist.train_labels.tolist()) == {7}
    assert mnist.test_images.shape == (3, 1, 28, 28)
    assert mnist.test_images.min() == 1
    assert mnist.test_labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("checksum differs")])
def test_failed_fetch_tells_the_other_way(monkeypatch, error):
    """If OpenML cannot be reached, the message gives the reason and the way without a network."""

    def fetch(*args, **kwargs):
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    message = rf"could not be fetched from OpenML \({error}\).*four standard IDX files into a folder.*folder="
    with pytest.raises(DataUnavailableError, match=message) as caught:
        load_mnist(full=True)
    assert caught.value.__cause__ is error
