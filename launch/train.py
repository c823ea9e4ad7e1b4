"""Fine-tune a model with HiFT, or with another method (launch/methods/table.py).

    deepspeed [--num_gpus N] launch/train.py --config configs/NAME.yaml [--set KEY=VALUE]... [--resume [auto]]
    python launch/train.py ...                     the same in one process

Reads one YAML (launch/config), writes one folder (launch/runtime/outputs.py). Exit codes: 0 done, 2 the settings, the
data or the folder need a change (said in one message, nothing was overwritten), 75 stopped by a signal, the last step
saved (launch/runtime/preemption.py: continue with --resume), 76 a rank died or hung (launch/runtime/ranks.py).
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# `deepspeed launch/train.py` puts launch/ on the path; the package hift_ds is one level above.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.optim.lr_scheduler import LambdaLR

import hift_ds
from hift_ds.checkpoint import store
from hift_ds.checkpoint.store import Checkpoint, CheckpointError
from hift_ds.launch.callbacks.held_out import evaluate
from hift_ds.launch.callbacks.skipped import SkippedSteps
from hift_ds.launch.config import credentials
from hift_ds.launch.config.library_checks import check_with_libraries
from hift_ds.launch.config.reading import source
from hift_ds.launch.config.settings import Settings, load_settings
from hift_ds.launch.data.batches import collate, trained_tokens, window_batches
from hift_ds.launch.data.loading import Data, load_data
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.adapters import ADAPTERS
from hift_ds.launch.methods.engines import make_plain_engine
from hift_ds.launch.methods.schedules import schedule_factor
from hift_ds.launch.methods.steps import take_step
from hift_ds.launch.methods.table import METHODS
from hift_ds.launch.model import loading
from hift_ds.launch.model.batch_loss import summed_loss
from hift_ds.launch.runtime import extensions, logs, outputs
from hift_ds.launch.runtime.determinism import deterministic, seed_generators
from hift_ds.launch.runtime.export import export_model
from hift_ds.launch.runtime.preemption import STOPPED, Preemption, Stopped
from hift_ds.launch.runtime.ranks import RANK_LOST, RankWatch, join
from hift_ds.model import loss as losses
from hift_ds.optim.properties import has_fused


def train(
    engine: Any,
    data: Data,
    pad_token_id: int,
    settings: Settings,
    first_step: int,
    log: logs.RunLog | None,
    max_seconds: float = math.inf,
    stop_asked: Callable[[int], bool] = lambda step: False,
) -> None:
    """The training loop, from step `first_step` (0-based) to `training.max_steps`, or until `max_seconds` are over.

    Args:
        stop_asked: called after each step with the number of steps done; whether this rank was asked to stop.

    Raises:
        Stopped: a rank was asked to stop; the step is saved.
    """
    training, rank, world = settings.training, dist.get_rank(), dist.get_world_size()
    method = METHODS[settings.method.name]
    skipped = SkippedSteps(settings, len(data.train), method.engine != "deepspeed" or engine.fp16_enabled())
    elapsed = 0.0
    windows = window_batches(
        len(data.train), training.seed, training.batch_size, settings.micro_batch_size, rank, world, first_step
    )
    names = block_names(engine)
    engine.train()
    for step in range(first_step, training.max_steps):
        started = time.perf_counter()
        batches = [collate([data.train[i] for i in indices], pad_token_id) for indices in next(windows)]
        tokens, targets = sum_over_ranks(
            engine.device,
            sum(int(batch["attention_mask"].sum()) for batch in batches),
            sum(trained_tokens(batch) for batch in batches),
        )
        block, cycle = getattr(engine, "active_block", 0), getattr(engine, "cycle", step)
        learning_rate = engine.basic_optimizer.param_groups[0]["lr"]
        # Dropout depends on the step and the rank alone, so a resumed run draws what the straight one drew.
        torch.manual_seed((training.seed * 1_000_003 + step) * world + rank)
        shares = [functools.partial(loss_share, engine, batch, settings, targets) for batch in batches]
        own_loss, is_applied = take_step(method, engine, shares)
        loss, waited, asked = sum_over_ranks(
            engine.device, own_loss, time.perf_counter() - started, stop_asked(step + 1)
        )
        seconds = time.perf_counter() - started
        record = {"step": step + 1, "cycle": cycle, "block": block, "block_name": names[block], "loss": finite(loss)}
        record |= {"learning_rate": learning_rate, "tokens": int(tokens), "trained_tokens": int(targets)}
        record |= {"seconds": seconds, "tokens_per_second": tokens / seconds, "skipped": not is_applied}
        record |= engine_record(engine)
        skipped.note(engine, record, own_loss)
        if log is not None:
            log.step(record)
        skipped.check(record)
        due = training.save_every and ((step + 1) % training.save_every == 0 or step + 1 == training.max_steps)
        if due:
            save_checkpoint(engine, settings, step + 1)
        if asked:
            stop_here(engine, settings, step + 1, saved=bool(due))
        elapsed += waited / world
        if elapsed >= max_seconds:
            break


def stop_here(engine: Any, settings: Settings, step: int, saved: bool) -> NoReturn:
    """Save unless that is done or cannot be, and raise `Stopped`; every rank calls it."""
    if not METHODS[settings.method.name].resumable:
        raise Stopped(f"after step {step}; nothing was saved: method {settings.method.name!r} cannot be continued")
    if not saved:
        save_checkpoint(engine, settings, step)
    raise Stopped(f"after step {step}; checkpoint {outputs.folder(settings) / 'checkpoints' / f'step{step}'}; "
        "continue with --resume")  # fmt: skip


def loss_share(engine: Any, batch: dict[str, torch.Tensor], settings: Settings, targets: float) -> torch.Tensor:
    """A micro-batch's part of the mean loss over all `targets` of the step's global batch."""
    return summed_loss(engine, batch, settings.model.task, settings.training.loss_chunk) / targets


def engine_record(engine: Any) -> dict[str, Any]:
    """What the engine knows about the step it just took."""
    norm = engine.get_global_grad_norm()
    record: dict[str, Any] = {"grad_norm": None if norm is None else finite(float(norm))}
    if engine.fp16_enabled():
        record["loss_scale"] = float(engine.optimizer.loss_scale)
    if hasattr(engine, "memory_ledger"):
        record["memory"] = engine.memory_ledger()
    if engine.device.type != "cpu":
        record["memory_allocated"] = get_accelerator().memory_allocated()  # by the allocator: activations too
    return record


def finite(value: float) -> float | None:
    """As it goes into JSON, which has no other numbers."""
    return value if math.isfinite(value) else None


def run(arguments: argparse.Namespace, stop: Preemption, watch: RankWatch) -> None:
    """One run from settings to summary. What can be wrong is checked before a weight is loaded or a file written."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = load_settings(arguments.config, arguments.set, world)
    check_with_libraries(settings, source(arguments.config, arguments.set))
    with deterministic(settings.training.deterministic):
        run_settings(settings, arguments.resume, rank, world, stop, watch)


def run_settings(
    settings: Settings, resume: str | None, rank: int, world: int, stop: Preemption, watch: RankWatch
) -> None:
    logs.quieten(settings.logging, rank)
    extensions.prepare(rank)
    if settings.zero_stage and not METHODS[settings.method.name].uses_deepspeed:
        shown = f"{settings.method.name} takes its steps without DeepSpeed; every rank holds all weights and all state"
        logs.say(rank, f"note: {shown}, and ZeRO stage {settings.zero_stage} is not used")
    folder = outputs.folder(settings)
    if rank == 0:
        outputs.check_free(folder)
    if outputs.check_start(folder, settings, resume):
        logs.say(rank, f"{folder}: this run has done its {settings.training.max_steps} steps; nothing to do.")
        return
    outputs.check_writable(folder)
    tokenizer = loading.load_tokenizer(settings.model)
    data = load_data(settings.data, tokenizer, task=settings.model.task, seed=settings.training.seed)
    config = loading.load_config(settings.model, tokenizer, len(data.report["labels"] or ()) or None)
    loading.check_length(config, *data.longest(settings.training.max_new_tokens))
    ticks = schedule_ticks(settings, config)
    identity = outputs.identity(settings, world, data)
    recorded = outputs.check_same_run(folder, identity) if resume and outputs.has_checkpoint(folder) else {}

    join(settings.training.rank_timeout)
    found = outputs.find_checkpoint(folder) if recorded else None
    if resume and found is None:
        logs.say(rank, f"{folder}: no checkpoint yet; the run begins at its first step")
    logs.say(rank, logs.data_report(data))
    seed_generators(settings.training.seed)
    engine = make_engine(loading.load_model(settings.model, config, settings.dtype), settings, ticks)
    if settings.training.loss_chunk and (problem := losses.why_not(engine.module)):
        raise UserError(f"training.loss_chunk: {problem}. Remove it, or set it to 0.")
    lock = outputs.claim(folder) if rank == 0 else None
    watch.start(folder / outputs.LOGS, rank, world, settings.training.rank_timeout, keep=resume is not None)
    first_step = load_checkpoint(engine, found) if found else 0
    if found:
        logs.say(rank, f"{folder}: the run continues after step {first_step} ({found.path})")
        if (folder / "summary.json").exists():
            logs.say(rank, "note: summary.json and model/ are those of the shorter run until this one ends")
    watch.progress()
    before = recorded["before"] if found else evaluate(engine, data, tokenizer, settings, watch.progress)

    log = None
    if rank == 0:
        if not found:
            outputs.clear(folder)
        log = logs.RunLog(folder, settings, first_step, recorded.get("wandb_id"))
        recorded = {"identity": identity, "before": before, "wandb_id": log.wandb_id, "data": data.report}
        outputs.write_json(folder / "run.json", recorded | {"settings": settings.as_dict()})
    a_cycle = cycle_steps(engine, settings)
    if settings.training.max_steps < a_cycle:
        shown = (
            f"training.max_steps is {settings.training.max_steps}, and a cycle over all blocks takes {a_cycle} steps"
        )
        logs.say(rank, f"warning: {shown}: some blocks will not be trained")
    last = settings.training.max_steps
    has_last = bool(settings.training.save_every) or first_step == last

    def stop_asked(step: int) -> bool:
        watch.progress(step)
        return bool(stop.reasons)

    def after_batch() -> None:
        if sum_over_ranks(engine.device, stop_asked(last))[0]:
            stop_here(engine, settings, last, saved=has_last)

    dist.barrier()
    stop.nothing_to_lose = None
    try:
        train(engine, data, tokenizer.pad_token_id, settings, first_step, log, stop_asked=stop_asked)
        after = evaluate(engine, data, tokenizer, settings, after_batch)
    except Stopped:
        stop.leaving = True
        if log is not None:
            log.close(None)
        stop.reasons = reasons_of_all(stop.reasons)  # where ranks also meet: the launcher ends all when one has exited
        raise
    if settings.output.export:
        if has_last:
            stop.nothing_to_lose = f"the checkpoint of step {last} is whole; continue with --resume"
        export_model(engine, tokenizer, folder / "model", getattr(config, "use_cache", None))

    memory = logs.peak_memory(engine.device)
    if hasattr(engine, "memory_ledger"):
        memory["memory"] = engine.memory_ledger(peak=True)
    if log is not None:
        cycles = getattr(engine, "cycle", settings.training.max_steps)
        summary = logs.summarize(folder, settings, recorded, after, block_names(engine), cycles) | memory
        log.close(summary)
        outputs.write_json(folder / "summary.json", summary)
        exported = f"\nmodel              {folder / 'model'}" if settings.output.export else ""
        logs.say(rank, f"\n{logs.report(summary)}{exported}")
    if lock is not None:
        lock.release()


def schedule_ticks(settings: Settings, config: Any) -> int:
    """How often the learning-rate schedule will advance; finds the blocks on a model without memory.

    Raises:
        UserError: the model cannot be cut into blocks as asked.
    """
    method = METHODS[settings.method.name]
    if not method.block_wise:
        return method.schedule_ticks(settings.training.max_steps, 1, 1)
    hift = hift_ds.HiFTConfig.from_dict(settings.deepspeed["hift"])
    skeleton = loading.skeleton(settings.model, config)
    try:
        blocks = hift_ds.partition_model(
            skeleton, hift.layers_per_block, hift.freeze, hift.max_block_numel, hift.balance
        )
    except ValueError as error:
        raise UserError(f"deepspeed.hift: {error}") from None
    return method.schedule_ticks(settings.training.max_steps, len(blocks), hift.steps_per_block)


def make_engine(model: Any, settings: Settings, ticks: int) -> Any:
    """The engine of the method, with `training.lr_schedule` unless the deepspeed section has a scheduler.

    Raises:
        NotApplicable: the method does not fit the model.
        UserError: the engine refuses the settings.
    """
    training, method = settings.training, METHODS[settings.method.name]

    def factor(tick: int) -> float:
        return schedule_factor(training.lr_schedule, training.warmup_ratio, ticks, tick)

    if method.adapter:
        model = ADAPTERS[method.adapter](model, settings.method)
    if not method.uses_deepspeed:
        return make_plain_engine(model, settings, factor)
    config = copy.deepcopy(settings.deepspeed)
    has_scheduler = config.get("scheduler")
    offloaded = config.get("zero_optimization", {}).get("offload_optimizer")
    if config["optimizer"]["type"].lower() in ("adam", "adamw") and not offloaded:
        if not has_fused("FusedAdamBuilder"):  # torch's step, as HiFT takes then: methods compare like with like
            config["optimizer"]["params"].setdefault("torch_adam", True)
    try:
        engine, *_ = hift_ds.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=config,
            lr_scheduler=None if has_scheduler else lambda optimizer: LambdaLR(optimizer, factor),
        )
    except ValueError as error:
        raise UserError(f"deepspeed: {error}") from error
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # `SkippedSteps` stops the run, and says more
    return engine


def save_checkpoint(engine: Any, settings: Settings, steps: int) -> None:
    """Commit a checkpoint after so many steps, on all ranks, and delete those that are not to be kept."""
    training, folder = settings.training, outputs.folder(settings) / "checkpoints"
    try:
        engine.save_checkpoint(str(folder), tag=f"step{steps}", client_state={"step": steps})
    except (CheckpointError, OSError) as error:
        raise UserError(
            f"the checkpoint after step {steps} could not be saved:\n{error}\nEarlier checkpoints are as they were; "
            "make room, then continue with --resume."
        ) from None
    if dist.get_rank() == 0:
        try:
            store.prune(folder, training.keep_last, training.keep_every)
        except (CheckpointError, OSError) as error:  # what cannot be deleted now is tried again after the next
            logs.warn(f"an old checkpoint in {folder} could not be deleted: {error}")


def load_checkpoint(engine: Any, found: Checkpoint) -> int:
    """Load a verified checkpoint; the number of steps it was saved after."""
    try:
        _, state = engine.load_checkpoint(str(found.path.parent), tag=found)
    except ValueError as error:
        raise UserError(f"--resume: {error}") from error
    return state["step"]


def cycle_steps(engine: Any, settings: Settings) -> int:
    """Steps that a turn of all blocks takes; 0 where there are none."""
    return len(getattr(engine, "blocks", ())) * settings.deepspeed["hift"].get("steps_per_block", 1)


def block_names(engine: Any) -> list[str]:
    return [block.name for block in engine.blocks] if hasattr(engine, "blocks") else ["all"]


def sum_over_ranks(device: torch.device, *values: float) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def reasons_of_all(reasons: list[str]) -> list[str]:
    """What asked the ranks to stop: one that heard nothing itself knows it from the others."""
    return sorted({reason for own in store.gather(reasons) for reason in own})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")  # said once, not by every rank


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch/train.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the run's YAML, e.g. configs/tiny.yaml")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; repeatable")
    add("--resume", nargs="?", const="yes", choices=("yes", "auto"), help="continue from the newest checkpoint in "
        "output.dir; without one it is an error (also spelt `yes`), with `auto` a new start")  # fmt: skip
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher gives it; the environment has it too
    return parser.parse_args(argv)


def world_of_one() -> None:
    """Make this process the only rank, where no launcher has said otherwise."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; the exit code."""
    world_of_one()
    rank = int(os.environ["RANK"])
    with Preemption(rank) as stop, RankWatch() as watch:
        try:
            run(parse(argv), stop, watch)
            return 0
        except Stopped as stopped:
            logs.say(rank, f"stopped by {' and '.join(stop.reasons)} {stopped}")
            return STOPPED
        except UserError as error:
            mistake = error
        except Exception as error:
            if not watch.blame(error):
                raise
            return RANK_LOST
    return told(mistake)  # with the signals as they were, so that the launcher can end this process


def told(error: UserError) -> int:
    """Say a mistake once; the exit code.

    A mistake in the settings shows on every rank. The launcher ends the other ranks as soon as rank 0 has said it; one
    that is still alive after a minute has found something rank 0 did not.
    """
    if os.environ["RANK"] != "0":
        time.sleep(60)
    print(f"error: {credentials.redacted(str(error))}", file=sys.stderr, flush=True)
    return 2


def command() -> None:
    """The process of ``hift-train`` and ``launch/train.py``: `main`, then its exit."""
    sys.excepthook = credentials.print_redacted
    code = main()
    if code == RANK_LOST:
        os._exit(code)  # a group that lacks a rank cannot be taken down in order
    if dist.is_initialized() and code in (0, STOPPED):
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    command()
