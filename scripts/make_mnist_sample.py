"""Make the bundled sample of MNIST from the four standard IDX files.

    python scripts/make_mnist_sample.py FOLDER_WITH_IDX_FILES

600 training and 200 test images of each digit, drawn at random (seed 0) from the standard training
and test sets, kept in the order of those sets, as unsigned bytes.
"""

import sys
from pathlib import Path

import numpy as np

from retrainscope.data import Mnist, load_mnist

TARGET = Path(__file__).parents[1] / "src/retrainscope/data/mnist-sample.npz"


def sample_rows(labels, n_per_digit, rng):
    """Draw the same number of rows of each digit, in the order of the set."""
    drawn = [rng.choice(np.flatnonzero(labels == digit), n_per_digit, replace=False) for digit in range(10)]
    return np.sort(np.concatenate(drawn))


def main(folder):
    mnist = load_mnist(full=True, folder=folder)
    rng = np.random.default_rng(0)
    train = sample_rows(mnist.train_labels, 600, rng)
    test = sample_rows(mnist.test_labels, 200, rng)
    arrays = (
        (mnist.train_images[train, 0] * 255).round().astype(np.uint8),
        mnist.train_labels[train].astype(np.uint8),
        (mnist.test_images[test, 0] * 255).round().astype(np.uint8),
        mnist.test_labels[test].astype(np.uint8),
    )
    np.savez_compressed(TARGET, **dict(zip(Mnist._fields, arrays, strict=True)))
    print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
