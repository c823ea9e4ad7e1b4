"""Values and errors exchanged between all ranks. Without torch.distributed, one process counts as the only rank."""

from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed import comm as dist

from hift_ds.checkpoint.files import CheckpointError

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


def on_every_rank(what: str, action: Callable[[], _T]) -> list[_T]:
    """Run an action on every rank. All ranks call it.

    Args:
        what: a verb for the error message.
        action: what this rank does.

    Returns:
        The results of all ranks.

    Raises:
        CheckpointError: on every rank, if the action failed on any rank.
    """
    result, problem = None, None
    try:
        result = action()
    except Exception as error:
        problem = f"rank {rank()} could not {what} the checkpoint: {error}"
    outcomes = gather((result, problem))
    if problems := [text for _, text in outcomes if text is not None]:
        raise CheckpointError("\n".join(problems))
    return [value for value, _ in outcomes]  # type: ignore[misc]
