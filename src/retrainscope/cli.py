"""The ``retrainscope`` command."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from retrainscope.descent import Descent
from retrainscope.exceptions import InvalidDataError, RetrainscopeError

__all__ = ["main"]

_LARGEST_SEED = 2**32 - 1  # of NumPy's and scikit-learn's generators


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        None takes those of the process.

    Returns
    -------
    int
        The exit status: 0, 2 for bad use or an error with a remedy, 130 if interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except RetrainscopeError as error:
        print(f"retrainscope: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "what is finished is kept" if options.out else "nothing is kept without --out"
        print(f"retrainscope: interrupted; {kept}.", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retrainscope",
        description="Which layers of a trained network must be retrained for data it does not know?",
    )
    parser.add_argument("--version", action="version", version=f"retrainscope {version('retrainscope')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    mnist = commands.add_parser(
        "mnist",
        help="run the paper's MNIST study",
        description="Run the paper's MNIST study: a network that knows the digits 0-4 meets the digits 5-9.",
    )
    mnist.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.html, study.json and the figures here, and keep finished "
        "seeds, so that a run that was stopped goes on"
    )  # fmt: skip
    mnist.add_argument("--seed", type=_seed, default=0, metavar="S", help="the first seed (default: %(default)s)")
    mnist.add_argument("--seeds", type=_positive, default=3, metavar="N", help="how many seeds (default: %(default)s)")
    mnist.add_argument(
        "--full", action="store_true", help="use all of MNIST; fetched from OpenML without --mnist-folder"
    )
    mnist.add_argument("--mnist-folder", type=Path, metavar="DIR", help="the standard IDX files, for --full")
    mnist.add_argument("--quiet", action="store_true", help="no progress and no tables")
    mnist.set_defaults(run=_mnist)
    _add_vgg19(commands)
    _add_recommend(commands)
    return parser


def _add_vgg19(commands: Any) -> None:
    vgg19 = commands.add_parser(
        "vgg19",
        help="run the paper's VGG-19 experiment",
        description="Rebuild photographs from the layers of VGG-19, with trained and with random weights. Needs the "
        "extra vision.",
    )
    vgg19.add_argument(
        "--weights", default="imagenet", metavar="W", help="imagenet (torchvision's, downloaded), random (no trained "
        "network), or a file with a state dict of torchvision's VGG-19 (default: %(default)s)",
    )  # fmt: skip
    vgg19.add_argument(
        "--images", type=Path, nargs="+", default=[], metavar="PATH", help="image files, or folders of them (default: "
        "the two photographs of scikit-learn)",
    )  # fmt: skip
    vgg19.add_argument(
        "--layers", type=_names, default=["1", "2", "3", "4", "8", "12", "16"], metavar="L,L,...", help="numbers of "
        "convolutions, from 1 to 16, or names such as features.34 (default: 1,2,3,4,8,12,16)",
    )  # fmt: skip
    vgg19.add_argument("--size", type=_positive, default=224, metavar="PIXELS", help="cut the images to squares of "
                       "this size (default: %(default)s)")  # fmt: skip
    vgg19.add_argument("--inits", type=_positive, default=3, metavar="N", help="random initialisations "
                       "(default: %(default)s)")  # fmt: skip
    vgg19.add_argument("--optimizer", choices=("lbfgs", "adam"), default="lbfgs", help="(default: %(default)s)")
    vgg19.add_argument("--max-iter", type=_positive, default=200, metavar="N", help="steps of descent "
                       "(default: %(default)s)")  # fmt: skip
    vgg19.add_argument("--tv-weight", type=float, default=0.0, metavar="X", help="weight of the total variation, which "
                       "smooths what is rebuilt (default: %(default)s)")  # fmt: skip
    vgg19.add_argument("--device", metavar="D", help="where to compute, e.g. cuda (default: the processor)")
    vgg19.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.html, vgg19.json and the figures here, and keep finished "
        "networks, so that a run that was stopped goes on"
    )  # fmt: skip
    vgg19.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the random weights, counted up "
                       "from here, and of the starts (default: %(default)s)")  # fmt: skip
    vgg19.add_argument("--quiet", action="store_true", help="no progress and no tables")
    vgg19.set_defaults(run=_vgg19)


def _add_recommend(commands: Any) -> None:
    recommend = commands.add_parser(
        "recommend",
        help="advise on a network and data of your own",
        description="Advise which layers of a network to retrain for unknown data, and which to keep frozen.",
    )
    recommend.add_argument(
        "model", metavar="MODEL", help="module:callable or file.py:callable, called without arguments; timm:NAME; "
        "torchvision:NAME; or hf:NAME, a name or a folder",
    )  # fmt: skip
    for name, what in (("known", "knows"), ("unknown", "does not know")):
        recommend.add_argument(
            f"--{name}", type=Path, required=True, metavar="PATH", help=f"data that the model {what}: a .npz file with "
            "arrays X and y, a folder with one folder of images for each class, or a folder saved by datasets",
        )  # fmt: skip
    recommend.add_argument("--weights", metavar="W", help="a file with the model's state dict, or random (default: the "
                           "library's pretrained weights, or the model as it comes)")  # fmt: skip
    recommend.add_argument("--samples", type=_positive, metavar="N", help="take at most so many samples of each class")
    recommend.add_argument("--image-size", type=_positive, metavar="PIXELS", help="for images and a model of your own: "
                           "cut them to squares of this size, with values from 0 to 1")  # fmt: skip
    recommend.add_argument("--layers", type=_names, metavar="L,L,...", help="names or patterns of the layers to "
                           "measure (default: found by themselves)")  # fmt: skip
    recommend.add_argument("--head", metavar="NAME", help="the module that produces the output")
    recommend.add_argument("--input-layer", metavar="NAME", help="the module whose output stands for the input, such "
                           "as an embedding")  # fmt: skip
    recommend.add_argument("--budget", type=_budget, metavar="B", help="the most that may be trained, as shares of "
                           "everything: parameters=0.2, backward=0.5 or both with a comma")  # fmt: skip
    recommend.add_argument("--groups", metavar="NAME", help="the array, or the column, that tells what each sample is "
                           "a part of, such as a video: near copies foretell each other")  # fmt: skip
    recommend.add_argument("--trial", action="store_true", help="try the forecast's choice out: train by it, by the "
                           "head alone and by everything, on a part of the unknown data")  # fmt: skip
    recommend.add_argument("--trial-steps", type=_positive, metavar="N", help="of each such training (default: 300)")
    recommend.add_argument("--estimators", type=_names, metavar="E,E,...", help="what decides instead of the forecast: "
                           "spread, tangent, probe, inverter")  # fmt: skip
    recommend.add_argument("--threshold", type=float, metavar="NATS", help="the need from which a layer is to be "
                           "retrained, where needs decide")  # fmt: skip
    recommend.add_argument("--batch-size", type=_positive, metavar="N")
    recommend.add_argument("--device", metavar="D", help="where to compute, e.g. cuda (default: the processor)")
    recommend.add_argument("--seed", type=_seed, default=0, metavar="S", help="(default: %(default)s)")
    recommend.add_argument("--format", choices=("table", "json"), default="table", help="of what is printed: json is "
                           "the document that is saved (default: %(default)s)")  # fmt: skip
    recommend.add_argument("--out", type=Path, metavar="DIR", help="write advice.json here, and advice.html if the "
                           "extra report is installed")  # fmt: skip
    recommend.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep finished parts here, so that the same "
                           "command goes on after an interruption")  # fmt: skip
    recommend.add_argument("--force", action="store_true", help="write over advice that is in DIR already")
    recommend.add_argument("--quiet", action="store_true", help="no progress and no messages")
    recommend.add_argument("--debug", action="store_true", help="print the traceback of an error")
    recommend.set_defaults(run=_recommend)


def _budget(text: str) -> dict[str, float]:
    with suppress(ValueError):
        budget = {name.strip(): float(share) for name, share in (part.split("=") for part in text.split(","))}
        if set(budget) <= {"parameters", "backward"} and all(0 < share <= 1 for share in budget.values()):
            return budget
    raise argparse.ArgumentTypeError(
        f"must be like parameters=0.2 or parameters=0.2,backward=0.5, shares above 0 and at most 1; got {text}"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _seed(text: str) -> int:
    if text.isdecimal() and int(text) > _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be at most {_LARGEST_SEED}; got {text}")
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text}")
    return int(text)


def _mnist(options: argparse.Namespace) -> int:
    if options.mnist_folder is not None and not options.full:
        raise InvalidDataError(
            "--mnist-folder is for --full, which was not given. Add --full, or leave --mnist-folder out."
        )
    from retrainscope.studies.mnist.run import run_study, write_study
    from retrainscope.studies.mnist.tables import tables

    study = run_study(
        seeds=range(options.seed, options.seed + options.seeds),
        full=options.full,
        mnist_folder=options.mnist_folder,
        out=options.out,
        progress=False if options.quiet else None,
        say=_say(options),
    )
    if not options.quiet:
        print(study.results[0].advice)
        for table in tables(study.results).values():
            print(f"\n{table}")
    if options.out is not None:
        print(f"\nReport: {write_study(study, options.out).resolve()}")
    return 0


def _vgg19(options: argparse.Namespace) -> int:
    from retrainscope.studies.vgg19.run import run_study, tables, write_study

    study = run_study(
        weights=options.weights,
        images=options.images,
        layers=options.layers,
        size=options.size,
        n_inits=options.inits,
        descent=Descent(options.optimizer, max_iter=options.max_iter, tv_weight=options.tv_weight),
        seed=options.seed,
        device=options.device,
        out=options.out,
        progress=False if options.quiet else None,
        say=_say(options),
    )
    if not options.quiet:
        for table in tables(study):
            print(f"{table}\n")
    if options.out is not None:
        print(f"Report: {write_study(study, options.out).resolve()}")
    return 0


def _recommend(options: argparse.Namespace) -> int:
    from retrainscope.commands.recommend import run

    return run(options)


def _say(options: argparse.Namespace) -> Callable[[str], None]:
    def say(what: str) -> None:
        if not options.quiet:
            print(what, file=sys.stderr, flush=True)

    return say
