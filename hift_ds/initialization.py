"""``hift_ds.initialize``: how an engine is made from a model and a config."""

from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

from hift_ds import config as hift_config
from hift_ds.engine import CheckpointingEngine, HiFTEngine


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with HiFT: the same arguments and the same four results.

    Args:
        config: a DeepSpeed config, as a dict or as the path of a JSON file, with one more section, ``hift``
            (:class:`hift_ds.config.HiFTConfig`). Without this section its defaults apply. With ``enabled: false``, this
            function does the same as ``deepspeed.initialize``.
        model: the module to train. Parameters that do not require a gradient stay frozen.

    Returns:
        engine, optimizer, training_dataloader, lr_scheduler.

    Raises:
        hift_ds.config.ConfigError: (a ValueError) lists every problem of the ``hift`` section and of its combination
            with the rest of the config. It is raised before anything is built.
        ValueError: the model cannot be cut into blocks as configured, or the optimizer cannot be used with them.
        RuntimeError: the environment names no rank, and there is no MPI.
    """
    config = hift_config.read(config if config is not None else config_params or getattr(args, "deepspeed_config", {}))
    problems = hift_config.problems(config)
    if isinstance(model, deepspeed.PipelineModule):
        problems.append("model is a PipelineModule, which needs DeepSpeed's pipeline engine; pass a plain module")
    if mesh_param is not None:
        problems.append(f"mesh_param={mesh_param!r} cannot be combined with HiFT; leave it out")
    hift = hift_config.HiFTConfig.from_dict(config.pop(hift_config.SECTION, None)) if not problems else None
    arguments = {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "config": config,
    }
    if hift is not None and not hift.enabled:
        made = deepspeed.initialize(**arguments, distributed_port=distributed_port, mesh_param=mesh_param)
        CheckpointingEngine.take_over(made[0])
        return made
    if hift is None or problems:
        raise hift_config.ConfigError(problems)
    if model is None:
        raise ValueError("model=None: hift_ds.initialize needs a model")
    # The rest repeats `deepspeed.initialize`, which has no argument for the engine's class.
    deepspeed.zero.partition_parameters.shutdown_init_context()
    try:
        dist.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            distributed_port=distributed_port,
            dist_init_required=dist_init_required,
        )
    except ModuleNotFoundError as error:
        if error.name != "mpi4py":
            raise
        raise RuntimeError(
            "the environment names no rank, so DeepSpeed tried MPI: start the script with DeepSpeed's launcher, "
            "e.g. deepspeed --num_gpus 1 script.py"
        ) from None
    engine = HiFTEngine(hift=hift, **arguments)
    deepspeed.zero.partition_parameters.restore_init_context()
    return engine, engine.block_optimizers, engine.training_dataloader, engine.lr_scheduler
