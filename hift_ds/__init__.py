"""HiFT: full-parameter fine-tuning one block of layers at a time, on DeepSpeed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hift_ds.blocks.partition import Block, partition_model
from hift_ds.blocks.schedule import BlockSchedule
from hift_ds.config import ConfigError, HiFTConfig
from hift_ds.model.activations import checkpoint_activations

if TYPE_CHECKING:
    from hift_ds.engine import HiFTEngine, initialize
    from hift_ds.optim.mezo import MeZO
    from hift_ds.planner.command import plan_memory

__version__ = "0.1.0"
__all__ = [
    "Block",
    "BlockSchedule",
    "ConfigError",
    "HiFTConfig",
    "HiFTEngine",
    "MeZO",
    "checkpoint_activations",
    "initialize",
    "partition_model",
    "plan_memory",
]
# Loaded when they are asked for: a plan needs no DeepSpeed, and a run needs no planner.
_LATER = {
    "HiFTEngine": "hift_ds.engine",
    "MeZO": "hift_ds.optim.mezo",
    "initialize": "hift_ds.engine",
    "plan_memory": "hift_ds.planner.command",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
