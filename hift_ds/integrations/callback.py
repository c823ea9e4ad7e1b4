"""``hift_ds.HiFTCallback``: HiFT in one Trainer of transformers."""

import weakref
from typing import Any

from accelerate.state import AcceleratorState
from transformers.trainer_callback import TrainerCallback

from hift_ds import config as hift_config
from hift_ds.integrations.interception import Interception
from hift_ds.integrations.messages import NO_ENGINE


class HiFTCallback(TrainerCallback):
    """Trains the model of one Trainer with HiFT: ``Trainer(..., callbacks=[HiFTCallback(layers_per_block=1)])``.

    It does what :func:`hift_ds.enabled` does, for the engines of the model that the Trainer is made with, and as long
    as the Trainer lives. With ``model_init``, ``train()`` makes another model and raises a RuntimeError: use
    :func:`hift_ds.enabled` there.

    Args:
        section: keys of the config section ``hift`` (:class:`hift_ds.config.HiFTConfig`). Here, ``lr_ticks`` is
            ``"step"`` by default. Keys of a ``hift`` section in the DeepSpeed config replace these.

    Raises:
        hift_ds.config.ConfigError: (a ValueError) lists every problem of ``section``.
        RuntimeError: the Trainer does not use DeepSpeed.
    """

    def __init__(self, **section: Any):
        if problems := hift_config.section_problems(section):
            raise hift_config.ConfigError(problems)
        self._section = section

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Turn HiFT on for the Trainer's model."""
        if AcceleratorState().deepspeed_plugin is None:
            raise RuntimeError(f"HiFTCallback: {NO_ENGINE}")
        interception = Interception(self._section, model)
        weakref.finalize(self, interception.close)
