"""How often does data that the network knows get the verdict it should get: none?

    python benchmarks/null_verdict.py [--seeds 20]

For each seed the paper's network is trained on digits 0-4 of the bundled sample; known are training images that
it did not learn from, unknown are test images of the same digits, and beside it 50 samples of each of the digits
5-9, where the advice should name fc1.
"""

import argparse

import torch

from retrainscope import recommend_layers
from retrainscope.data import load_mnist
from retrainscope.studies.mnist.experiments import KNOWN, N_CHECK, UNKNOWN, few_of, images_of, split_roles, trained


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, metavar="N")
    seeds = range(parser.parse_args().seeds)
    split = split_roles(load_mnist())
    known_test = images_of(split.test, KNOWN)
    few = few_of(split.unknown, UNKNOWN, N_CHECK)
    n_none = n_fc1 = 0
    for seed in seeds:
        network = trained(split.training, seed)
        null = recommend_layers(network, split.known, known_test, random_state=seed)
        advice = recommend_layers(network, split.known, few, random_state=seed)
        n_none += null.verdict == "none"
        n_fc1 += "fc1" in advice.layers
        needs = ", ".join(f"{row.name} {row.need:+.2f}" for row in null.table)
        print(f"seed {seed:2d}: known digits {null.verdict} ({needs}); unknown digits {', '.join(advice.layers)}")
    print(f"verdict none for known digits: {n_none} of {len(seeds)}")
    print(f"fc1 named for unknown digits: {n_fc1} of {len(seeds)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
