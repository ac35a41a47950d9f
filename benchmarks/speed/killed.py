"""What does ``kill -9`` cost a long run with a checkpoint, and is the result the same?

    python benchmarks/speed/killed.py [--runs 20] [--seed 0] [--out FILE]

A process asks for advice on the paper's network and MNIST, by the default estimators and by decoders and inversion. It
is killed at a random time, and started again, until it ends by itself; then the next run. Each run's result is compared
with that of a run that was left alone, byte for byte. Work is the processor's time from where the process has its
network and data, in all pieces of a run, against that of the run that was left alone; to start Python and torch is no
part of it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # which torch imports at its first use otherwise, in the midst of the work

from retrainscope import ActivationSpread, GradientInverter, LayerDecoderProbe, TangentProbe, recommend_layers
from retrainscope.data import load_mnist
from retrainscope.studies.mnist.experiments import KNOWN, UNKNOWN, few_of, paper_network, split_roles, trained

_READY = "ready"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the times (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the summary as JSON")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        advise(*options.child)
        return
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(trained(split_roles(load_mnist()).training, 0).state_dict(), folder / "network.pt")
        alone = piece(folder, None)
        expected = (folder / "advice.json").read_bytes()
        kept = piece(folder, folder / "parts")
        again = piece(folder, folder / "parts")
        same = (folder / "advice.json").read_bytes() == expected
        shutil.rmtree(folder / "parts")
        print(
            f"left alone: {alone.work:.2f} s of work without a checkpoint; with one {kept.work:.2f} s, "
            f"the same: {same};\n"
            f"the same call when all is done: {again.work:.2f} s, which every start costs\n"
        )
        print(f"{'run':>4}{'killed':>8}{'work':>9}{'twice':>8}{'same':>6}")
        shares, n_killed, n_same = [], 0, 0
        for run in range(options.runs):
            (folder / "advice.json").unlink()
            pieces = [piece(folder, folder / "parts", kill_after=rng.uniform(0, alone.seconds))]
            while not pieces[-1].ended:
                pieces.append(piece(folder, folder / "parts", kill_after=rng.uniform(0, alone.seconds)))
            same = (folder / "advice.json").read_bytes() == expected
            shutil.rmtree(folder / "parts")
            work = sum(each.work for each in pieces)
            shares.append(work / alone.work - 1)
            n_killed, n_same = n_killed + len(pieces) - 1, n_same + same
            print(f"{run:4}{len(pieces) - 1:8}{work:8.2f}s{shares[-1]:8.1%}{same!s:>6}", flush=True)
    twice, each = sum(shares) / len(shares), sum(shares) / max(1, n_killed)
    print(
        f"\n{n_same} of {options.runs} results are the same, after {n_killed} kills; work done twice: {twice:.1%} of a "
        f"run, {each:.1%} a kill"
    )
    if options.out:
        header = [
            "runs",
            "kills",
            "equal results",
            "work done twice, of a run",
            "a kill",
            "left alone",
            "with checkpoint",
        ]
        row = [str(options.runs), str(n_killed), str(n_same), f"{twice:.1%}", f"{each:.1%}"]
        row += [f"{run.work:.1f} s" for run in (alone, kept)]
        options.out.write_text(json.dumps({"header": header, "rows": [row]}, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Piece:
    """What a process did until it ended or was killed."""

    seconds: float
    work: float  # seconds of the processor
    ended: bool


def piece(folder: Path, checkpoint: Path | None, *, kill_after: float | None = None) -> Piece:
    """Run until the end, or until the process is killed so many seconds after it was ready."""
    command = [sys.executable, __file__, "--child", str(folder), str(checkpoint or "")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        word, spent = process.stdout.readline().split()
        assert word == _READY
        began = time.monotonic()
        if kill_after is not None:
            _wait(process.pid, kill_after)
            os.kill(process.pid, signal.SIGKILL)  # one that has ended is still there to be waited for
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.monotonic() - began, os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"The process failed with status {process.returncode}.")
    return Piece(seconds, usage.ru_utime + usage.ru_stime - float(spent), process.returncode == 0)


def _wait(pid: int, seconds: float) -> None:
    """Wait so long, or until the process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        time.sleep(0.002)


def advise(folder: Path, checkpoint: Path) -> None:
    """Ask for advice and save it."""
    torch.set_num_threads(1)
    network, split = paper_network(), split_roles(load_mnist())
    network.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
    options = {"random_state": 0, "progress": False}
    estimators = [
        TangentProbe(network, **options),
        ActivationSpread(network, **options),
        LayerDecoderProbe(network, max_epochs=5, **options),
        GradientInverter(network, max_iter=30, samples_per_class=4, batch_size=25, **options),
    ]
    usage = os.times()
    print(_READY, usage.user + usage.system, flush=True)
    advice = recommend_layers(
        network,
        few_of(split.known, KNOWN, 100),
        few_of(split.unknown, UNKNOWN, 50),
        estimators=estimators,
        checkpoint=None if str(checkpoint) == "." else checkpoint,
    )
    advice.save(folder / "advice.json")


if __name__ == "__main__":
    main()
