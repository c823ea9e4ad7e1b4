"""HiFT: full-parameter fine-tuning one block of layers at a time, on DeepSpeed."""

from hift_ds.blocks import Block, partition_model
from hift_ds.config import ConfigError, HiFTConfig
from hift_ds.engine import HiFTEngine, initialize
from hift_ds.schedule import BlockSchedule

__version__ = "0.1.0"
__all__ = [
    "Block",
    "BlockSchedule",
    "ConfigError",
    "HiFTConfig",
    "HiFTEngine",
    "initialize",
    "partition_model",
]
