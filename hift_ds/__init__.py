"""HiFT: full-parameter fine-tuning one block of layers at a time, on DeepSpeed.

Python imports the module of a public name when a program first uses the name. ``import hift_ds`` therefore loads
neither PyTorch nor DeepSpeed nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hift_ds.blocks.block import Block
    from hift_ds.blocks.partition import partition_model
    from hift_ds.blocks.schedule import BlockSchedule
    from hift_ds.config import ConfigError, HiFTConfig
    from hift_ds.engine import HiFTEngine
    from hift_ds.initialization import initialize
    from hift_ds.integrations.callback import HiFTCallback
    from hift_ds.integrations.interception import enabled
    from hift_ds.model.activations import checkpoint_activations
    from hift_ds.model.reach import freeze_patterns, unreached_parameters
    from hift_ds.optim.mezo import MeZO
    from hift_ds.planner.api import plan_memory

__version__ = "0.1.0"
__all__ = [
    "Block",
    "BlockSchedule",
    "ConfigError",
    "HiFTCallback",
    "HiFTConfig",
    "HiFTEngine",
    "MeZO",
    "checkpoint_activations",
    "enabled",
    "freeze_patterns",
    "initialize",
    "partition_model",
    "plan_memory",
    "unreached_parameters",
]
_MODULES = {
    "Block": "hift_ds.blocks.block",
    "BlockSchedule": "hift_ds.blocks.schedule",
    "ConfigError": "hift_ds.config",
    "HiFTCallback": "hift_ds.integrations.callback",
    "HiFTConfig": "hift_ds.config",
    "HiFTEngine": "hift_ds.engine",
    "MeZO": "hift_ds.optim.mezo",
    "checkpoint_activations": "hift_ds.model.activations",
    "enabled": "hift_ds.integrations.interception",
    "freeze_patterns": "hift_ds.model.reach",
    "initialize": "hift_ds.initialization",
    "partition_model": "hift_ds.blocks.partition",
    "plan_memory": "hift_ds.planner.api",
    "unreached_parameters": "hift_ds.model.reach",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
