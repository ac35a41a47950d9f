"""Five lines in a training loop of your own, ``python examples/plain_loop.py``: who knows the digits 0-4 learns 5-9."""

import copy

import torch
from digits import accuracy, digits, fit, network
from torch import nn

import retrainscope as rs


def main() -> None:
    """Retrain what is advised, and for comparison the head alone and everything."""
    model = network()
    known, unknown = digits(range(5), start=300), digits(range(5, 10))

    rec = rs.recommend_layers(model, known, unknown, random_state=0)
    print(rec)

    # The new classes 5 to 9 are outputs 0 to 4 of a new head, under the name that the old one had.
    train, test = ((X, y - 5) for X, y in (unknown, digits(range(5, 10), n=200, test=True)))
    rs.replace_head(model, 5, head=rec, random_state=0)
    everything = [name for name, _ in model.named_children()]
    results = {}
    for name, layers in (("head only", [rec.head.name]), ("advised", rec), ("everything", everything)):
        trained = copy.deepcopy(model)
        torch.manual_seed(0)
        with rs.train_only(trained, layers) as parameters:
            fit(trained, train, parameters)
        results[name] = accuracy(trained, test)
        share = sum(p.numel() for p in parameters) / sum(p.numel() for p in model.parameters())
        print(f"{name:10} {share:6.1%} of the parameters: {results[name]:.1%} of the new digits right")
        if name == "advised":
            check_frozen(model, trained, {id(parameter) for parameter in parameters})

    assert results["advised"] > results["head only"] + 0.02
    assert results["advised"] > results["everything"] - 0.02


def check_frozen(before: nn.Module, after: nn.Module, trained: set[int]) -> None:
    """Fail unless every parameter that was not trained is bit for bit what it was."""
    weights = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert (id(parameter) in trained) != torch.equal(parameter, weights[name]), name


if __name__ == "__main__":
    main()
