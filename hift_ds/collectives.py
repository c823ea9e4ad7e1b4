"""Values and errors exchanged between all ranks. Without torch.distributed, one process counts as the only rank."""

from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed import comm as dist

_T = TypeVar("_T")


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: _T) -> list[_T]:
    """Return every rank's value, in order of the ranks. All ranks call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(
    action: Callable[[], _T], expected: type[Exception] | tuple[type[Exception], ...]
) -> tuple[list[_T], dict[int, str]]:
    """Run an action on every rank, and exchange the results and errors. All ranks call it.

    Args:
        action: what this rank does. It must not contain a collective, which an error on one rank would leave waiting.
        expected: the errors to exchange. Others are raised on this rank alone.

    Returns:
        The results of all ranks (None where the action failed), and the message of each rank where it failed.
    """
    result, problem = None, None
    try:
        result = action()
    except expected as error:
        problem = str(error)
    outcomes: list[Any] = gather((result, problem))
    return [value for value, _ in outcomes], {i: text for i, (_, text) in enumerate(outcomes) if text is not None}
