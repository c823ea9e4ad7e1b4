"""A steady step waits for the device at most once."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from hift_ds.evaluation.compare.step_times import StepClock
from hift_ds.launch.callbacks.callback import Callback, Step
from hift_ds.launch.callbacks.checkpoints import Checkpoints
from hift_ds.launch.callbacks.forecast import Forecast
from hift_ds.launch.callbacks.records import Records, RunLog
from hift_ds.launch.callbacks.skipped import SkippedSteps
from hift_ds.launch.callbacks.stop_on_signal import Stopping
from hift_ds.launch.config.settings import load_settings
from hift_ds.launch.data.loading import load_data
from hift_ds.launch.loop import train
from hift_ds.launch.make_engine import make_engine
from hift_ds.launch.model import loading
from hift_ds.launch.runtime.preemption import Preemption
from hift_ds.launch.runtime.ranks import RankWatch
from hift_ds.model import activations, loss
from tests.support import tiny
from tests.support.pairwise import others_slow
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case
from tests.support.training import TINY
from tests.support.waits import Wait, Waits


@dataclass
class Steady:
    """What the steps after the first cycle did, each."""

    waits: list[list[Wait]]
    issued: list[Counter[str]]

    def report(self) -> str:
        lines = Counter(wait for step in self.waits for wait in step)
        return "\n".join(f"{number / len(self.waits):6.2f} a step: {wait}" for wait, number in lines.most_common())


def steady_steps(case: Case, chunked: bool = False, offload_activations: bool = False) -> Steady:
    """In a rank: trains under the harness, and watches the second cycle, but for its first step."""
    llama = tiny.model(case.dtype)
    seen = Steady([], [])
    with Waits() as waits, contextlib.ExitStack() as stack:
        if offload_activations:
            activations.checkpoint_activations(llama, offload=True)
        engine = tiny.initialize(case, llama=llama)
        stack.callback(engine.destroy)
        rank, length = torch.distributed.get_rank(), tiny.MICRO_BATCH * (tiny.LENGTH - 1)
        for step in range(case.steps):
            batches = [tiny.micro_batch(step, micro, rank) for micro in range(tiny.ACCUMULATION)]
            batches = [{name: tensor.to(engine.device) for name, tensor in batch.items()} for batch in batches]
            targets = [loss.find_targets(batch["labels"], most=length) for batch in batches]
            waits.reset()
            for batch, target in zip(batches, targets, strict=True):
                if chunked:
                    inputs = {"input_ids": batch["input_ids"]}
                    value = loss.summed_loss(engine, engine.module, inputs, target, chunk=8) / 16
                else:
                    value = engine(**batch).loss
                engine.backward(value)
                engine.step()
            if step > case.k:  # ZeRO-3 compares the order of layers over the ranks once more in the step before
                seen.waits.append(waits.outside_the_model())
                seen.issued.append(waits.issued)
    return seen


MOST = 1  # the decision to skip
# Configuration, options of `steady_steps`, and the waits of the worst steady step; more than MOST: not mended yet.
CONFIGURATIONS: list[tuple[Case, dict[str, bool], int]] = [
    (Case(0), {}, 1),
    (Case(0, dtype="bf16", step="streamed", ranks=2), {}, 1),
    (Case(1, dtype="fp16", step="streamed"), {}, 1),
    (Case(2, dtype="bf16"), {}, 1),
    (Case(2, dtype="bf16", step="streamed", clip=0.0, ranks=2), {}, 1),
    (Case(2, dtype="bf16"), {"offload_activations": True}, 1),
    (Case(2, dtype="bf16", offload=True), {}, 1),
    (Case(3, dtype="fp16", step="streamed"), {}, 1),
    (Case(3, place="none"), {"offload_activations": True}, 1),
    (Case(2, dtype="bf16", step="streamed", moments="8bit"), {}, 1),
    (Case(3, dtype="bf16", waiting="cpu"), {}, 1),
    (Case(3, dtype="bf16", waiting="cpu", ranks=2, checkpointing=True), {"chunked": True}, 1),
]
# Each of their values is in one of those above, too.
MORE: list[tuple[Case, dict[str, bool], int]] = [
    (Case(0, dtype="bf16"), {}, 1),
    (Case(0, dtype="bf16", place="none"), {}, 1),
    (Case(1), {"chunked": True}, 1),
    (Case(2, dtype="bf16", place="none", checkpointing=True), {"chunked": True}, 1),
    (Case(1, dtype="fp16", offload=True, clip=0.0), {}, 1),
    (Case(3, dtype="bf16", ranks=2), {"chunked": True}, 1),
    (Case(3, dtype="bf16", offload=True), {}, 1),
    (Case(0, moments="8bit"), {}, 1),
    (Case(3, dtype="bf16", moments="8bit", ranks=2), {}, 1),
    (Case(3, waiting="cpu", ranks=2, place="none"), {}, 1),
    (Case(3, dtype="bf16", waiting="cpu", ranks=2, offload=True), {"offload_activations": True}, 1),
]


def _named(case: Case, options: dict[str, bool], most: int) -> object:
    mark = pytest.mark.xfail(raises=AssertionError, strict=True, reason=f"{most} waits in a step")
    marks = [mark] * (most > MOST) + [pytest.mark.slow] * ((case, options, most) in MORE)
    return pytest.param(case, options, id="-".join([str(case), *options]), marks=marks)


@pytest.mark.parametrize(("case", "options"), [_named(*one) for one in [*CONFIGURATIONS, *MORE]])
def test_a_steady_step_waits_at_most_once(case: Case, options: dict[str, bool]) -> None:
    for seen in run_on_ranks(case.ranks, steady_steps, case, **options):
        print(f"waits in each step {[len(step) for step in seen.waits]}\n{seen.report()}")
        assert len(seen.waits) == case.steps - case.k - 1
        assert all(len(step) <= MOST for step in seen.waits), seen.report()


class Watcher(Callback):
    """Watches the steps of a run after its first cycle, but for the first of them."""

    def __init__(self, waits: Waits, engine: Any) -> None:
        self.waits, self.engine = waits, engine
        self.seen = Steady([], [])

    def before_step(self, number: int) -> None:
        self.waits.reset()

    def after_step(self, step: Step, total: float) -> bool:
        if step.number > len(getattr(self.engine, "blocks", ())) + 1:
            self.seen.waits.append(self.waits.outside_the_model())
            self.seen.issued.append(self.waits.issued)
        return False


def run_of_the_loop(out: str, overrides: list[str]) -> Steady:
    """In a rank: the training loop under the harness, with the callbacks of a run."""
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)  # methods without DeepSpeed's engine do not
    settings = load_settings(TINY, [*overrides, f"output.dir={out}"], torch.distributed.get_world_size())
    tokenizer = loading.load_tokenizer(settings.model)
    config = loading.load_config(settings.model, tokenizer, None)
    data = load_data(settings.data, tokenizer, task=settings.model.task, seed=0)
    model = loading.load_model(settings.model, config, settings.dtype)
    with Waits() as waits, contextlib.ExitStack() as stack:
        engine: Any = make_engine(model, settings, lambda tick: 1.0)
        stack.callback(engine.destroy)
        checkpoints, watch = Checkpoints(engine, settings), RankWatch()
        stopping = Stopping(
            settings, checkpoints, Preemption(torch.distributed.get_rank()), watch, settings.training.max_steps
        )
        log = RunLog(Path(out), settings, 0, None) if torch.distributed.get_rank() == 0 else None
        watcher = Watcher(waits, engine)
        callbacks = [
            watcher,
            Records(log, Forecast(settings.training, False)),
            SkippedSteps(engine, settings),
            StepClock(cycle=1000, enough=3600.0),
            checkpoints,
            stopping,
        ]
        train(engine, data, tokenizer.pad_token_id, settings, callbacks)
        if log is not None:
            log.close(None)
        return watcher.seen


BF16 = "deepspeed.bf16.enabled=true"
CHUNKED_AT_STAGE_3 = [BF16, "deepspeed.zero_optimization.stage=3", "training.loss_chunk=16"]
# Ranks, settings, and the most waits in a step: the loop itself has none beside the engine's.
RUNS: dict[str, tuple[int, list[str], int]] = {
    "hift": (1, [], 1),
    "hift in bf16 at stage 2, in micro-batches": (
        1,
        [BF16, "deepspeed.zero_optimization.stage=2", "training.micro_batch_size=4"],
        1,
    ),
    "hift at stage 3, in chunks of the loss": (1, CHUNKED_AT_STAGE_3, 1),
    "hift at stage 3 on two ranks, in chunks of the loss": (2, CHUNKED_AT_STAGE_3, 1),
    "badam": (1, ["method.name=badam", "method.badam_switch_every=1000"], 2),  # one is in its package
    "mezo, in micro-batches": (
        1,
        ["method.name=mezo", "training.micro_batch_size=4"],
        3,
    ),  # its two losses and the sums
}


@pytest.mark.parametrize("name", others_slow(RUNS, [name for name in RUNS if "on two ranks" not in name]))
def test_the_loop_adds_no_wait_to_the_engines(name: str, tmp_path: Path) -> None:
    ranks, overrides, most = RUNS[name]
    steps = ["training.max_steps=12", "training.batch_size=8", "data.train_examples=32", "data.eval_examples=0"]
    for seen in run_on_ranks(ranks, run_of_the_loop, str(tmp_path), [*steps, *overrides]):
        print(f"waits in each step {[len(step) for step in seen.waits]}\n{seen.report()}")
        assert len(seen.waits) >= 4
        for step in seen.waits:
            # Where the number of chunks changes, ZeRO-3 compares the order of layers over the ranks again.
            own = [wait for wait in step if not wait.site.startswith("deepspeed/runtime/zero/utils.py")]
            assert len(own) <= most, seen.report()
