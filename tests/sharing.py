"""What a group of processes does for the tests: run as a script, one process of many, or imported, the only one."""

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from datetime import timedelta
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import unchanged
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import retrainscope as rs
from retrainscope import criteria, parts, processes
from retrainscope.processes import rank

X, Y = torch.randn(150, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(150) % 3
X += 0.3 * Y[:, None, None, None]
KNOWN, UNKNOWN = (X[:83], Y[:83]), (-X[83:], Y[83:])
INFINITE = X[:83].clone()  # in what is made of one sample
INFINITE[20] = 3e38
ERROR = ZeroDivisionError("of the model")
FOLDER = Path(tempfile.gettempdir())  # of checkpoints; set by whoever runs the checks
DESCENT: dict[str, Any] = {"max_iter": 5, "samples_per_class": 7, "batch_size": 8}
OPTIONS: dict[str, Any] = {"random_state": 0, "batch_size": 16}


class Twice(nn.Module):
    """A layer whose weight is used once more, so that its gradients need a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return what comes of both uses."""
        return nn.functional.linear(torch.relu(self.inner(x)), self.inner.weight)


class Placed(nn.Module):
    """A network with a parameter of its own beside its layers, one of which has two names."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.place, self.inner = nn.Parameter(torch.full((8, 8), 0.1)), inner
        self.again = inner[3]

    def forward(self, x: Tensor) -> Tensor:
        """Return what the network makes of x."""
        return self.inner(x + self.place)


class Ending(nn.Module):
    """Does something at a call of one process, and passes its input on."""

    def __init__(self, at: int, do: Callable[[], object], *, process: int) -> None:
        super().__init__()
        self.left, self.do, self.process = at, do, process

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        self.left -= 1
        if self.left == 0 and rank() == self.process:
            self.do()
        return x


class Broken(Dataset[Any]):
    """Data of which the last sample cannot be read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        if place == 39:
            raise KeyError("no such file")
        return X[place], int(Y[place])


def network(*more: nn.Module) -> nn.Sequential:
    """Two convolutions, the first with batch normalisation, a layer used twice, and a head; in training mode."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AvgPool2d(4), nn.Flatten(), *more, Twice(), nn.Linear(6, 3))


def stream(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Batches of several sizes."""
    cuts = [0, 20, 50, 59, len(data[0])]
    return [(data[0][a:b], data[1][a:b]) for a, b in pairwise(cuts)]


def sampled(data: tuple[Tensor, Tensor], **options: Any) -> Any:
    """Return a loader that brings this process its share; the data itself where there is but one.

    The samples are not a multiple of the processes, and the sampler repeats some.
    """
    whole = TensorDataset(data[0][:61], data[1][:61])
    if not distributed.is_initialized():
        return whole
    return DataLoader(whole, batch_size=8, sampler=DistributedSampler(whole, shuffle=False, **options))


def spread(known: Any, unknown: Any, **options: Any) -> list[Any]:
    """Return what the spread finds."""
    found = rs.ActivationSpread(network(), **{**OPTIONS, **options}).fit(known).score_layers(unknown)
    return [found.values, found.interval, found.per_class, found.known_classes]


def advice(known: Any, unknown: Any, **options: Any) -> list[Any]:
    """Return what the default advice finds."""
    found = rs.recommend_layers(network(), known, unknown, **{**OPTIONS, **options})
    assert found.forecast is not None
    return [found.forecast.error, found.forecast.draws, found.scores[0].interval, found.scores[1].values, found.layers]


def synchronised() -> list[Any]:
    """Return what the default advice finds for a network whose batch normalisation asks other processes in training."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    found = rs.recommend_layers(net, KNOWN, UNKNOWN, **OPTIONS)
    assert found.forecast is not None
    assert type(net[1]) is nn.SyncBatchNorm
    assert "forward" not in vars(net[1])
    return [found.forecast.error]


def without_forecast() -> list[Any]:
    """Return what the advice notes for a model that there is no forecast for, where not every process has a batch."""
    found = rs.recommend_layers(network(nn.Unflatten(1, (1, 6))), KNOWN, UNKNOWN, random_state=0)
    return [found.notes, found.scores[0].values]


def many_classes() -> list[Any]:
    """Return what the spread finds where there are so many classes that it draws fewer features on the way."""
    y = torch.arange(400) % 130
    many = torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = rs.ActivationSpread(network(), **OPTIONS).fit((many, y))
    return [found.score_layers((-many, y)).values, found._n_features]


def labels_of_any_kind() -> list[Any]:
    """Return what the spread finds where classes have no order but the one that they come in."""
    y = [("b", 2, "a")[place] for place in Y[:83].tolist()]
    return spread((X[:83], y), UNKNOWN)


def untouched() -> list[Any]:
    """Return whether the model and the random states are what they were."""
    net = network()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before, state = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    rs.recommend_layers(net, KNOWN, UNKNOWN, **OPTIONS)
    same = all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    same &= all(module.training and not module._forward_hooks for module in net.modules())
    same &= all(p.requires_grad for p in net.parameters()) and bool((net[0].weight.grad == 1).all())
    same &= torch.equal(state, torch.get_rng_state())
    return [same and np.array_equal(numpy_state, np.random.get_state()[1])]  # noqa: NPY002


def scores(estimator: Any, known: Any = KNOWN, unknown: Any = UNKNOWN, **options: Any) -> list[Any]:
    """Return what an estimator finds; its model stays what it was."""
    net = network()
    with unchanged(net):
        found = estimator(net, **{**OPTIONS, **options}).fit(known).score_layers(unknown)
    return [found.values, found.interval, found.per_class, found.unknown, found.known_classes, found.n_samples]


def decoders(known: Any, unknown: Any, **options: Any) -> list[Any]:
    """Return what decoders find, and the weights of one."""
    probe = rs.LayerDecoderProbe(network(), **{**OPTIONS, "max_epochs": 2, **options}).fit(known)
    found, last = probe.score_layers(unknown), probe.decoders_["control"][0].state_dict()
    return [found.values, found.interval, probe.losses_, *(value.numpy() for value in last.values())]


def split(net: nn.Module, *parts: nn.Module) -> None:
    """Split parts of a network, and then all the rest, among the processes."""
    if distributed.is_initialized():
        from torch.distributed.fsdp import fully_shard

        mesh = distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
        for module in (*parts, net):
            fully_shard(module, mesh=mesh)


def owned_in_pieces() -> list[Any]:
    """Return which layer owns which parameter."""
    net = Placed(network())
    split(net, net.inner[0], net.inner[3])
    layers = rs.ActivationSpread(net, **OPTIONS).fit(KNOWN).layers_
    return [str(layers.parameters), str(layers.n_parameters), layers.unused]


def in_pieces(estimator: Any = rs.ActivationSpread, known: Any = KNOWN, *more: nn.Module, **options: Any) -> list[Any]:
    """Return what comes of a model that ``fully_shard`` has split among the processes; it stays split, and trains."""
    net = network(*more)
    split(net, net[0], net[3])
    before = {name: (id(p), local(p)) for name, p in net.named_parameters()}
    try:
        if estimator is rs.recommend_layers:
            found = estimator(net, known, X[83:], **OPTIONS)
            result = [str(found), found.notes, found.scores[0].values]
        else:
            fitted = estimator(net, **{**OPTIONS, **options}).fit(known)
            result = [fitted.score_layers(UNKNOWN).values]
    finally:
        after = {name: (id(p), local(p)) for name, p in net.named_parameters()}
        assert before.keys() == after.keys()
        for name, (identity, content) in before.items():
            assert after[name][0] == identity
            np.testing.assert_array_equal(after[name][1], content)
        net(X[:4]).sum().backward()
        assert net[3].weight.grad is not None
    return result


def local(parameter: Tensor) -> Any:
    """Return the piece of a parameter that this process has."""
    piece = getattr(parameter, "to_local", lambda: parameter)()
    return piece.detach().numpy().copy()


def swept(
    net: nn.Module | None = None, *, file: str | None = None, data: tuple[Any, Any] = (KNOWN, UNKNOWN), **options: Any
) -> list[Any]:
    """Return what retraining gives; of several calls with one file the last has nothing left to do."""
    options = {"steps": 4, "learning_rates": (1e-2, 1e-3), "n_seeds": 1, "random_state": 0, **options}
    path = None if file is None else FOLDER / file
    net = network() if net is None else net
    with unchanged(net):
        found = rs.sweep_layers(net, *data, checkpoint=path, **options)
    seconds = found.seconds if file is not None else np.zeros(0)
    return [
        found.accuracy,
        found.validation,
        found.known_accuracy,
        found.draws,
        found.policies,
        found.new_head,
        seconds,
    ]


def swept_again() -> list[Any]:
    """Return what a sweep gives that was stopped after some policies: the trials that are kept are not done again."""
    few = swept(file="sweep.json", policies=[["0"]])
    whole = swept(file="sweep.json")
    again = swept(file="sweep.json")
    np.testing.assert_array_equal(whole[-1], again[-1])
    rows = [whole[4].index(policy) for policy in few[4]]
    np.testing.assert_array_equal(whole[-1][rows], few[-1])
    return whole[:-1]


def advised(*, file: str | None = None, **options: Any) -> list[Any]:
    """Return the advice as text, with what was tried out; with a folder the second call finds all there."""
    options |= {"trial": {"steps": 4, "learning_rates": (1e-2,)}, **OPTIONS}
    if file is not None:
        options["checkpoint"] = FOLDER / file
    texts = [str(rs.recommend_layers(network(), KNOWN, UNKNOWN, **options)) for _ in range(1 if file is None else 2)]
    assert len(set(texts)) == 1
    return [texts[0]]


def kept(estimator: Any, **options: Any) -> list[Any]:
    """Return the advice of an estimator whose parts are kept as often as can be, from a run that was broken off."""
    net, folder = network(), FOLDER / estimator.__name__

    def advice() -> list[Any]:
        given = [estimator(net, **{**OPTIONS, **options})]
        found = rs.recommend_layers(net, KNOWN, UNKNOWN, estimators=given, checkpoint=folder)
        return [found.scores[0].values, found.scores[0].interval]

    before = parts._SHARE, parts.Parts.clear
    parts._SHARE, parts.Parts.clear = math.inf, lambda _: None  # type: ignore[assignment, method-assign]
    try:
        whole = advice()
    finally:
        parts._SHARE, parts.Parts.clear = before  # type: ignore[method-assign]
    if rank() == 0:  # what is finished is lost, what was under way is there
        for name in ("known", "unknown"):
            (folder / f"0-{estimator.__name__}.{name}.bin").unlink(missing_ok=True)
    again = advice()
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)
    return whole


def similarity() -> list[Any]:
    """Return how alike two networks are."""
    other = network()
    with torch.no_grad():
        other[0].weight += 0.1
    found = criteria.compare_layers(network(), other, UNKNOWN, batch_size=16)
    return [found.values, found.n_samples, found.n_batches]


SAME: dict[str, Callable[[], list[Any]]] = {
    "spread": lambda: spread(KNOWN, UNKNOWN),
    "without labels": lambda: spread(X[:83], X[83:]),
    "one batch": lambda: spread(KNOWN, UNKNOWN, batch_size=256),
    "stream": lambda: spread(stream(KNOWN), stream(UNKNOWN)),
    "many classes": many_classes,
    "labels of any kind": labels_of_any_kind,
    "advice": lambda: advice(KNOWN, UNKNOWN),
    "advice on one batch": lambda: advice(KNOWN, UNKNOWN, batch_size=256),
    "advice on a stream": lambda: advice(stream(KNOWN), stream(UNKNOWN), groups=[*range(33), *range(34)]),
    "synchronised": synchronised,
    "without forecast": without_forecast,
    "untouched": untouched,
    "inverter": lambda: scores(rs.GradientInverter, **DESCENT),
    "inverter without labels": lambda: scores(rs.GradientInverter, X[:83], X[83:], **DESCENT),
    "inverter on a stream": lambda: scores(rs.GradientInverter, stream(KNOWN), stream(UNKNOWN), **DESCENT),
    "decoders": lambda: decoders(KNOWN, UNKNOWN),
    "decoders on a stream": lambda: decoders(stream(KNOWN), stream(UNKNOWN)),
    "decoders of one layer": lambda: decoders(KNOWN, UNKNOWN, layers=["0"], batch_size=256),
    "sweep": swept,
    "synchronised sweep": lambda: swept(nn.SyncBatchNorm.convert_sync_batchnorm(network())),
    "sweep with a checkpoint": swept_again,
    "trial": advised,
    "trial with a checkpoint": lambda: advised(file="advice"),
    "kept decoders": lambda: kept(rs.LayerDecoderProbe, max_epochs=3),
    "kept inversions": lambda: kept(rs.GradientInverter, **DESCENT),
    "kept criterion": lambda: kept(criteria.HScore),
    "spread by a sampler": lambda: scores(rs.ActivationSpread, sampled(KNOWN), sampled(UNKNOWN))[:6:5],
    "inverter by a sampler": lambda: scores(
        rs.GradientInverter, sampled(KNOWN), sampled(UNKNOWN), max_iter=1, samples_per_class=30
    )[5:],
    "features by a sampler": lambda: scores(criteria.HScore, sampled(KNOWN), sampled(UNKNOWN))[4:],
    "decoders by a sampler": lambda: decoders(sampled(KNOWN), sampled(UNKNOWN), batch_size=8),
    "gradients by a sampler": lambda: scores(criteria.EmpiricalFisher, sampled(KNOWN), sampled(UNKNOWN)),
    "sweep by a sampler": lambda: swept(data=(sampled(KNOWN), sampled(UNKNOWN))),
    "features": lambda: scores(criteria.HScore, samples_per_class=20),
    "features of one batch": lambda: scores(criteria.LogME, batch_size=256),
    "probe": lambda: scores(criteria.KNNProbe),
    "norms of gradients": lambda: scores(criteria.RelativeGradientNorm, samples_per_class=20),
    "norms of gradients on a stream": lambda: scores(criteria.RelativeGradientNorm, stream(KNOWN), stream(UNKNOWN)),
    "noise of gradients": lambda: scores(criteria.GradientSignalToNoise, samples_per_class=20),
    "fisher on one batch": lambda: scores(criteria.EmpiricalFisher, batch_size=256),
    "spectra": lambda: scores(criteria.SpectrumSNR),
    "similarity": similarity,
    "in pieces": in_pieces,
    "owned in pieces": owned_in_pieces,
    "one batch in pieces": lambda: in_pieces(batch_size=256),
    "features in pieces": lambda: in_pieces(criteria.HScore, samples_per_class=20),
    "advice in pieces": lambda: in_pieces(rs.recommend_layers, X[:83]),
}


def unlike(process: int, mine: Any, others: Any) -> Any:
    """Return what one process is given, or the others."""
    return mine if rank() == process else others


def other_weights() -> Any:
    """Measure a model with another weight in process 1."""
    net = network()
    with torch.no_grad():
        net[3].bias += float(rank() == 1)
    return rs.ActivationSpread(net, **OPTIONS).fit(KNOWN)


def other_precision() -> Any:
    """Measure where autocast is on in process 0 alone."""
    with torch.autocast("cpu", torch.bfloat16, enabled=rank() == 0):
        return spread(KNOWN, UNKNOWN)


def other_statistics() -> Any:
    """Measure a model whose batch statistics have drifted apart."""
    net = network()
    with torch.no_grad():
        net[1].running_mean += rank()
    return rs.recommend_layers(net, KNOWN, UNKNOWN, **OPTIONS)


def failing(do: Callable[[], object]) -> Any:
    """Measure a model that does something at its third call in process 1."""
    return rs.ActivationSpread(network(Ending(3, do, process=1)), **OPTIONS).fit(KNOWN)


def run_out() -> None:
    """Fail as a user's model may: with one error again and again."""
    raise ERROR


def interrupted() -> Any:
    """Measure a model at whose third call the user interrupts process 1."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        return failing(interrupt)
    except KeyboardInterrupt:
        return "interrupted"


def alone() -> Any:
    """Make a call in process 0 alone, with little patience; the others come later."""
    if rank():
        time.sleep(5)
        return None
    before, processes._PATIENCE = processes._PATIENCE, timedelta(seconds=2)
    try:
        return spread(KNOWN, UNKNOWN)
    finally:
        processes._PATIENCE = before
        time.sleep(1)


def bars() -> str:
    """Return what is written of progress."""
    with redirect_stderr(StringIO()) as written:
        rs.ActivationSpread(network(), **OPTIONS, progress=True).fit(KNOWN)
    return written.getvalue()


def drawn_seed() -> list[Any]:
    """Return what comes of seeds that nobody gave."""
    return advice(KNOWN, UNKNOWN, random_state=None)


TOLD: dict[str, Callable[[], Any]] = {
    "weights": other_weights,
    "precision": other_precision,
    "statistics": other_statistics,
    "size": lambda: spread(unlike(1, UNKNOWN, KNOWN), UNKNOWN),
    "content": lambda: spread(KNOWN, unlike(1, (-X[:83], Y[:83]), KNOWN)),
    "setting": lambda: spread(KNOWN, UNKNOWN, batch_size=unlike(1, 8, 16)),
    "state": lambda: spread(KNOWN, UNKNOWN, random_state=rank()),
    "threshold": lambda: advice(KNOWN, UNKNOWN, threshold=unlike(1, 0.1, 0.2)),
    "groups": lambda: advice(KNOWN, UNKNOWN, groups=unlike(1, [0] * 67, [*range(67)])),
    "layers": lambda: spread(KNOWN, UNKNOWN, layers=unlike(1, ["0"], ["0", "3"])),
    "model fails": lambda: failing(run_out),
    "model fails again": lambda: failing(run_out),
    "data fails": lambda: spread(Broken(), UNKNOWN),
    "parameter fails": lambda: spread(KNOWN, UNKNOWN, batch_size=unlike(1, 0, 16)),
    "apart": lambda: unlike(1, advice, spread)(KNOWN, UNKNOWN),
    "checkpoint": lambda: advice(KNOWN, UNKNOWN, checkpoint="no/where"),
    "policies": lambda: swept(policies=[["0"]] if rank() else None),
    "steps": lambda: swept(steps=4 + rank()),
    "wrapped": lambda: rs.ActivationSpread(nn.parallel.DistributedDataParallel(network())).fit(KNOWN),
    "decoders in pieces": lambda: in_pieces(rs.LayerDecoderProbe),
    "gradients in pieces": lambda: in_pieces(criteria.EmpiricalFisher),
    "pieces elsewhere": lambda: in_pieces(device="cpu"),
    "error in pieces": lambda: in_pieces(rs.ActivationSpread, KNOWN, Ending(4, run_out, process=rank())),
    "infinity in pieces": lambda: in_pieces(known=(INFINITE, Y[:83])),
    "sampler": lambda: advice(sampled(KNOWN), sampled(UNKNOWN)),
    "sampler and groups": lambda: advice(sampled(KNOWN), sampled(UNKNOWN), groups=[*range(61)]),
    "seed": drawn_seed,
    "interrupted": interrupted,
    "alone": alone,
    "together again": lambda: spread(KNOWN, UNKNOWN),
    "another's sampler": lambda: spread(sampled(KNOWN, rank=0), UNKNOWN),
    "bars": bars,
}


def outcomes(checks: dict[str, Callable[[], Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the result of each check, or the error that it raised as (class, message)."""
    for name, check in checks.items():
        try:
            yield name, check()
        except Exception as error:
            yield name, (type(error), str(error))


def main(folder: Path, number: int, n: int, *, told: bool) -> None:
    """Be one process of n; write down what came of every check."""
    global FOLDER
    FOLDER = folder / f"checkpoints-{n}"
    if number == 0:
        FOLDER.mkdir()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group-{n}", rank=number, world_size=n)
    found = dict(outcomes(SAME | (TOLD if told else {})))
    torch.save(found, folder / f"{n}-{number}.pt")
    killed = {"killed": lambda: failing(lambda: os.kill(os.getpid(), signal.SIGKILL))}
    began = time.monotonic()
    found |= dict(outcomes(killed))
    found["seconds"] = time.monotonic() - began
    torch.save(found, folder / f"{n}-{number}.pt")
    sys.stdout.flush()
    os._exit(0)  # a group that has lost a process cannot be left in order


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), told=sys.argv[4] == "told")
