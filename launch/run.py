"""A training run from settings to summary, as a list of steps."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.optim.lr_scheduler import LambdaLR

from hift_ds.blocks.block import numel_of
from hift_ds.blocks.schedule import BlockSchedule
from hift_ds.checkpoint import store
from hift_ds.checkpoint.files import CheckpointError
from hift_ds.checkpoint.lock import Lock
from hift_ds.collectives import gather
from hift_ds.launch.callbacks.callback import Callback
from hift_ds.launch.callbacks.checkpoints import Checkpoints, CycleEnd, load_checkpoint, load_weights, steps_of, tag
from hift_ds.launch.callbacks.forecast import Forecast
from hift_ds.launch.callbacks.grace import GraceNote, smaller_state
from hift_ds.launch.callbacks.held_out import HeldOut, evaluate
from hift_ds.launch.callbacks.records import Records, RunLog
from hift_ds.launch.callbacks.skipped import SkippedSteps
from hift_ds.launch.callbacks.stop_on_signal import Stopping
from hift_ds.launch.config.library_checks import check_with_libraries
from hift_ds.launch.config.reading import source
from hift_ds.launch.config.settings import Settings, load_settings
from hift_ds.launch.cuts import (
    Cut,
    check_change,
    cut_of,
    cuts_until,
    is_in_cycle,
    lr_factor,
    other_cut,
    steps_ahead,
    with_cut,
)
from hift_ds.launch.data.batches import collate
from hift_ds.launch.data.loading import Data, open_data, prepare_data
from hift_ds.launch.data.stream import Stream
from hift_ds.launch.errors import UserError
from hift_ds.launch.learning_rates import few_updates_warning, low_rate_warning, with_rate
from hift_ds.launch.loop import train
from hift_ds.launch.make_engine import (
    block_names,
    check_reach,
    cycle_steps,
    find_blocks,
    make_engine,
    page_locking_problem,
    schedule_ticks,
)
from hift_ds.launch.methods.table import METHODS
from hift_ds.launch.model import loading
from hift_ds.launch.model.batch_loss import loss_note
from hift_ds.launch.model.classes import set_classes
from hift_ds.launch.model.hollow import without_weights
from hift_ds.launch.model.limits import check_limits, highest_ids
from hift_ds.launch.model.partitioned import PartitionedLoading
from hift_ds.launch.runtime import drive, extensions, logs, outputs, summary
from hift_ds.launch.runtime.determinism import deterministic, seed_generators
from hift_ds.launch.runtime.export import export_model
from hift_ds.launch.runtime.preemption import Preemption, Stopped, has_limit
from hift_ds.launch.runtime.ranks import RankWatch, check_same, decide, first_on_node, join, together
from hift_ds.model import loss as losses
from hift_ds.model.reach import unreached_by_example, unreached_by_text
from hift_ds.zero.partitioning import gathered_in_turn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hift_ds.blocks.block import Block
    from hift_ds.checkpoint.manifest import Checkpoint


def run(config: str, overrides: list[str], resume: str | None, stop: Preemption, watch: RankWatch) -> None:
    """Train, evaluate and export as the YAML at `config` says. Every rank calls it.

    Args:
        overrides: `KEY=VALUE` settings that replace those of the YAML.
        resume: None for a new run; "yes" or "auto" to continue one.
        stop: whether this process was asked to stop.
        watch: this rank's log, which detects ranks that are lost.

    Raises:
        UserError: the settings, the data or the output folder need a change. Nothing is overwritten by then.
        Stopped: the run was asked to stop, and what can be saved is saved.
    """
    settings = load_settings(config, overrides, int(os.environ["WORLD_SIZE"]))
    check_with_libraries(settings, source(config, overrides))
    with deterministic(settings.training.deterministic):
        one = Run(settings, resume, stop, watch)
        try:
            one.run()
        finally:
            if one.lock is not None:
                one.lock.release()


class Run:
    """One run. Everything that can be wrong is checked before a weight is loaded or a file is written.

    Each step in `run` sets attributes that the later ones read.
    """

    # load_data
    tokenizer: PreTrainedTokenizerBase
    data: Data
    config: PretrainedConfig
    blocks: list[Block]  # of HiFT
    ticks: int  # how often the learning-rate schedule advances
    unreached: list[str] | None  # parameters that the loss does not depend on; None: not known yet
    # find_run
    identity: dict[str, Any]  # what a continuation must share with this run
    recorded: dict[str, Any]  # run.json: of the run to continue, then of this one
    found: Checkpoint | None  # the checkpoint to continue from
    cuts: list[Cut]  # the cuts into blocks of the run so far, the present one last
    asked: Settings | None  # the settings with another cut, as long as the run continues in that of the checkpoint
    # load_engine
    processor_files: dict[str, bytes]  # of a model that also reads images or audio: they go into the export
    engine: Any
    # continue_or_start
    first_step: int  # steps done before
    last_step: int
    checkpoints: Checkpoints
    stopping: Stopping
    log: RunLog | None  # rank 0's
    forecast: Forecast
    grace: GraceNote
    # training
    held_out: HeldOut
    cycle_end: CycleEnd
    cycles: int
    predicted: dict[str, Any] | None  # the first estimate of the time to the end, and what it took

    def __init__(self, settings: Settings, resume: str | None, stop: Preemption, watch: RankWatch) -> None:
        self.settings, self.resume, self.stop, self.watch = settings, resume, stop, watch
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.folder = outputs.folder(settings)
        self.lock: Lock | None = None  # rank 0's

    def run(self) -> None:
        """Take all steps in their order."""
        self.prepare_process()
        self.join_ranks()
        self.check_folder()
        if self.is_finished(None if self.settings.training.epochs else self.settings.training.max_steps):
            return
        together(lambda: outputs.check_writable(self.folder))
        self.load_data()
        if self.is_finished(self.settings.training.max_steps):
            return
        self.find_run()
        self.load_engine()
        self.claim_folder()
        self.continue_or_start()
        with self.saved_if_stopped():
            self.train()
            if self.change_blocks():
                self.train()
            self.cycles = getattr(self.engine, "cycle", self.settings.training.max_steps)
            self.take_best()
            after = self.evaluate_last()
        self.predicted = self.forecast.outcome()
        self.export()
        self.summarize(after)

    def prepare_process(self) -> None:
        """Set up messages and compiled extensions."""
        logs.quieten(self.settings.logging, self.rank)
        extensions.prepare(self.rank)
        if self.settings.zero_stage and not METHODS[self.settings.method.name].uses_deepspeed:
            self.say(
                f"note: {self.settings.method.name} trains without DeepSpeed; every rank holds all weights and all "
                f"state, and ZeRO stage {self.settings.zero_stage} is not used"
            )

    def join_ranks(self) -> None:
        """Join the ranks. From here on, they answer questions about files together, or rank 0 does for all."""
        join(self.settings.training.rank_timeout)
        sections = self.settings.as_dict()
        values = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        check_same("settings", values, "Start them all with the same command and the same YAML.")

    def check_folder(self) -> None:
        """Check that no other run writes to the output folder, and that its content fits `resume`."""
        decide(lambda: outputs.check_free(self.folder))
        decide(lambda: outputs.check_start(self.folder, self.settings, self.resume))

    def is_finished(self, steps: int | None) -> bool:
        """Return whether a continued run has done these steps (None: not known yet) and is exported."""
        done = decide(lambda: outputs.steps_of_finished(self.folder, self.settings, steps)) if self.resume else 0
        if done:
            self.say(f"{self.folder}: this run is finished after {done} steps; nothing to do.")
        return bool(done)

    def load_data(self) -> None:
        """Load tokenizer, data and model configuration, and check that they fit each other on every rank."""
        together(self._load_tokenizer)
        data, model, seed = self.settings.data, self.settings.model, self.settings.training.seed
        folder = first_on_node(prepare_data(data, self.tokenizer, task=model.task, seed=seed, say=self.say))
        together(lambda: self._load_data(folder))
        rows = {
            f"{part} {key}": self.data.report[part][key]
            for part in ("train", "eval")
            for key in ("sha256", "used", "tokens")
        }
        check_same("data", rows, "Give every machine the same files (data.path, data.eval_path, model.tokenizer).")
        check_same("models", self.config.to_dict(), "Give every machine the same model (model.name_or_path).")

    def _load_tokenizer(self) -> None:
        self.tokenizer = loading.load_tokenizer(self.settings.model)
        self.config = loading.load_config(self.settings.model, self.tokenizer, say=self.say)

    def _load_data(self, folder: Path) -> None:
        settings = self.settings
        self.data = open_data(settings.data, self.tokenizer, folder)
        if settings.training.eval_every and not self.data.eval:
            raise UserError(
                f"training.eval_every: got {settings.training.eval_every}, but the data has no held-out examples. Set "
                "data.eval_split or data.eval_path, or remove training.eval_every."
            )
        if not isinstance(self.data.train, Stream):
            self.settings = settings = settings.with_steps(len(self.data.train))
        if labels := self.data.report["labels"]:
            self.data.renumber(set_classes(self.config, settings.model, labels, self.say))
        longest, answered = self.data.longest(settings.training.max_new_tokens)
        skeleton = loading.skeleton(settings.model, self.config)
        if isinstance(self.data.train, Stream):
            self.data.train.say = self.say
            self.data.train.highest_token, self.data.train.highest_type = highest_ids(skeleton)
        examples = {"training": self.data.train, "held-out": self.data.eval}
        found = {"training": self.data.report["train"], "held-out": self.data.report["eval"]}
        self.data.report["notes"] += check_limits(skeleton, self.tokenizer, examples, found, longest, answered)
        self.blocks = find_blocks(settings, skeleton)
        self.ticks = schedule_ticks(settings, self.blocks)
        self.unreached = unreached_by_text(skeleton, longest)
        if self.unreached is not None:
            check_reach(settings, self.blocks, skeleton, self.unreached)

    def find_run(self) -> None:
        """Find the run and the checkpoint to continue from; then fill in what depends on the model."""
        continues = bool(self.resume) and decide(lambda: outputs.has_checkpoint(self.folder))
        self.recorded = decide(lambda: outputs.recorded(self.folder)) if continues else {}
        self.settings = with_rate(self.settings, len(self.blocks), outputs.rate_of(self.recorded))
        self.identity = outputs.identity(self.settings, self.world, self.data, self.config, self.tokenizer)
        self.settings = self.settings.for_model(self.config, self.ticks)
        self.cuts, self.asked = [cut_of(self.settings, len(self.blocks))], None
        if continues:
            decide(lambda: outputs.check_same_run(self.folder, self.recorded, self.identity))
        self.found = outputs.find_checkpoint(self.folder) if self.recorded else None
        if self.found:
            self.find_cut(self.found)

    def find_cut(self, found: Checkpoint) -> None:
        """Find the cuts into blocks of the run so far. The last one stays as long as a cycle is not finished."""
        asked, self.cuts = self.cuts[-1], cuts_until(self.recorded["cuts"], steps_of(found))
        if not other_cut(found.about, self.blocks):
            return
        check_change(self.settings, self.cuts[-1], asked)
        if is_in_cycle(found.about):
            self.say(
                f"note: the checkpoint is in the middle of a cycle over {len(found.about['blocks'])} blocks; the cycle "
                f"is finished with them, then the run goes on with the {len(self.blocks)} blocks of these settings"
            )
            self.asked = self.settings
            self.use(with_cut(self.settings, self.cuts[-1]))

    def use(self, settings: Settings) -> None:
        """Cut the model into blocks as these settings say."""
        self.settings = settings
        self.blocks = find_blocks(settings, loading.skeleton(settings.model, self.config))
        self.ticks = schedule_ticks(settings, self.blocks)

    def load_engine(self) -> None:
        """Say what the run begins with, and make the engine."""
        self.processor_files = decide(lambda: loading.processor_files(self.settings.model, self.config))
        if self.resume and self.found is None:
            self.say(f"{self.folder}: no checkpoint yet; the run begins at its first step")
        self.say(summary.data_report(self.data))
        for note in self.settings.notes:
            self.say(f"note: {note}")
        hift = self.settings.deepspeed["hift"]
        cycle = len(self.blocks) * hift.get("steps_per_block", 1) if hift.get("lr_ticks") != "step" else 1
        if warning := low_rate_warning(self.settings, self.ticks, cycle or 1):
            self.say(warning)
        if self.settings.training.full_learning_rate:
            skeleton = loading.skeleton(self.settings.model, self.config)
            if warning := few_updates_warning(self.settings, len(self.blocks), skeleton):
                self.say(warning)
        self.build_engine(self.say)

    def build_engine(self, say: Callable[[str], None]) -> None:
        """Load the model, and make the engine in the present cut."""
        skeleton = loading.skeleton(self.settings.model, self.config)
        if problem := page_locking_problem(self.settings, self.blocks, skeleton):
            say(f"warning: {problem}")
        seed_generators(self.settings.training.seed)
        model = self.load_model(say)
        if added := loading.stop_at(model, self.data.report["train"]["ends"]):
            names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(added)))
            say(
                f"note: answers in the training data end with {names}; generation stops there too, here and in the "
                "exported model (eos_token_id)"
            )
        together(lambda: self.check_loss(model, say))
        self.engine = make_engine(
            model,
            self.settings,
            lr_factor(self.settings, self.cuts),
            self.unreached or (),
            page_locking_is_checked=True,
        )
        if self.settings.training.loss_chunk and (problem := losses.chunking_problem(self.engine.module)):
            raise UserError(f"training.loss_chunk: {problem}. Remove it, or set it to 0.")

    def load_model(self, say: Callable[[str], None]) -> PreTrainedModel:
        """Load the model: onto the device, into host memory, or at ZeRO 3 this rank's part of each tensor."""
        settings, method = self.settings, METHODS[self.settings.method.name]
        if settings.zero_stage == 3 and method.uses_deepspeed and not method.adapter:
            partitioned = PartitionedLoading({k: v for k, v in settings.deepspeed.items() if k != "hift"})
            model = together(
                lambda: loading.load_model(settings.model, self.config, settings.dtype, say, partitioned=partitioned)
            )
            check_same("weights", partitioned.checksums, "Give every machine the same model (model.name_or_path).")
            return model
        # No device may have the memory for all weights: then they stay in host memory, or ZeRO 3 moves them one by one.
        waits = bool(self.blocks) and settings.deepspeed["hift"].get("offload", {}).get("weights") == "cpu"
        device = get_accelerator().current_device_name() if settings.zero_stage < 3 and not waits else None
        # Then all ranks get those of rank 0. To find what the loss depends on, an example may need the weights.
        is_hollow = waits and self.rank > 0 and self.unreached is not None
        with without_weights() if is_hollow else contextlib.nullcontext():
            return together(lambda: loading.load_model(settings.model, self.config, settings.dtype, say, device))

    def check_loss(self, model: PreTrainedModel, say: Callable[[str], None]) -> None:
        """Check that the loss depends on all blocks, and say what it does not depend on and what it includes."""
        if self.unreached is None:
            some = itertools.islice(self.data.train, 100)
            example = min(some, key=lambda example: len(example.input_ids))
            with gathered_in_turn(model):
                self.unreached = unreached_by_example(model, collate([example], self.tokenizer.pad_token_id))
        if note := check_reach(self.settings, self.blocks, model, self.unreached):
            say(note)
        if note := loss_note(model):
            say(note)

    def claim_folder(self) -> None:
        """Keep other runs out of the folder (rank 0 holds the lock), and open this rank's log in it."""
        decide(self._claim_folder)
        timeout, keep = self.settings.training.rank_timeout, self.resume is not None
        self.watch.start(self.folder / outputs.LOGS, self.rank, self.world, timeout, keep=keep)

    def _claim_folder(self) -> None:
        self.lock = outputs.claim(self.folder)

    def continue_or_start(self) -> None:
        """Load the checkpoint, or evaluate the untrained model; then open the run's records."""
        self.first_step, best = 0, None
        if self.found:
            state = self.load(self.found)
            self.data.position = state.get("stream")
            self.first_step, best = state["step"], state["best"] if self.settings.training.keep_best else None
            self.say(f"{self.folder}: the run continues after step {self.first_step} ({self.found.path})")
            if note := outputs.layout_note(self.settings, self.world, self.found.about, self.recorded):
                self.say(note)
            is_longer = self.settings.training.max_steps > self.first_step
            if is_longer and (self.folder / "summary.json").exists():
                self.say("note: summary.json and model/ are those of the shorter run until this one ends")
        self.forecast = Forecast(self.settings.training, bool(self.data.eval))
        self.checkpoints = Checkpoints(self.engine, self.settings, self.first_step, best, self.forecast.saved)
        self.last_step = max(self.first_step, self.settings.training.max_steps)
        self.stopping = Stopping(self.settings, self.checkpoints, self.stop, self.watch, self.last_step)
        self.watch.progress()
        if self.found and state["evaluation_is_pending"] and (result := self.evaluate(self.watch.progress)):
            self.checkpoints.is_best(self.first_step, result)
        if self.found:
            before = self.recorded["before"]
        else:
            if self.data.eval:
                self.say(f"evaluating {len(self.data.eval)} held-out examples before training")
            before = self.evaluate(self.watch.progress)
        self.log = None
        self.say_what_it_takes()
        if self.rank == 0:
            if not self.found:
                outputs.clear(self.folder)
            self.log = RunLog(self.folder, self.settings, self.first_step, self.recorded.get("wandb_id"))
            self.recorded = {"identity": self.identity, "before": before, "wandb_id": self.log.wandb_id}
            self.recorded["data"] = self.data.report
            self.record()
        dist.barrier()
        self.stop.nothing_to_lose = None

    def say_what_it_takes(self) -> None:
        """Say how many steps the run takes, what it needs on its drive, and if a signal may end a save too early."""
        steps, a_cycle = self.settings.training.max_steps, cycle_steps(self.engine, self.settings)
        rest, then = 0, 0
        if self.found and self.asked:
            rest = BlockSchedule.steps_left(self.found.about["position"])
            then = len(find_blocks(self.asked, loading.skeleton(self.asked.model, self.config)))
        per_block = self.settings.deepspeed["hift"].get("steps_per_block", 1)
        self.say(f"run: {steps_ahead(steps, self.first_step, len(self.blocks), per_block, rest, then)}")
        if steps < a_cycle:
            self.say(
                f"warning: the run takes {steps} steps, and a cycle over all blocks takes {a_cycle}: some blocks will "
                "not be trained. Raise training.max_steps or training.epochs, or deepspeed.hift.layers_per_block."
            )
        nbytes = getattr(self.engine, "checkpoint_nbytes", None)
        if nbytes is not None:
            if nbytes > drive.PROBE:
                self.forecast.saving = drive.seconds_of_save(self.folder, nbytes, self.engine.device)
            model = sum(numel_of(p) * p.element_size() for p in self.engine.module.parameters())
            together(lambda: self._report_drive(nbytes, model if self.settings.output.export else 0))
        method = METHODS[self.settings.method.name]
        self.grace = GraceNote(
            self.forecast,
            lambda text: self.say(text) if self.log is None else self.log.say(text),
            self.folder / outputs.LOGS / "rank0.log",
            smaller_state(self.engine),
            applies=has_limit() and method.resumable,
        )
        self.grace.begin()

    def _report_drive(self, checkpoint: int, model: int) -> None:
        if self.rank == 0:
            training = self.settings.training
            self.say(drive.room(self.folder, training, checkpoint, model).report(training))

    def load(self, found: Checkpoint) -> dict[str, Any]:
        """Load a checkpoint; return its client state. If its blocks are others, a new cut begins here."""
        state = load_checkpoint(self.engine, found)
        if other_cut(found.about, self.blocks):
            self.say(
                f"note: step {state['step']} ends a cycle over {len(found.about['blocks'])} blocks; the run goes on "
                f"with {len(self.blocks)}"
            )
            schedule = self.engine.lr_scheduler
            tick = getattr(schedule, "last_epoch", 0)
            self.cuts.append(cut_of(self.settings, len(self.blocks), state["step"], tick))
            if isinstance(schedule, LambdaLR):  # the checkpoint has the rate of the next cycle in the other cut
                schedule.last_epoch -= 1
                schedule.step()
        return state

    def record(self) -> None:
        """Write run.json, on rank 0."""
        self.recorded["cuts"] = [asdict(cut) for cut in self.cuts]
        outputs.write_json(self.folder / "run.json", self.recorded | {"settings": self.settings.as_dict()})

    def train(self) -> None:
        """Train to the end of the run, or to the end of the cycle if the settings ask for another cut."""
        pad = self.tokenizer.pad_token_id
        train(self.engine, self.data, pad, self.settings, self.callbacks(), self.first_step)

    def change_blocks(self) -> bool:
        """Make the engine anew with the blocks that the settings ask for, and return whether it was necessary.

        The checkpoint of the cycle's end was saved before. If the run ends here, it continues from that.
        """
        if self.asked is None or self.cycle_end.step in (None, self.last_step):
            return False
        step = self.first_step = self.cycle_end.step
        self.stop.nothing_to_lose = f"the checkpoint of step {step} is whole; continue with --resume"
        self.watch.progress()
        self.engine.destroy()
        self.engine = self.checkpoints.engine = None
        self.forecast.use(lambda steps: 0, 1)  # it holds the engine, too
        gc.collect()  # the engine is in circles of references, and its state would stay beside the next one's
        self.use(self.asked)
        self.asked = None
        self.build_engine(lambda text: None)
        self.checkpoints.engine = self.engine
        found = outputs.find_checkpoint(self.folder, tag(step))
        assert found is not None  # it raises where a tag is missing
        self.load(found)
        if self.log is not None:
            self.record()
        dist.barrier()
        self.stop.nothing_to_lose = None
        return True

    def callbacks(self) -> list[Callback]:
        """Return everything that happens around the steps, in the order in which it happens."""
        training = self.settings.training
        self.held_out = HeldOut(
            training.eval_every, training.max_steps, lambda: self.evaluate(self.stopping.after_batch)
        )
        self.forecast.use(getattr(self.engine, "block_after", lambda steps: 0), cycle_steps(self.engine, self.settings))
        self.cycle_end = CycleEnd(self.checkpoints, ends_training=self.asked is not None)
        return [
            self.forecast,
            self.held_out,
            Records(self.log, self.forecast),
            SkippedSteps(self.engine, self.settings),
            self.checkpoints,
            self.cycle_end,
            self.stopping,
            self.grace,
        ]

    @contextlib.contextmanager
    def saved_if_stopped(self) -> Any:
        """Close the records when the run ends early; if it was asked to stop, its checkpoint is saved by then."""
        try:
            yield
        except Stopped:
            self.stop.leaving = True
            if self.log is not None:
                self.log.close(None)
            # Here the ranks also meet: the launcher ends all ranks as soon as one has exited.
            self.stop.reasons = sorted({reason for own in gather(self.stop.reasons) for reason in own})
            raise
        except UserError:
            if self.log is not None:
                self.log.close(None)
            raise

    def take_best(self) -> None:
        """With `training.keep_best`, load the best checkpoint, so that its model is evaluated and exported.

        Raises:
            UserError: it is missing or damaged.
        """
        best = self.checkpoints.best
        if best is None or best["step"] == self.last_step:
            return
        try:
            found = store.find(self.folder / "checkpoints", tag(best["step"]))
        except CheckpointError as error:
            raise UserError(
                f"training.keep_best: the best checkpoint, of step {best['step']}, cannot be loaded: {error}\n"
                "Restore it and continue with --resume, or export the model of the last step with --resume --set "
                "training.keep_best=false."
            ) from None
        assert found is not None  # `find` raises where a tag is missing
        load_weights(self.engine, found)
        self.say(f"step {best['step']} was the best; its model is used from here on")

    def evaluate_last(self) -> dict[str, Any] | None:
        """Evaluate the trained model, unless the loop has just done so."""
        best, latest = self.checkpoints.best, self.held_out.latest
        if latest and latest[0] == self.last_step and (best is None or best["step"] == self.last_step):
            return latest[1]
        return self.evaluate(self.stopping.after_last_step)

    def evaluate(self, after_batch: Callable[[], None]) -> dict[str, Any] | None:
        """Evaluate the model on the held-out examples."""
        started = time.perf_counter()
        result = evaluate(self.engine, self.data, self.tokenizer, self.settings, after_batch)
        self.forecast.evaluated(time.perf_counter() - started)
        return result

    def export(self) -> None:
        """Write OUT/model, unless `output.export` is false."""
        last = self.last_step
        if self.settings.output.export:
            if self.checkpoints.saved == last:
                self.stop.nothing_to_lose = f"the checkpoint of step {last} is whole; continue with --resume"
            use_cache, files = getattr(self.config, "use_cache", None), self.processor_files
            size = self.settings.output.max_shard_size
            export_model(self.engine, self.tokenizer, self.folder / "model", use_cache, files, size)
            if files:
                self.say(
                    f"note: copied from {self.settings.model.name_or_path} to the exported model: {', '.join(files)}"
                )

    def summarize(self, after: dict[str, Any] | None) -> None:
        """Write and print the summary."""
        memory = summary.peak_memory(self.engine.device)
        if isinstance(self.data.train, Stream):
            self.data.report["train"] |= self.data.train.found.report()
        if hasattr(self.engine, "memory_ledger"):
            memory["memory"] = self.engine.memory_ledger(peak=True)
        if self.log is None:
            return
        result = summary.summarize(
            self.folder, self.settings, self.recorded, after, block_names(self.engine), self.cycles
        )
        result |= {"best": self.checkpoints.best} if self.settings.training.keep_best else {}
        result |= memory | {"time_to_end": self.predicted}
        self.log.close(result)
        outputs.write_json(self.folder / "summary.json", result)
        exported = f"\nmodel              {self.folder / 'model'}" if self.settings.output.export else ""
        self.say(f"\n{summary.report(result)}{exported}")

    def say(self, text: str) -> None:
        """Print on rank 0."""
        logs.say(self.rank, text)
