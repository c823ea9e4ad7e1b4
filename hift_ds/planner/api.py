"""The planner as a Python function, :func:`plan_memory`, and the checks it shares with the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from hift_ds.config import ConfigError
from hift_ds.planner.plan import Plan, Planner, free_space
from hift_ds.planner.request import Request, is_count, parse_size
from hift_ds.planner.search import Fit, default_host_reserve
from hift_ds.planner.step_time import StepTimes
from hift_ds.planner.step_time import problems as step_time_problems

GIB = 2**30


def plan_memory(
    model: Any,
    *,
    gpu_memory: int | str | None = None,
    reserve: int | str | None = None,
    gpu: str | None = None,
    host_memory: int | str | None = None,
    **options: Any,
) -> Plan:
    """Plan the memory of a training run. No weights are read.

    Args:
        model: a preset (a key of ``hift_ds.planner.models.PRESETS``), a folder with a ``config.json``, such a file, a
            GGUF file, a Hub id, a mapping with a ``model_type``, or a transformers configuration.
        gpu_memory: bytes, or text such as ``24GiB``. The plan then also says whether the run fits, and what would.
        reserve: bytes, or text, of ``gpu_memory`` that stay free for what PyTorch does not count: the CUDA context,
            communication and fragmentation. See :func:`default_reserve`.
        host_memory: bytes, or text, of the memory of the machine, for use with ``gpu_memory``. The run must then fit
            there, too: state may be in 8 bits, or in files in ``nvme_path``, as far as there is free space in this
            folder, if it exists. With ``gpu``, the fastest change is named.
        gpu: a card, such as ``h200`` or ``4090`` (the keys of ``hift_ds.planner.timeline.CARDS``). The plan then also
            predicts the time of a step in ``Plan.time``: see :meth:`hift_ds.planner.step_time.StepTimes.answer`.
        method: ``hift`` (default), ``full`` (DeepSpeed without HiFT), ``lora`` (on PEFT's default layers) or ``mezo``.
        precision: ``fp32``; ``mixed``: 16-bit weights, and fp32 master weights of all blocks on the device;
            ``mixed-hi`` (default): fp32 master weights of the active block only (the paper's Mixed^Hi).
        optimizer: ``adamw`` (default), ``sgd``, ``sgdm``, ``adafactor``, ``adagrad`` or ``lion``. MeZO ignores it.
        batch_size: sequences in a micro-batch of one rank, by default 1.
        seq_len: tokens in each sequence, without padding, by default 512.
        layers_per_block, max_block_numel, balance: as in :func:`hift_ds.partition_model`.
        zero_stage: DeepSpeed's ZeRO stage, by default 2, or 0 for Adafactor.
        ranks: number of GPUs, by default 1. The plan holds the sizes of one rank.
        offload_device, offload_step, buffer_size, nvme_path, nvme, weights, master, moments: ``device``, ``step``,
            ``buffer_size``, ``nvme_path``, ``nvme``, ``weights``, ``master`` and ``moments`` of the section
            ``hift.offload``.
        offload_param: ``cpu``: at ZeRO-3, the weights wait in host memory; ``none`` (default).
        drive_read, drive_write: bytes a second of the drive with the files, by default 3e9 and 2e9.
        prefetch: bytes of all slots of the streamed step, as ``hift.offload.prefetch``; None: two slots.
        offload_optimizer: ``cpu``: the host runs the optimizer step; ``none`` (default).
        pin_memory: host memory is page-locked (default). Where it is not, copies are slower, and the host waits for
            each of them.
        activation_checkpointing: the backward pass recomputes layers.
        checkpoint_offload: activation checkpoints wait in host memory; implies ``activation_checkpointing``.
        loss_chunk: tokens in a chunk of logits, as ``training.loss_chunk`` of a run.
        gradient_accumulation_steps: micro-batches in a step, by default 1.
        layout: ``engine`` (default) or ``paper``, the accounting of the HiFT paper.
        accelerator: ``gpu`` (default) or ``cpu``: the device whose kernels run.
        attention: ``attn_implementation`` of transformers, ``sdpa`` or ``eager``; by default transformers' choice.
        task: ``causal-lm`` or ``sequence-classification``; by default the task of the configuration.
        lora_rank: rank of the LoRA adapters, by default 8.

    Returns:
        The plan of one rank, with all sizes in bytes.

    Raises:
        hift_ds.ConfigError: (a ValueError) with every problem of the arguments, each with a remedy.
    """
    names = [entry.name for entry in fields(Request)]
    unknown = [
        f"{key}={value!r} is an unknown argument; "
        + (f"did you mean {near[0]!r}? " if (near := difflib.get_close_matches(key, names, n=1)) else "")
        + f"known arguments: {', '.join(names)}, gpu_memory, reserve, gpu, host_memory"
        for key, value in options.items()
        if key not in names
    ]
    if unknown:
        raise ConfigError(unknown)
    planner, fit, times = prepare(Request(model, **options), gpu_memory, reserve, gpu, host_memory)
    plan = planner.plan(planner.request)
    plan = times.answer(plan) if times else plan
    return fit.answer(plan) if fit else plan


def default_reserve(gpu_memory: int) -> int:
    """Return the bytes to keep free: 1 GiB for the CUDA context and communication, and a twentieth for fragmentation.

    With 1 GiB alone, a run of LLaMA-7B on 24 GiB at the longest sequence of the plan ran out of memory (measured on an
    H200 whose allocator was limited to the remaining 23 GiB). No measurement shows that a twentieth is enough.
    """
    return 2**30 + gpu_memory // 20


def prepare(
    request: Request,
    gpu_memory: int | str | None,
    reserve: int | str | None,
    gpu: str | None = None,
    host_memory: int | str | None = None,
    found: Iterable[str] = (),
) -> tuple[Planner, Fit | None, StepTimes | None]:
    """Check a request and make its planner, the search for what fits, and the prediction of the step time.

    The last two are None without ``gpu_memory`` and without ``gpu``.

    Args:
        request: what to plan.
        gpu_memory: as in :func:`plan_memory`.
        reserve: as in :func:`plan_memory`.
        gpu: as in :func:`plan_memory`.
        host_memory: as in :func:`plan_memory`.
        found: problems that the caller has found.

    Raises:
        ConfigError: with ``found`` and every problem of the arguments.
    """
    found = [*found, *(step_time_problems(request, gpu) if gpu is not None else ())]
    planner, memory, kept, host, drive = None, 0, 0, None, None
    free = free_space(request.nvme_path)
    if host_memory is not None and request.offload_device != "nvme":
        request, drive = replace(request, nvme_path=None), request.nvme_path
    try:
        planner = Planner(request)
    except ConfigError as error:
        found += error.problems
    try:
        memory = parse_size("--gpu-memory", gpu_memory) if gpu_memory is not None else 0
    except ConfigError as error:
        found += error.problems
    if gpu_memory is not None and 0 < memory < 2**20:
        found.append(f"--gpu-memory={gpu_memory} is {memory} bytes, which is too small; did you mean {gpu_memory}GiB?")
        memory = 0
    try:
        kept = default_reserve(memory) if reserve is None else parse_size("--reserve", reserve)
    except ConfigError as error:
        found += error.problems
    try:
        host = parse_size("--host-memory", host_memory) if host_memory is not None else None
    except ConfigError as error:
        found += error.problems
    if gpu_memory is None and host_memory is not None:
        found.append(f"--host-memory={host_memory} has no effect without --gpu-memory; add it, or leave it out")
    elif host is not None and host <= (least := default_host_reserve(request.ranks if is_count(request.ranks) else 1)):
        found.append(
            f"--host-memory={host_memory}: expected more than the {least / GIB:g} GiB that stay free for the system "
            "and the processes; raise it"
        )
    if gpu_memory is None and reserve is not None:
        found.append(f"--reserve={reserve} has no effect without --gpu-memory; add it, or leave --reserve out")
    elif memory and kept >= memory:
        found.append(
            f"--gpu-memory={gpu_memory}: expected more than the {kept / GIB:.2f} GiB that stay free (--reserve); raise "
            "--gpu-memory, or lower --reserve"
        )
    if planner is None or found:
        raise ConfigError(found)
    times = StepTimes(planner, gpu) if gpu is not None else None
    return planner, Fit(planner, memory, kept, host, times, drive, free) if memory else None, times
