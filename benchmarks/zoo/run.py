"""Does the library work on the usual architectures? It builds them with random weights, and looks.

    python benchmarks/zoo/run.py [torchvision|timm|transformers ...] --out zoo.json [--only PATTERN] [--threads N]

Of torchvision every classifier, of timm the smallest of every family, of transformers every classifier of texts,
images and sounds that can be built small. Nothing is downloaded. The results are written after every model; a
second run goes on where the first one stopped. Needed is what requirements.txt beside this file lists.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import re
import resource
from collections import Counter
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from check import NAMES, Outcome, try_model
from tqdm import tqdm

OUTCOMES = ("works", "refused", "fails", "not built")
MOST_MEMORY = 14 * 2**30  # bytes of one model, so that what is too large fails alone
TO_END = 10  # seconds, to leave nothing behind
PACKAGES = ("torch", "torchvision", "timm", "transformers")
# A forked child has all of these at once, and gives all its memory back when it ends.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["retrainscope", "sklearn.base", "torch.utils.flop_counter", "torchvision", "timm", "transformers.modeling_utils"]
)

Results = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", choices=[*NAMES, []], metavar="LIBRARY", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=Path("zoo.json"), metavar="FILE")
    parser.add_argument("--only", default="", metavar="PATTERN", help="models whose library/name this is found in")
    parser.add_argument("--again", action="store_true", help="also those that are in the file already")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="of one model")
    args = parser.parse_args()
    libraries = args.libraries or list(NAMES)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    results: Results = json.loads(args.out.read_text())["models"] if args.out.exists() else {}
    models = [(library, name) for library in libraries for name in NAMES[library]()]
    models = [(library, name) for library, name in models if re.search(args.only, f"{library}/{name}")]
    left = [model for model in models if args.again or "/".join(model) not in results]
    with tqdm(left) as bar:
        for library, name in bar:
            key = f"{library}/{name}"
            bar.set_postfix_str(key)
            results[key] = asdict(try_apart(library, name, args.timeout, args.threads))
            write(args.out, results)
            if results[key]["outcome"] != "works":
                bar.write(f"{key}: {results[key]['outcome']}, {results[key]['reason']}")
    for library in libraries:
        print(line(library, [results[f"{library}/{name}"] for of, name in models if of == library]))


def try_apart(library: str, name: str, timeout: float, threads: int) -> Outcome:
    """Check a model in a process of its own, which may hang or die."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_try, args=(theirs, library, name, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            outcome: Outcome = ours.recv()
            process.join(TO_END)
            return outcome
        return Outcome("fails", f"not done after {timeout:g} seconds", seconds=timeout)
    except EOFError:
        process.join()
        return Outcome("fails", f"the process died with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _try(channel: Connection, library: str, name: str, threads: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    torch.set_num_threads(threads)
    channel.send(try_model(library, name))


def write(path: Path, results: Results) -> None:
    """Write all results at once, so that the file is whole whenever the run is stopped."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"versions": versions, "models": results}, indent=1) + "\n")
    part.replace(path)


def line(library: str, found: list[dict[str, Any]]) -> str:
    """Sum up a library in one line of a table."""
    counts = Counter(one["outcome"] for one in found)
    n_built = len(found) - counts["not built"]
    columns = [f"{n_built:4d} models", *(f"{counts[outcome]:4d} {outcome}" for outcome in OUTCOMES)]
    return f"{library:12s} {', '.join(columns)}, {sum(one['seconds'] for one in found):6.0f} seconds"


if __name__ == "__main__":
    main()
