"""What is not finite, in a loss or a gradient, on any rank: the same decision on all, and nothing is updated.

Here the engine; launch/train.py has its part below.
"""

import contextlib
import functools
import io
import itertools
import json
import logging
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.integration.test_methods import OPTIONS
from tests.support import tiny
from tests.support.data_fixtures import window_batches
from tests.support.pairwise import Row, each_value, pairwise
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case
from tests.support.training import arguments

STEPS = 8  # good ones: more than a cycle of six blocks
BAD = (0, 3, 4, 8)  # attempts: before there is any state, two in a row, one in the second cycle
UNSEEN = BAD[-1]  # looking at the state ends what is under way, so one of them goes without


@dataclass(frozen=True)
class Fault:
    """What goes wrong on the last rank.

    Attributes:
        value: nan or inf.
        where: "loss": it is added to the loss, whose gradients stay finite; "gradient": it is one element of one
            gradient, and the loss stays finite; "both": the loss is multiplied by it.
        micro: in which micro-batch of the window.
    """

    value: float
    where: str
    micro: int

    def __str__(self) -> str:
        return f"{self.value}-{self.where}-micro{self.micro}"


def attempt(engine: Any, step: int, fault: Fault | None) -> None:
    """A window on the batches of a step; with a fault it is on other ones."""
    rank, last = torch.distributed.get_rank(), torch.distributed.get_world_size() - 1
    for micro in range(tiny.ACCUMULATION):
        loss = engine(**tiny.micro_batch(step if fault is None else 100 + step, micro, rank)).loss
        hook: Any = None
        if fault is not None and (rank, micro) == (last, fault.micro):
            if fault.where == "gradient":
                name = engine.blocks[engine.active_block].parameter_names[0]
                hook = engine.module.get_parameter(name).register_hook(functools.partial(spoil, value=fault.value))
            else:
                loss = loss + fault.value if fault.where == "loss" else loss * fault.value
        engine.backward(loss)
        engine.step()
        if hook is not None:
            hook.remove()


def spoil(gradient: torch.Tensor, value: float) -> torch.Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[1] = value
    return gradient


def state(engine: Any) -> dict[str, Any]:
    """All that a step may change, but fp16's search for a loss scale: copied tensors by where they are, and numbers."""
    found: dict[str, Any] = {f"weights {name}": value for name, value in tiny.weights(engine).items()}
    found |= {f"master {name}": value for name, value in tiny.masters(engine).items()}
    for index, block in enumerate(tiny.block_states(engine)):
        found |= {f"block {index} {name}": value for name, value in block.items()}
    for index, entries in enumerate(tiny.block_entries(engine)):
        found |= {f"block {index} {name}": value for name, value in numbers(entries).items()}
    place = (engine.active_block, engine.cycle, engine.get_lr()[0], engine.lr_scheduler.last_epoch)
    return {**found, "place": torch.tensor(place, dtype=torch.float64)}


def numbers(saved: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Numbers inside nested dicts and lists that are no tensors: counts, where an optimizer keeps them so."""
    if isinstance(saved, (bool, int, float)):
        return {path: torch.tensor(saved)}
    entries = saved.items() if isinstance(saved, dict) else enumerate(saved) if isinstance(saved, (list, tuple)) else ()
    search = ("overflow", "cur_scale", "cur_iter", "last_overflow_iter")
    return {k: v for key, value in entries if key not in search for k, v in numbers(value, f"{path}/{key}").items()}


def differing(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> list[str]:
    same = {name for name in ours.keys() & truth.keys() if torch.equal(ours[name], truth[name])}
    return [name for name in {**ours, **truth} if name not in same]


def train(case: Case, fault: Fault | None) -> dict[str, Any]:
    """In a rank: STEPS good steps, with bad ones between them if there is a fault."""
    from deepspeed.utils import logger

    import hift_ds

    config = tiny.ds_config(case)
    if case.dtype == "fp16":  # a dynamic scale, which does not fall in these few steps: the bits stay comparable
        config["fp16"] |= {"initial_scale_power": 8, "hysteresis": 100}
    engine = hift_ds.initialize(model=tiny.model(case.dtype), config=config, lr_scheduler=tiny.halved_each_tick)[0]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    seen: dict[str, Any] = {"skipped": [], "changed": [], "kept": 0, "said": []}
    try:
        good = 0
        for number in itertools.count():
            if good == STEPS:
                break
            is_bad = fault is not None and number in BAD
            before = state(engine) if is_bad and number != UNSEEN else None
            attempt(engine, number if is_bad else good, fault if is_bad else None)
            seen["skipped"].append(not engine.was_step_applied())
            seen["kept"] += sum(parameter.grad is not None for parameter in engine.module.parameters())
            good += not is_bad
            if before is not None:
                seen["changed"] += differing(state(engine), before)
        seen["said"] = [line for line in lines if "non-finite" in line and "no rank updates block" in line]
        return {**seen, "counted": engine.skipped_steps, "end": state(engine)}
    finally:
        logger.removeHandler(handler)
        engine.destroy()


@functools.cache
def without_faults(case: Case) -> list[dict[str, Any]]:
    return run_on_ranks(case.ranks, train, case, None)


STORES: list[dict[str, Any]] = [{}, {"step": "block"}, {"place": "none"}, {"offload": True}]
CASES = [
    Case(stage=stage, ranks=ranks, dtype=dtype, **store)
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16", "fp16")
    for ranks in (1, 2)
    for store in STORES
    if stage or (dtype != "fp16" and not store.get("offload"))
]
FAULTS = [Fault(v, where, m) for where in ("loss", "gradient", "both") for v in (math.nan, math.inf) for m in (0, 1)]


def built(row: Row) -> tuple[Case, Fault]:
    case = Case(stage=row["stage"], ranks=row["ranks"], dtype=row["dtype"], **STORES[row["store"]])
    return case, Fault(row["value"], row["where"], row["micro"])


FACTORS = {
    "stage": (0, 1, 2, 3),
    "dtype": ("fp32", "bf16", "fp16"),
    "ranks": (1, 2),
    "store": tuple(range(len(STORES))),
    "value": (math.nan, math.inf),
    "where": ("loss", "gradient", "both"),
    "micro": (0, 1),
}
SAMPLE = [built(row) for row in each_value(pairwise(FACTORS, lambda row: built(row)[0] in CASES))]


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        pytest.param(case, fault, marks=() if (case, fault) in SAMPLE else pytest.mark.slow)
        for case in CASES
        for fault in FAULTS
    ],
    ids=str,
)
def test_what_is_not_finite_updates_nothing(case: Case, fault: Fault) -> None:
    ranks = run_on_ranks(case.ranks, train, case, fault)
    for rank, (seen, clean) in enumerate(zip(ranks, without_faults(case), strict=True)):
        assert not any(clean["skipped"]) and not clean["said"]
        assert seen["skipped"] == [number in BAD for number in range(STEPS + len(BAD))], f"rank {rank}"
        assert not seen["changed"], f"rank {rank}: a skipped step changed {seen['changed'][:8]}"
        assert seen["counted"] == len(BAD)
        assert seen["kept"] == clean["kept"], f"rank {rank} keeps gradients of a skipped step"
        is_search = case.dtype == "fp16" and fault.where == "gradient"  # to be told from a scale that is too high?
        assert len(seen["said"]) == (len(BAD) if rank == 0 and not is_search else 0)
        different = differing(seen["end"], clean["end"])
        assert not different, f"rank {rank}: not as if nothing had happened: {different[:8]}"


# ---- launch/train.py -------------------------------------------------------------------------------------------------


def run_with_faults(argv: list[str], bad: Sequence[int], where: str = "both") -> dict[str, Any]:
    """In a rank: the command line, with a loss, or its gradients, that are NaN on the last rank in the steps `bad`.

    Returns the message it ended with, its output, and of each step a hash of the weights and the learning rate after.
    """
    from hift_ds.launch import loop, run, train
    from hift_ds.launch.errors import UserError
    from hift_ds.launch.runtime.preemption import Preemption
    from hift_ds.launch.runtime.ranks import RankWatch

    share, last = loop.loss_share, torch.distributed.get_world_size() - 1
    seen: dict[str, Any] = {"weights": [], "rates": [], "message": None}

    def spoiled(*given: Any) -> torch.Tensor:
        loss = share(*given)
        if len(seen["weights"]) + 1 in bad and torch.distributed.get_rank() == last:
            if where != "gradient":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    class Watched(run.SkippedSteps):
        def describe(self, step: Any) -> None:
            super().describe(step)
            held = torch.cat([weights.double().flatten() for weights in tiny.weights(self.engine).values()])
            seen["weights"].append(zlib.crc32(held.numpy().tobytes()))
            seen["rates"].append(self.engine.basic_optimizer.param_groups[0]["lr"])

    printed = io.StringIO()
    with mock.patch.object(loop, "loss_share", spoiled), mock.patch.object(run, "SkippedSteps", Watched):
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                with Preemption(int(os.environ["RANK"])) as stop, RankWatch() as watch:
                    given = train.parse(argv)
                    run.run(given.config, given.set, given.resume, stop, watch)
            except UserError as error:
                seen["message"] = str(error)
    return {**seen, "printed": printed.getvalue()}


def launched(out: Path, bad: Sequence[int], *overrides: str, ranks: int = 2, where: str = "both") -> dict[str, Any]:
    """What rank 0 saw; the others saw the same, but only it prints."""
    argv = arguments(out, "data.eval_examples=0", "training.batch_size=8", "training.lr_schedule=linear", *overrides)
    seen = run_on_ranks(ranks, run_with_faults, argv, bad, where)
    for key in ("weights", "rates", "message"):
        assert all(other[key] == seen[0][key] for other in seen), f"the ranks differ in {key}"
    return seen[0]


def valid_records(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, which must be what JSON is for everybody else, too."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_skipped_steps_are_told_and_the_run_goes_on(tmp_path: Path) -> None:
    seen = launched(tmp_path, (1, 3, 4), "training.max_steps=6", "training.max_skipped_steps=2", "logging.every=100")
    assert seen["message"] is None
    steps = valid_records(tmp_path)
    assert [record["skipped"] for record in steps] == [True, False, True, True, False, False]
    assert [record["block"] for record in steps] == [0, 0, 1, 1, 1, 2]
    batches = [window_batches(256, 0, 8, 2, rank, 2) for rank in range(2)]
    for record, windows in zip(steps, zip(*batches, strict=True), strict=False):
        if not record["skipped"]:
            assert math.isfinite(record["loss"]) and "rows" not in record
            continue
        assert (record["loss"], record["grad_norm"], record["not_finite"], record["ranks"]) == (None, None, "loss", [1])
        assert sorted(record["rows"]) == sorted(itertools.chain.from_iterable(itertools.chain(*windows)))
        assert f"step {record['step']}/6: loss not finite" in seen["printed"]
        assert f"skipped: loss not finite on rank 1, examples {record['rows']}" in seen["printed"]
    weights = seen["weights"]
    assert weights[1] == weights[2] == weights[3] and len(set(weights)) == 4
    final = json.loads((tmp_path / "summary.json").read_text())
    assert final["steps_skipped"] == 3 and sum(final["updates_per_block"]) == 3
    assert final["loss_first"] == steps[1]["loss"]


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    seen = launched(tmp_path, (2, 4, 5, 6), "training.max_skipped_steps=2")
    steps = valid_records(tmp_path)
    assert [record["skipped"] for record in steps] == [False, True, False, True, True, True]
    assert len(set(seen["weights"][2:])) == 1 and not (tmp_path / "model").exists()
    assert "loss is not finite on rank 1 at step 6, and the 2 steps before it" in seen["message"]
    assert "those after step 3. Lower training.learning_rate" in seen["message"]
    assert f"Block 2 ({steps[-1]['block_name']}), learning rate 0.003" in seen["message"]
    assert str(steps[-1]["rows"]) in seen["message"] and "max_skipped_steps allows 2 " in seen["message"]


@pytest.mark.parametrize(
    ("method", "settings", "where"),
    [
        ("full", ["deepspeed.zero_optimization.stage=0"], "both"),
        ("full", ["deepspeed.zero_optimization.stage=0"], "gradient"),
        ("full", ["deepspeed.zero_optimization.stage=2", "deepspeed.bf16.enabled=true"], "gradient"),
        ("lora", ["deepspeed.zero_optimization.stage=3"], "both"),
    ],
)
def test_deepspeeds_own_engine_stops_before_the_update(
    method: str, settings: list[str], where: str, tmp_path: Path
) -> None:
    seen = launched(tmp_path, (3,), f"method.name={method}", *settings, where=where)
    assert "With this method the first such step ends the run" in seen["message"] and "at step 3" in seen["message"]
    assert ("on rank 1" in seen["message"]) == (where == "both")
    assert len(seen["weights"]) == 3 and len(set(seen["weights"])) == 2
    assert [record["skipped"] for record in valid_records(tmp_path)] == [False, False, True]


@pytest.mark.parametrize(
    ("method", "where"),
    [("badam", "both"), ("galore", "gradient"), ("mezo", "both"), ("lomo", "both"), ("lomo", "gradient")],
)
def test_methods_without_deepspeed_skip(method: str, where: str, tmp_path: Path) -> None:
    if method in ("badam", "galore", "lomo"):
        pytest.importorskip({"badam": "badam", "galore": "galore_torch", "lomo": "lomo_optim"}[method])
    options = [*OPTIONS.get(method, []), *(["training.micro_batch_size=8"] if method == "lomo" else [])]
    ranks = 1 if method == "lomo" else 2
    settings = [f"method.name={method}", "training.max_steps=5", "output.export=false", *options]
    seen = launched(tmp_path, (2, 4), *settings, ranks=ranks, where=where)
    assert seen["message"] is None, seen["message"]
    assert [record["skipped"] for record in valid_records(tmp_path)] == [False, True, False, True, False]
    weights, rates = seen["weights"], seen["rates"]
    assert weights[1] == weights[0] != weights[2] == weights[3] != weights[4]
    assert rates[1] == rates[0] > rates[2] == rates[3] > rates[4]


def test_fp16_counts_when_its_loss_scale_cannot_fall(tmp_path: Path) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 3, "hysteresis": 1, "min_loss_scale": 1}
    settings = [f"deepspeed.fp16={json.dumps(fp16)}", "deepspeed.zero_optimization.stage=2"]
    bad = range(2, 13)
    seen = launched(tmp_path, bad, *settings, "training.max_skipped_steps=1", ranks=1, where="gradient")
    steps = valid_records(tmp_path)
    assert [record["loss_scale"] for record in steps] == [8, 4, 2, 1, 1]  # two of the search, and two that count
    assert ["rows" in record for record in steps] == [False, False, False, True, True]
    assert "gradient is not finite at step 5" in seen["message"]
    assert seen["printed"].count("skipped: the loss scale was too high") == 2
