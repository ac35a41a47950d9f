"""Several processes under torch.distributed that work side by side on shares of the data, and tell each other."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from retrainscope import exceptions
from retrainscope.checks import reason_of
from retrainscope.exceptions import InvalidDataError, ProcessError, RetrainscopeError

__all__ = [
    "agree",
    "digest_of",
    "digests_of_model",
    "from_first",
    "gather",
    "in_step",
    "in_turns",
    "n_processes",
    "rank",
]

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = timedelta(minutes=1)  # with processes that have not made the call
_LONGEST = timedelta(
    days=1
)  # that one may take for its part, such as a trial of a sweep; one that ends is missed at once

_depth = 0  # of `in_step`
_meetings = 0
_made: tuple[Any, Any] | None = None  # the group of all processes, and ours of the same for tensors on the CPU


def n_processes() -> int:
    """Return how many processes there are: 1 where ``torch.distributed.init_process_group`` was not called."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if n_processes() > 1 else 0


@contextmanager
def in_step() -> Iterator[None]:
    """Let all processes do the same, or all raise an error; may be nested.

    One that fails tells the others the next time that they `gather`, at the latest when they are done with the
    context. They raise an error of the same kind if it is one of this library's, which names the process that failed.

    Raises
    ------
    ProcessError
        If another process does not come here within a minute, fails with an error of others, or is lost.
    """
    global _depth
    if n_processes() == 1:
        yield
        return
    if _depth == 0:
        _meet()
    _depth += 1
    try:
        yield
        gather("the end", None)
    except Exception as error:
        if not vars(error).get("_told", False):
            with suppress(RetrainscopeError):  # others may have failed too; this one's own error is what to raise
                _exchange("an error", None, (type(error).__name__, reason_of(error)))
            vars(error)["_told"] = True
        if _depth == 1:  # the same error may be raised another time
            vars(error).pop("_told")
        raise
    except BaseException:  # as Ctrl-C, after which nothing more is told
        _leave()
        raise
    finally:
        _depth -= 1


def gather(what: str, mine: T) -> list[T]:
    """Return what all processes have, in their order; in `in_step`.

    Parameters
    ----------
    what : str
        The same in all processes, or they are at different places.
    mine : picklable

    Raises
    ------
    RetrainscopeError
        If another process failed, was ended, or is elsewhere.
    """
    return [mine] if n_processes() == 1 else _exchange(what, mine, None)


def from_first(what: str, mine: T) -> T:
    """Return what process 0 has."""
    return gather(what, mine if rank() == 0 else None)[0]  # type: ignore[return-value]


def in_turns(what: str, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """Yield what the work on each item returns, in their order; the processes take the items in turn.

    Parameters
    ----------
    what : str
    items : iterable
        The same in all processes.
    work : callable (item) -> picklable
        Must not gather.
    """
    left = iter(items)
    while some := list(islice(left, n_processes())):
        done = [work(some[rank()])] if rank() < len(some) else []
        for each in gather(what, done):
            yield from each


def agree(what: Mapping[str, str]) -> None:
    """Refuse what must be the same in all processes and is not; to be called by all of them alike.

    Parameters
    ----------
    what : mapping of str to str
        By the name in the message; best short, as digests are.
    """
    found = gather(f"the comparison of {next(iter(what))}", dict(what))
    names = list(dict.fromkeys(name for one in found for name in one))
    unlike = [name for name in names if len({one.get(name) for one in found}) > 1]
    if not unlike:
        return
    ranks: dict[str, list[int]] = {}
    for number, one in enumerate(found):
        ranks.setdefault(one.get(unlike[0], "missing"), []).append(number)
    told = "; ".join(f"{value} in process {', '.join(map(str, some))}" for value, some in ranks.items())
    more = f" and in {len(unlike) - 1} more" if len(unlike) > 1 else ""
    buffers = unlike[0].startswith("buffer")
    remedy = (
        "Batch statistics drift apart in training: copy those of process 0 with torch.distributed.broadcast."
        if buffers
        else "Give every process the same; what is drawn at random (weights, splits, augmentation) needs one seed."
    )
    raise InvalidDataError(f"The processes differ in: {unlike[0]} ({told}){more}. {remedy}")


def digest_of(tensors: Iterable[Tensor], *others: Any) -> str:
    """Return a few letters that tell tensors apart, and what else there is by its text."""
    digest = hashlib.sha256(repr(others).encode())
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        for part in _dense_parts(tensor.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout == torch.strided:
        return [tensor]
    sparse = tensor.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
    return [sparse.indices(), sparse.values()]


def digests_of_model(model: nn.Module) -> dict[str, str]:
    """Return digests of a model's parameters and buffers for `agree`; nothing in one process.

    Of parameters that are split among the processes the shape and type alone.
    """
    if n_processes() == 1:
        return {}

    def digest(tensor: Tensor) -> str:  # of a DTensor each process has another piece
        pieces = type(tensor.detach()) is not Tensor
        return digest_of([], tuple(tensor.shape), tensor.dtype) if pieces else digest_of([tensor])

    parameters = {f"parameter {name!r}": digest(p) for name, p in model.named_parameters()}
    return parameters | {f"buffer {name!r}": digest(b) for name, b in model.named_buffers()}


def _exchange(what: str, mine: Any, error: tuple[str, str] | None) -> list[Any]:
    """Tell the others a result or an error; return their results."""
    try:
        return _exchanged(what, mine, error)
    except RetrainscopeError as known:
        vars(known)["_told"] = True  # all processes know of it
        raise


def _exchanged(what: str, mine: Any, error: tuple[str, str] | None) -> list[Any]:
    found: list[Any] = [None] * n_processes()
    try:
        distributed.all_gather_object(found, (what, mine, error), group=_group())
    except RuntimeError as lost:
        _leave()
        raise ProcessError(
            f"Process {rank()} lost touch with the others. Most likely one of them was ended from outside, was "
            "interrupted or ran out of memory: see what it wrote last."
        ) from lost
    for number, (_, _, other) in enumerate(found):
        if other is not None:
            name, text = other
            kind: type[RetrainscopeError] | None = getattr(exceptions, name, None)
            if kind is None:
                raise ProcessError(f"Process {number} failed: {name}: {text}")
            raise kind(f"Process {number} failed: {text}")
    places = [place for place, _, _ in found]
    if len(set(places)) > 1:
        told = ", ".join(f"process {number} is at {place!r}" for number, place in enumerate(places))
        raise ProcessError(
            f"The processes have come apart: {told}. Make the same calls with the same data in every process."
        )
    return [value for _, value, _ in found]


def _meet() -> None:
    """Wait for the other processes, where nobody would wait for long in vain."""
    global _meetings
    store = distributed.distributed_c10d._get_default_store()
    names = [f"retrainscope/{_meetings}/{number}" for number in range(n_processes())]
    try:
        store.set(names[rank()], "here")
        store.wait(names, _PATIENCE)
    except RuntimeError as late:
        missing = [str(number) for number, name in enumerate(names) if not store.check([name])]
        store.delete_key(names[rank()])  # so that they can meet another time
        raise ProcessError(
            f"Process {rank()} has waited for {_PATIENCE.total_seconds():.0f} seconds, and process "
            f"{', '.join(missing) or 'another'} has not made the same call. Make it in all processes, not under `if "
            "rank == 0`; where some of them take longer to get there, let all wait at a torch.distributed.barrier()."
        ) from late
    if _meetings:
        store.delete_key(f"retrainscope/{_meetings - 1}/{rank()}")  # which all have left
    _meetings += 1


def _group() -> Any:
    """Return a group of all processes that takes tensors on the CPU, made once: the user's may be NCCL's."""
    global _made
    world = distributed.group.WORLD
    if _made is None or _made[0] is not world:
        _made = world, distributed.new_group(backend="gloo", timeout=_LONGEST)
    return _made[1]


def _leave() -> None:
    """Close the connections to the others, so that those who wait for this process learn that one is lost."""
    global _made
    if _made is not None:
        group, _made = _made[1], None
        distributed.destroy_process_group(group)
