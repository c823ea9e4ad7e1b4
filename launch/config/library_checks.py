"""The second stage of checking settings: checks by transformers and DeepSpeed, whose import takes seconds."""

from __future__ import annotations

from hift_ds.launch.config.checking import problem_list
from hift_ds.launch.config.deepspeed_section import fill_in
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.settings import config_problems


def check_with_libraries(settings: Settings, source: str) -> None:
    """Check `model.config` with transformers and the deepspeed section with DeepSpeed. Nothing is loaded or written.

    Args:
        settings: from `hift_ds.launch.config.settings.load_settings`.
        source: origin of the settings, for the message (see `hift_ds.launch.config.reading.source`).

    Raises:
        UserError: with every problem found, one line each.
    """
    if problems := library_problems(settings):
        raise UserError(problem_list(source, problems))


def library_problems(settings: Settings) -> list[str]:
    """Return the problems that transformers, DeepSpeed and torch find, one line each."""
    from hift_ds.launch.config.deepspeed_trial import deepspeed_problems  # loads the engine

    found = [] if settings.model.config is None else config_problems(settings.model.config)
    # What depends on the model is not known yet; any numbers will do for the check.
    filled = fill_in(settings.deepspeed, settings.training, hidden_size=64, ticks=settings.training.max_steps or 1)
    return found + deepspeed_problems(filled)
