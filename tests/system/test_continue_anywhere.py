"""A run continues with another number of ranks, another ZeRO stage, other blocks and another placement of weights.

Through the real launcher. A run is saved in one layout and continued in another. What the second one holds right after
loading is what the first one held when it saved: weights, masters, moments and update counts by parameter name, bit for
bit. In the end, it is what a plain loop in this process makes of the saved state.
"""

import hashlib
import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hift_ds.checkpoint import command
from hift_ds.launch.config.settings import load_settings
from tests.support.jobs import launch
from tests.support.pairwise import others_slow
from tests.support.paths import REPOSITORY
from tests.support.tiny import DTYPES
from tests.support.training import TINY, arguments, records, summary

MOMENTS = ("exp_avg", "exp_avg_sq")
FROZEN = "model.layers.1.mlp.down_proj.weight"
STEPS, IN_CYCLE, CYCLE_END = 18, 9, 12  # of the run; with one layer to a block, a cycle has six steps
EXAMPLES, BATCH, RATE = 64, 4, 3e-3
EPS = 1e-6  # with Adam's usual 1e-8, the rounding of gradients near zero becomes whole steps
SETTINGS = (
    *("data.eval_examples=0", f"data.train_examples={EXAMPLES}", f"training.max_steps={STEPS}"),
    *(
        "training.save_every=3",
        "training.keep_last=null",
        "training.lr_schedule=linear",
        f"deepspeed.hift.freeze=[{FROZEN}]",
    ),
    "deepspeed.optimizer=" + json.dumps({"type": "AdamW", "params": {"eps": EPS}}),
)


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks and memory."""

    ranks: int
    stage: int
    weights: str = "device"  # or "host"

    def __str__(self) -> str:
        return f"{self.ranks}x{self.stage}{'h' * (self.weights == 'host')}"

    @property
    def settings(self) -> tuple[str, ...]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = 1000  # matrices are gathered, vectors persist
        if self.stage == 3 and self.weights == "host":
            zero["offload_param"] = {"device": "cpu"}
        found = [f"deepspeed.zero_optimization={json.dumps(zero)}"]
        if self.stage < 3 and self.weights == "host":
            found.append("deepspeed.hift.offload.weights=cpu")
        return tuple(found)


LAYOUTS = [Layout(*values) for values in itertools.product((1, 2), (0, 2, 3), ("device", "host"))]


@dataclass(frozen=True)
class Pair:
    """A run that is saved after `step` with one layer in a block, and continued with two."""

    before: Layout
    after: Layout
    dtype: str
    step: int

    def __str__(self) -> str:
        return f"{self.before}-{self.after}-{self.dtype}-{self.step}"


def pairs() -> list[Pair]:
    """Every pair of ranks and stages, in both dtypes; the weights' places and the step take turns."""
    places, steps = itertools.product(("device", "host"), repeat=2), (IN_CYCLE, CYCLE_END)
    turns = itertools.cycle(itertools.product(places, steps))
    spreads = list(itertools.product((1, 2), (0, 2, 3)))
    found = []
    for dtype, one, other in itertools.product(("fp32", "bf16"), spreads, spreads):
        (first, second), step = next(turns)
        found.append(Pair(Layout(*one, first), Layout(*other, second), dtype, step))
    return found


# What the default run kills and continues: other ranks, another stage, another place of the weights, within a cycle.
(SAMPLE,) = (pair for pair in pairs() if str(pair) == "2x3-1x0h-bf16-9")
(ANOTHER,) = (pair for pair in pairs() if str(pair) == "2x2-1x0-fp32-9")
KILLED = [(pair, moment) for pair in (SAMPLE, ANOTHER) for moment in ("loading", "saving")]


def watched(out: Path, layout: Layout, *settings: str, resume: str | None = None, **variables: str) -> Any:
    """Run `tests/support/watched_training.py` in a layout; what it wrote is in the folder beside `out`."""
    argv = arguments(out, *SETTINGS, *layout.settings, *settings, resume=resume)
    seen = out.with_name(f"{out.name}.seen")
    variables |= {"HIFT_WATCHED": str(seen), "PYTHONPATH": str(REPOSITORY)}
    done = launch(layout.ranks, argv, script="tests/support/watched_training.py", **variables)
    return done, seen


def of_dtype(dtype: str) -> str:
    return f"deepspeed.bf16.enabled={str(dtype == 'bf16').lower()}"


@pytest.fixture(scope="session")
def first_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make, once for each layout, a run with one layer in a block."""
    made: dict[tuple[Layout, str], Path] = {}

    def get(layout: Layout, dtype: str) -> Path:
        if (layout, dtype) not in made:
            out = tmp_path_factory.mktemp("first") / "run"
            done, _ = watched(out, layout, of_dtype(dtype))
            assert done.returncode == 0, done.stdout + done.stderr
            made[layout, dtype] = out
        return made[layout, dtype]

    return get


def copied(run: Path, out: Path, step: int) -> Path:
    """Copy a run as it was after its checkpoint of a step."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("model", "summary.json", "logs"))
    for checkpoint in (out / "checkpoints").glob("step*"):
        if int(checkpoint.name[4:]) > step:
            shutil.rmtree(checkpoint)
    (out / "checkpoints" / "latest").write_text(f"step{step}")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("pair", pairs(), ids=str)
def test_a_run_continues_in_another_layout(pair: Pair, first_runs: Any, tmp_path: Path) -> None:
    before = first_runs(pair.before, pair.dtype)
    out = copied(before, tmp_path / "run", pair.step)
    check_continued(pair, before, out, *continued(pair, out))


def continued(pair: Pair, out: Path, **variables: str) -> Any:
    """Continue a run in the other layout, with two layers in a block."""
    two = ("deepspeed.hift.layers_per_block=2", of_dtype(pair.dtype))
    return watched(out, pair.after, *two, resume="yes", **variables)


def check_continued(pair: Pair, before: Path, out: Path, done: Any, seen: Path) -> None:
    first = before.with_name("run.seen")
    assert done.returncode == 0, done.stdout + done.stderr
    check_said(pair, done.stdout)

    # Right after loading: bit for bit what was saved.
    saved = torch.load(first / f"saved-{pair.step}.pt")
    assert_same(torch.load(seen / f"loaded-{pair.step}.pt"), saved)
    if pair.step == IN_CYCLE:  # the rest of the cycle was trained with the old blocks, and saved
        saved = torch.load(seen / f"saved-{CYCLE_END}.pt")
        assert_same(torch.load(seen / f"loaded-{CYCLE_END}.pt"), saved)

    # In the end: what a plain loop makes of what was saved.
    end = torch.load(seen / "end.pt")
    assert Plain(first, pair.step, pair.dtype).error(end) < (1e-5 if pair.dtype == "fp32" else 0.1)
    counts = {name: int(value) for name, value in end.items() if name.startswith("updates ")}
    assert set(counts.values()) == {CYCLE_END // 6 + (STEPS - CYCLE_END) // 3}
    check_records(out)
    check_samples(first, seen, pair.step)
    assert command.main(["verify", str(out / "checkpoints")]) == 0


@pytest.mark.parametrize(("pair", "moment"), others_slow(KILLED, [(SAMPLE, "saving")]), ids=str)
def test_killed_while_it_converts(pair: Pair, moment: str, first_runs: Any, tmp_path: Path) -> None:
    """While it loads, and while it saves the first checkpoint in the other layout: the old one is whole."""
    before = first_runs(pair.before, pair.dtype)
    out = copied(before, tmp_path / "run", pair.step)
    files = {path: path.read_bytes() for path in (out / "checkpoints").glob("step*/*")}
    done, seen = continued(pair, out, HIFT_KILLED=moment)
    assert done.returncode != 0 and "Traceback" not in done.stdout + done.stderr
    assert (seen / f"saved-{CYCLE_END}.pt").exists() == (moment == "saving"), "it was not killed there"
    assert files and all(path.read_bytes() == content for path, content in files.items())
    assert command.main(["verify", str(out / "checkpoints")]) == 0
    done, seen = continued(pair, out)
    assert f"continues after step {pair.step}" in done.stdout, done.stdout + done.stderr
    check_continued(pair, before, out, done, seen)


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Compare to the last bit. Where the weights are their own masters, only some stages have both."""
    assert ours.keys() == truth.keys()
    different = [name for name in truth if not torch.equal(ours[name], truth[name])]
    assert not different, different


def check_said(pair: Pair, printed: str) -> None:
    """The layout in one line, and the blocks."""
    for name, (now, was) in {
        "ranks": (pair.after.ranks, pair.before.ranks),
        "ZeRO stage": (pair.after.stage, pair.before.stage),
    }.items():
        assert (f"{name} {now} (before: {was})" in printed) == (now != was), printed
    assert f"step {CYCLE_END} ends a cycle over 6 blocks; the run goes on with 3" in printed
    assert ("is in the middle of a cycle over 6 blocks" in printed) == (pair.step == IN_CYCLE)


def check_records(out: Path) -> None:
    """Blocks, cycles and learning rates of all steps, and the summary of both cuts."""
    found = records(out)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert [record["block"] for record in found] == [*range(6), *range(6), *range(3), *range(3)]
    assert [record["cycle"] for record in found] == [0] * 6 + [1] * 6 + [2] * 3 + [3] * 3
    rates = [1.0] * 6 + [2 / 3] * 6 + [1 / 3] * 3 + [1 / 6] * 3  # a third of the schedule is left for two cycles
    assert [record["learning_rate"] for record in found] == pytest.approx([3e-3 * rate for rate in rates])
    result = summary(out)
    assert result["cycles"] == 4 and result["blocks"] == 3 and result["updates_per_block"] == [2] * 3
    first, second = result["cuts"]
    assert first["blocks"] == 6 and first["updates_per_block"] == [2] * 6 and first["first_step"] == 1
    assert first["block_names"][0] == "embeddings" and first["block_names"][-1] == "head"
    assert second["first_step"] == CYCLE_END + 1 and second["block_names"] == result["block_names"]
    assert second["block_names"][1] == "model.layers.1-2"


def batches_of(seen: Path, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a step, of all ranks."""
    return [torch.load(path) for path in sorted(seen.glob(f"batch-{step}-*.pt"))]


def samples_of(seen: Path, step: int) -> list[str]:
    """A hash of the tokens of each example of a step, sorted."""
    found = []
    for batch in batches_of(seen, step):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found.append(hashlib.sha256(str(ids[mask.bool()].tolist()).encode()).hexdigest())
    return sorted(found)


def check_samples(first: Path, second: Path, step: int) -> None:
    """After the step, the continued run takes the examples that the first one takes: none twice, and none left out."""
    taken = [samples_of(first if number <= step else second, number) for number in range(1, STEPS + 1)]
    assert taken == [samples_of(first, number) for number in range(1, STEPS + 1)]
    epoch = [sample for of_step in taken[: EXAMPLES // BATCH] for sample in of_step]
    assert len(epoch) == len(set(epoch)) == EXAMPLES
    assert all(not batches_of(second, number) for number in range(1, step + 1))


class Plain:
    """The rest of the training in one process, by torch alone: an AdamW step for each parameter of a block.

    Args:
        first: what the first run wrote: the state after `step`, and the batches of all later steps.
    """

    def __init__(self, first: Path, step: int, dtype: str) -> None:
        state = torch.load(first / f"saved-{step}.pt")
        settings = load_settings(TINY, [*SETTINGS, "output.dir=runs/none"])
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings.model.config, vocab_size=262))
        self.model = self.model.to(DTYPES[dtype])
        self.named = {name: p for name, p in self.model.named_parameters() if name != FROZEN}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[f"weight {name}"])
        names = list(self.named)
        layers = [[n for n in names if "embed" in n], *([n for n in names if f".layers.{i}." in n] for i in range(4))]
        self.layers = [*layers, ["model.norm.weight"]]
        shaped = {name: parameter.shape for name, parameter in self.named.items()}
        self.masters = {name: state[f"master {name}"].view(shape).clone() for name, shape in shaped.items()}
        self.moments = {
            name: [state.get(f"{key} {name}", torch.zeros(shape)).view(shape).clone() for key in MOMENTS]
            for name, shape in shaped.items()
        }
        self.counts = {name: int(state[f"updates {name}"]) for name in names}
        self.start = {name: master.clone() for name, master in self.masters.items()}
        for number in range(step + 1, STEPS + 1):
            self.step(number, batches_of(first, number))

    def step(self, number: int, batches: list[dict[str, Tensor]]) -> None:
        """Take a step (from 1): the first cycles have one layer in a block, the later ones two."""
        if number <= CYCLE_END:
            block, rate = self.layers[(number - 1) % 6], 1 - (number - 1) // 6 / 3
        else:
            cycle, place = divmod(number - CYCLE_END - 1, 3)
            block, rate = [*self.layers[2 * place], *self.layers[2 * place + 1]], (2 - cycle) / 6
        targets = sum(len(batch["values"]) for batch in batches)
        self.model.zero_grad()
        for batch in batches:
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            chosen = logits[:, batch["kept"]].flatten(0, 1)[batch["rows"]].float()
            (torch.nn.functional.cross_entropy(chosen, batch["values"], reduction="sum") / targets).backward()
        gradients = {name: self.named[name].grad.float() for name in block}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        for name, gradient in gradients.items():
            gradient = gradient / max(1.0, norm + 1e-6)
            self.counts[name] += 1
            first, second = self.moments[name]
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            ours, theirs = 1 - 0.9 ** self.counts[name], 1 - 0.999 ** self.counts[name]
            self.masters[name] -= RATE * rate * (first / ours) / ((second / theirs).sqrt() + EPS)
            with torch.no_grad():
                self.named[name].copy_(self.masters[name])

    def error(self, end: dict[str, Tensor]) -> float:
        """The L2 error of the whole update of the masters, relative to the update."""
        wrong = size = 0.0
        for name, truth in self.masters.items():
            wrong += float((end[f"master {name}"] - truth.flatten()).double().square().sum())
            size += float((truth - self.start[name]).double().square().sum())
        return math.sqrt(wrong / size)
