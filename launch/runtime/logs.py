"""What a run prints: plain text on rank 0, warnings, and fewer messages of the libraries."""

from __future__ import annotations

import sys
import warnings

import transformers
from deepspeed.utils.logging import set_log_level_from_string

from hift_ds.launch.config.credentials import redacted
from hift_ds.launch.config.settings import LoggingSettings


def say(rank: int, text: str) -> None:
    """Print a text on rank 0."""
    if rank == 0:
        print(text, flush=True)


def as_text(loss: float | None) -> str:
    """Return a loss as it is printed; None stands for one that is not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def warn(text: str) -> None:
    """Print a warning to standard error, with secrets removed."""
    print(f"warning: {redacted(text)}", file=sys.stderr, flush=True)


def quieten(settings: LoggingSettings, rank: int) -> None:
    """Show only warnings and errors of DeepSpeed and transformers, or everything with `logging.verbose`."""
    if settings.verbose:
        set_log_level_from_string("info")
    else:
        set_log_level_from_string("warning" if rank == 0 else "error")
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    if rank != 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
