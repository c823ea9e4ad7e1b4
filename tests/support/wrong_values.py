"""Values of wrong kinds for settings and for columns of data, as files of other tools and typing errors hold them."""

import copy
import datetime
import math
from collections.abc import Iterator
from typing import Any

WRONG_VALUES: tuple[Any, ...] = (
    "", " ", "text", "1e-3", "12", "true", "auto", "x" * 300, "a\0b", "~nobody-here/x", "\ud800",
    0, 1, -1, 3, 10**30, -(10**30), 0.5, -0.5, 1e-30, 1e300, math.nan, math.inf, -math.inf,
    True, False, None,
    [], [1], ["a"], [None], [0.9, 0.999], [[1]], {}, {"a": 1}, {1: 2}, {"a": {"b": None}},
    datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1, 12, 30), b"bytes",
)  # fmt: skip


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each mapping and of each value in it, without the root."""
    if path:
        yield path
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))


def with_value(node: dict, path: tuple[Any, ...], value: Any) -> dict:
    """Return a copy of nested mappings with another value at a path."""
    changed = copy.deepcopy(node)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(value)
    return changed


# A DeepSpeed config with a valid value for keys of every section, which a run with a scheduler takes.
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dump_state": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "communication_data_type": "fp32",
    "seq_parallel_communication_data_type": "fp32",
    "gradient_allreduce_op": "mean",
    "disable_allgather": False,
    "disable_python_gc": False,
    "dataloader_drop_last": False,
    "log_level": None,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": True,
    "vocabulary_size": None,
    "use_node_local_storage": False,
    "use_data_before_expert_parallelism": False,
    "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-08, "weight_decay": 0.0, "amsgrad": False},
        "legacy_fusion": False,
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 4,
            "warmup_min_lr": 0.0001,
            "warmup_max_lr": 0.001,
            "warmup_num_steps": 2,
            "warmup_type": "linear",
        },
    },
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500000,
        "allgather_partitions": True,
        "allgather_bucket_size": 500000,
        "overlap_comm": True,
        "sub_group_size": 1000000000,
        "stage3_max_live_parameters": 1000000000,
        "stage3_max_reuse_distance": 1000000000,
        "stage3_prefetch_bucket_size": 50000,
        "stage3_param_persistence_threshold": 1000,
        "stage3_gather_16bit_weights_on_model_save": True,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "offload_optimizer": {
            "device": "none",
            "pin_memory": True,
            "buffer_count": 4,
            "fast_init": False,
            "ratio": 1.0,
        },
        "offload_param": {"device": "none", "buffer_size": 100000000, "max_in_cpu": 1000000000},
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "leaf_module": {"classes": [], "names": []},
    },
    "bf16": {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": False},
    "fp16": {
        "enabled": False,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "auto_cast": False,
        "consecutive_hysteresis": False,
    },
    "aio": {
        "block_size": 1048576,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
        "use_gds": False,
    },
    "activation_checkpointing": {
        "partition_activations": False,
        "number_checkpoints": None,
        "contiguous_memory_optimization": False,
        "cpu_checkpointing": False,
        "profile": False,
        "synchronize_checkpoint_boundary": False,
    },
    "flops_profiler": {
        "enabled": False,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 1,
        "detailed": True,
        "output_file": None,
        "recompute_fwd_factor": 0.0,
    },
    "tensorboard": {"enabled": False, "output_path": "", "job_name": "x"},
    "csv_monitor": {"enabled": False, "output_path": "", "job_name": "x"},
    "wandb": {"enabled": False, "group": None, "team": None, "project": "x"},
    "comet": {"enabled": False, "samples_log_interval": 100},
    "comms_logger": {"enabled": False, "verbose": False, "prof_all": False, "debug": False, "prof_ops": []},
    "data_types": {"grad_accum_dtype": "fp32"},
    "checkpoint": {
        "tag_validation": "Warn",
        "load_universal": False,
        "use_node_local_storage": False,
        "parallel_write": {"pipeline_stage": False},
    },
    "timers": {"throughput": {"enabled": True, "synchronized": True}},
    "hybrid_engine": {"enabled": False, "max_out_tokens": 512},
    "compile": {"deepcompile": False},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    "tensor_parallel": {"autotp_size": 0},
    "weight_quantization": {"enabled": True},
    "hift": {
        "layers_per_block": 1,
        "strategy": "bottom2up",
        "seed": 0,
        "steps_per_block": 1,
        "freeze": [],
        "max_block_numel": None,
        "balance": False,
        "offload": {
            "device": "cpu",
            "step": "auto",
            "buffer_size": 67108864,
            "pin_memory": True,
            "prefetch": True,
            "defer": "auto",
            "nvme_path": None,
            "nvme": "all",
        },
    },
}
