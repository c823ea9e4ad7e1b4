"""The keys of a DeepSpeed config and the types of their values, for the sections that DeepSpeed takes unchecked.

Sections that DeepSpeed checks with a model of its own are a `dict` here; `library_checks.py` reads their keys and types
from that model.
"""

from __future__ import annotations

from typing import Annotated, Any

COUNT = Annotated[int, {"at_least": 1}]
NOT_NEGATIVE = Annotated[float, {"at_least": 0}]
DTYPES = ("bf16", "fp16", "fp32", "bfloat16", "float16", "float32")
_DTYPE = Annotated[str | None, {"choices": DTYPES}]

# The top-level keys that DeepSpeed 0.19 reads. It silently ignores all others, so a misspelled "zero_optimisation"
# would train at stage 0.
KEYS: dict[str, Any] = {
    "activation_checkpointing": {
        "partition_activations": bool,
        "contiguous_memory_optimization": bool,
        "cpu_checkpointing": bool,
        "number_checkpoints": Annotated[int | None, {"at_least": 1}],
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
    },
    "aio": {
        "block_size": COUNT,
        "queue_depth": COUNT,
        "intra_op_parallelism": COUNT,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "autotuning": dict,
    "bf16": dict,
    "bfloat16": dict,
    "checkpoint": {
        "tag_validation": str,
        "load_universal": bool,
        "use_node_local_storage": bool,
        "parallel_write": {"pipeline_stage": bool},
        "checkpoint_serialization": bool,
        "writer": {
            "type": str,
            "decoupled": bool,
            "io_buffer_size": COUNT,
            "io_buffer_double": bool,
            "show_statistics": bool,
            "data_parallel": str | None,
            "io_multiplier": COUNT,
        },
    },
    "comet": dict,
    "comms_logger": dict,
    "communication_data_type": Annotated[str | None, {"choices": ("bf16", "fp16", "fp32")}],
    "compile": dict,
    "csv_monitor": dict,
    "data_efficiency": dict,
    "data_types": {
        "grad_accum_dtype": _DTYPE,
        "param_dtype": _DTYPE,
        "buffer_dtype": _DTYPE,
        "keep_in_fp32_modules": str | list[str],
    },
    "dataloader_drop_last": bool,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dump_state": bool,
    "expert_parallel": dict,
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": NOT_NEGATIVE,
        "profile_step": COUNT,
        "module_depth": Annotated[int, {"at_least": -1}],
        "top_modules": COUNT,
        "detailed": bool,
        "output_file": str | None,
    },
    "fp16": dict,
    "gradient_accumulation_steps": COUNT,
    "gradient_allreduce_op": Annotated[str, {"choices": ("mean", "sum")}],
    "gradient_clipping": NOT_NEGATIVE,
    "gradient_predivide_factor": Annotated[float, {"above": 0}],
    "hift": dict,
    "hybrid_engine": dict,
    "log_level": Annotated[str | None, {"choices": ("debug", "info", "warning", "error", "critical")}],
    "managed_gradient_accumulation": bool,
    "memory_breakdown": bool,
    "optimizer": {"type": str, "params": dict, "legacy_fusion": bool},
    "pipeline": dict,
    "prescale_gradients": bool,
    "scheduler": {"type": str, "params": dict},
    "seq_parallel_communication_data_type": Annotated[str, {"choices": ("bf16", "fp16", "fp32")}],
    "sequence_parallel_size": Annotated[int, {"choices": (1,)}],
    "steps_per_print": Annotated[int | None, {"at_least": 1}],
    "tensor_parallel": dict,
    "tensorboard": dict,
    "timers": {"throughput": dict},
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list[str]},
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "use_data_before_expert_parallelism": bool,
    "use_node_local_storage": bool,
    "vocabulary_size": Annotated[int | None, {"at_least": 1}],
    "wall_clock_breakdown": bool,
    "wandb": dict,
    "weight_quantization": dict,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "zero_optimization": dict,
}

# Sections of features that this program never starts. Switched off, they are harmless and left out.
NOT_STARTED = {
    "autotuning": "DeepSpeed's launcher runs it (deepspeed --autotuning)",
    "data_efficiency": "it belongs to DeepSpeed's data loader, and the `data` section decides about the data",
    "pipeline": "it is for pipeline models",
}

# Files and folders that DeepSpeed writes.
WRITTEN = ("tensorboard.output_path", "csv_monitor.output_path", "flops_profiler.output_file")
