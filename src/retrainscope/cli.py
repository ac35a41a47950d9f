"""The ``retrainscope`` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from retrainscope.exceptions import InvalidDataError, RetrainscopeError

__all__ = ["main"]


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
        kept = "finished seeds are kept" if options.out else "nothing is kept without --out"
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
    mnist.add_argument("--seed", type=_natural, default=0, metavar="S", help="the first seed (default: %(default)s)")
    mnist.add_argument("--seeds", type=_positive, default=3, metavar="N", help="how many seeds (default: %(default)s)")
    mnist.add_argument(
        "--full", action="store_true", help="use all of MNIST; fetched from OpenML without --mnist-folder"
    )
    mnist.add_argument("--mnist-folder", type=Path, metavar="DIR", help="the standard IDX files, for --full")
    mnist.add_argument("--quiet", action="store_true", help="no progress and no tables")
    mnist.set_defaults(run=_mnist)
    return parser


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text}")
    return int(text)


def _mnist(options: argparse.Namespace) -> int:
    if options.mnist_folder is not None and not options.full:
        raise InvalidDataError("--mnist-folder is for --full, which was not given. Give both or neither.")
    from retrainscope.studies.mnist.run import run_study, write_study
    from retrainscope.studies.mnist.tables import tables

    def say(what: str) -> None:
        if not options.quiet:
            print(what, file=sys.stderr, flush=True)

    study = run_study(
        seeds=range(options.seed, options.seed + options.seeds),
        full=options.full,
        mnist_folder=options.mnist_folder,
        out=options.out,
        progress=False if options.quiet else None,
        say=say,
    )
    if not options.quiet:
        print(study.results[0].advice)
        for table in tables(study.results).values():
            print(f"\n{table}")
    if options.out is not None:
        print(f"\nReport: {write_study(study, options.out).resolve()}")
    return 0
