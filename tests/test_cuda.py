"""The same on a GPU as on the processor, and the model left as it was there too; needs CUDA (make test-cuda)."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import classifier, samples
from torch import Tensor, nn

import retrainscope as rs
from retrainscope import criteria

pytestmark = [
    pytest.mark.cuda,
    # What torch's own threads for gradients say when they come to a GPU first.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

ESTIMATORS = {
    rs.ActivationSpread: {},
    rs.GradientInverter: {"max_iter": 20, "samples_per_class": 10},
    rs.LayerDecoderProbe: {"max_epochs": 3},
    rs.TangentProbe: {},
    criteria.EmpiricalFisher: {},
    criteria.GradientSignalToNoise: {},
    criteria.HScore: {},
    criteria.HiddenStateVariability: {},
    criteria.KNNProbe: {},
    criteria.LinearProbe: {},
    criteria.LogME: {},
    criteria.RelativeGradientNorm: {},
    criteria.SpectrumSNR: {},
    criteria.TransRate: {},
}
every_estimator = pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.__name__)


def conv_net() -> nn.Sequential:
    """Convolutions with batch normalisation, a transformer layer on the places, dropout; in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(2)),
        *(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(256, 4)),
    )


def images(classes: tuple[int, ...] = (0, 1), *, n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make images of a bright row each, by class."""
    y = torch.tensor(classes)[torch.arange(n) % len(classes)]
    X = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    X[torch.arange(n), 0, y] += 2
    return X, y


def placed(pair: tuple[Tensor, object]) -> tuple[Tensor, object]:
    """Put the inputs on the GPU."""
    return pair[0].cuda(), pair[1]


def scored(kind: type, model: nn.Module, *, device: str | None = None, on_gpu: bool = False) -> rs.LayerScores:
    """Fit on two classes and score the same in another place, as all estimators can."""
    known, unknown = samples(), (samples(seed=1)[0].flip(1), samples(seed=1)[1])
    if on_gpu:
        known, unknown = placed(known), placed(unknown)
    return kind(model, random_state=0, device=device, **ESTIMATORS[kind]).fit(known).score_layers(unknown)


@every_estimator
def test_scores_are_those_of_the_processor(kind):
    """A copy on the GPU, a model that lies there, and data that does give the scores that the processor gives."""
    model = classifier(dtype=torch.float64)
    expected = scored(kind, model)
    there = copy.deepcopy(model).cuda()
    # Training and descent go their own way from the last digits on, so that those are only near.
    near = 0.05 if kind in (rs.GradientInverter, rs.LayerDecoderProbe) else 1e-6
    for found in (scored(kind, model, device="cuda"), scored(kind, there), scored(kind, there, on_gpu=True)):
        np.testing.assert_allclose(found.values, expected.values, atol=near)
        assert found.classes == expected.classes


@every_estimator
def test_a_model_on_the_gpu_is_left_as_it_was(kind):
    """Parameters, buffers, flags, hooks and all random states are what they were, those of the GPU too."""
    model = classifier(dtype=torch.float64).cuda()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = torch.cuda.get_rng_state_all()
    with unchanged(model):
        scored(kind, model)
    assert all(torch.equal(one, other) for one, other in zip(state, torch.cuda.get_rng_state_all(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_estimator
def test_scores_under_autocast(kind, dtype):
    """Inside of autocast the needs are near those outside; an inversion does not follow it."""
    model = classifier().cuda()
    expected = scored(kind, model)
    with unchanged(model), torch.autocast("cuda", dtype):
        found = scored(kind, model)
        assert torch.is_autocast_enabled("cuda")
    np.testing.assert_allclose(found.values, expected.values, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype):
    """Inside of autocast a sweep learns, whatever weights the caller's context has kept."""
    model = conv_net().cuda().eval()
    with unchanged(model), torch.autocast("cuda", dtype):
        model(images()[0].cuda())
        sweep = rs.sweep_layers(
            model, images(), placed(images((2, 3), n=120, seed=1)), steps=60, n_seeds=1, random_state=0
        )
    assert sweep.mean_accuracy["all"] > 0.8


def test_advice_is_that_of_the_processor():
    """Of an image network the advice is the same, and the needs are, but for the precision of single floats."""
    model = conv_net()
    known, unknown = images(), images((2, 3), seed=1)
    here = rs.recommend_layers(model, known, unknown, random_state=0)
    with unchanged(model):
        there = rs.recommend_layers(model, known, unknown, random_state=0, device="cuda")
    assert (there.layers, there.verdict) == (here.layers, here.verdict)
    np.testing.assert_allclose([row.need for row in there.table], [row.need for row in here.table], atol=0.02)


def test_a_sweep_runs_on_the_gpu():
    """A model that lies on the GPU is swept there and left as it was; what it forgets and learns is told as usual."""
    model = conv_net().cuda()
    with unchanged(model):
        sweep = rs.sweep_layers(
            model, images(), placed(images((2, 3), n=120, seed=1)), steps=60, n_seeds=1, random_state=0
        )
    assert sweep.mean_accuracy["all"] > 0.8
    assert sweep.policies[0] == "head"


def test_train_only_on_the_gpu():
    """Frozen tensors and batch statistics stay bit for bit what they were; the others are trained."""
    model = conv_net().cuda().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    X, y = images((0, 1), seed=2)
    with rs.train_only(model, ["4", "11"]) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X.cuda()), y.cuda()).backward()
            optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"4.weight", "4.bias", "11.weight", "11.bias"}


def test_inversion_and_comparison_on_the_gpu():
    """Inputs are rebuilt, and layers compared, from a copy on the GPU."""
    model, (X, _) = conv_net(), images(n=8)
    found = rs.invert_layers(model, X, ["0"], device="cuda", random_state=0)
    assert float(found["0"].input_error.mean()) < 0.05
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[4].weight.copy_(torch.randn_like(changed[4].weight))
    like = criteria.compare_layers(model, changed, images()[0], layers=["0", "4"], device="cuda")
    np.testing.assert_allclose(like.values[0], 1, atol=1e-5)
    assert like.values[1] < 0.99


@pytest.fixture
def little_memory():
    """Leave this process 1 GiB of the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_changes_no_result(little_memory):
    """Where the GPU has no room for a batch it is halved, and the scores are those of small batches."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(16, 2**16), nn.ReLU(), nn.Linear(2**16, 3)).cuda()
    X, y = torch.randn(8192, 16), torch.arange(8192) % 2
    X[:, 0] += 2 * y
    known, unknown = (X[:4096], y[:4096]), (X[4096:].flip(1), y[4096:])

    def spread(batch_size: int) -> rs.LayerScores:
        estimator = rs.ActivationSpread(wide, batch_size=batch_size, random_state=0)
        return estimator.fit(known).score_layers(unknown)

    expected = spread(128)
    with unchanged(wide), pytest.warns(UserWarning, match="Out of memory on cuda"):
        found = spread(4096)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
    np.testing.assert_allclose(found.interval, expected.interval, atol=1e-5)


GROUP = """
import sys
import torch
from torch import distributed
import retrainscope as rs
from networks import classifier, samples
folder, number = sys.argv[1], int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
rec = rs.recommend_layers(
    classifier(dtype=torch.float64).cuda(), samples(), samples(classes=(3, 4, 5), seed=1),
    random_state=0, progress=False,
)
rec.save(f"{folder}/{number}.json")
distributed.destroy_process_group()
"""


def test_two_processes_on_the_gpu(tmp_path):
    """Two processes share the work on models that lie on the GPU, and both say what one does."""
    commands = [[sys.executable, "-c", GROUP, str(tmp_path), str(number)] for number in range(2)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    team = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}) for command in commands]
    assert [process.wait(timeout=120) for process in team] == [0, 0]
    model = classifier(dtype=torch.float64).cuda()
    alone = rs.recommend_layers(model, samples(), samples(classes=(3, 4, 5), seed=1), random_state=0)
    for number in range(2):
        rec = rs.Recommendation.load(tmp_path / f"{number}.json")
        assert (rec.layers, rec.verdict) == (alone.layers, alone.verdict)
        np.testing.assert_allclose([row.need for row in rec.table], [row.need for row in alone.table], atol=1e-6)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_peak_memory_is_that_of_the_gpu(on_gpu):
    """The peak is what torch allocates on the GPU, also for a model that lies elsewhere and is measured there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4000, 4000), nn.ReLU(), nn.Linear(4000, 3))  # 64 MB
    X, y = torch.randn(3000, 4000), torch.arange(3000) % 3
    told = rs.recommend_layers(
        model.cuda() if on_gpu else model,
        *((X, y), (X.flip(1), y)),
        estimators=[rs.ActivationSpread(model, batch_size=30, device="cuda", random_state=0)],
    ).peak_memory["ActivationSpread"]
    assert told < 1e9
    assert told > (0 if on_gpu else 60e6)  # else the copy is there while it is measured


class Recurrent(nn.Module):
    """An LSTM, which cuDNN goes back through in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.recurrent, self.head = nn.Linear(1, 4), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.mix(x[..., None]))[0][:, -1])


@every_estimator
def test_recurrent_networks(kind):
    """Gradients go back through a recurrent network in evaluation mode, as on the processor."""
    model = Recurrent().eval().cuda()
    (X, y), (U, v) = placed(samples()), placed(samples(seed=1))
    with unchanged(model):
        found = kind(model, random_state=0, progress=False, **ESTIMATORS[kind]).fit((X, y)).score_layers((U.flip(1), v))
    assert "recurrent" in found.layers
    assert torch.backends.cudnn.enabled
