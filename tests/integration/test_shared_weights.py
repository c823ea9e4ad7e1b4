"""``hift.offload.weights: cpu`` on two ranks, which share one copy of the weights in host memory."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from hift_ds.launch.model import loading
from hift_ds.state.step import BlockState
from hift_ds.weights import node
from hift_ds.weights.host import HostWeights
from hift_ds.weights.node import Node
from hift_ds.weights.turns import Turns
from tests.integration.test_host_weights import cycles_with_a_save, different, launched, make, same, trained
from tests.support import integrations, tiny
from tests.support.pairwise import others_slow
from tests.support.poisoned_slots import poisoned
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case
from tests.support.training import arguments, records

WAITING: dict[str, Any] = {"waiting": "cpu", "ranks": 2}
CASES = [
    Case(stage=stage, dtype=dtype, layers_per_block=m, **WAITING)
    for stage, dtypes in ((0, ("bf16", "fp32")), (1, ("bf16", "fp16", "fp32")), (2, ("bf16", "fp16", "fp32")))
    for dtype in dtypes
    for m in (1, 2)
]
CASES += [
    Case(stage=0, dtype="bf16", tied=True, decay_groups=True, steps_per_block=2, clip=0.1, **WAITING),
    Case(stage=2, dtype="bf16", tied=True, checkpointing=True, steps_per_block=2, clip=0.1, **WAITING),
    Case(stage=0, dtype="bf16", max_block_numel=1500, steps_per_block=2, **WAITING),
    Case(stage=1, dtype="bf16", max_block_numel=1500, step="block", **WAITING),
    Case(stage=0, optimizer="Adafactor", tied=True, **WAITING),
    Case(stage=0, dtype="bf16", optimizer="Adafactor", **WAITING),
]
TABLE = [CASES[1], CASES[3], CASES[6], *CASES[-6:-4], *CASES[-2:]]


@pytest.mark.parametrize("case", others_slow(CASES, TABLE), ids=str)
def test_the_place_of_weights_does_not_matter(case: Case) -> None:
    assert run_on_ranks(2, different, case) == [[], []]


FORMATS = [(stage, key, value) for key, value in (("master", "fp32"), ("moments", "8bit")) for stage in (0, 1, 2)]


@pytest.mark.parametrize(("stage", "key", "value"), others_slow(FORMATS, [FORMATS[0], FORMATS[5]]))
def test_with_each_format_of_state(stage: int, key: str, value: str) -> None:
    case = Case(stage=stage, dtype="bf16", layers_per_block=2, decay_groups=True, **WAITING)
    assert run_on_ranks(2, different, case, **{key: value}) == [[], []]


@pytest.mark.parametrize("stage", (0, 2))
def test_with_state_in_files(stage: int, tmp_path: Path) -> None:
    case = Case(stage=stage, dtype="bf16", place="nvme", **WAITING)
    assert run_on_ranks(2, different, case, nvme_path=str(tmp_path)) == [[], []]


def on_machines_of_their_own(case: Case) -> list[str]:
    """In a rank, which takes itself for the only one of its machine: what is not as with weights on the device."""
    with mock.patch.object(node, "machine", lambda: (f"machine {distributed.get_rank()}", "")):
        return different(case)


def test_several_machines_have_a_copy_each() -> None:
    assert run_on_ranks(2, on_machines_of_their_own, CASES[0]) == [[], []]


LAZY = [(case, defer) for case in (CASES[0], CASES[2], CASES[10]) for defer in (False, True)]


@pytest.mark.parametrize(("case", "defer"), others_slow(LAZY, [LAZY[1], LAZY[5]]), ids=str)
def test_nothing_is_read_or_overwritten_too_early(case: Case, defer: bool) -> None:
    assert run_on_ranks(2, different, case, lazy=True, defer=defer) == [[], []]


# ---- what happens without each part of the order between ranks ----------------------------------------------------


@contextlib.contextmanager
def late(rank: int, owner: Any, name: str, seconds: float = 0.02) -> Iterator[None]:
    """One rank sleeps before each call of a method."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if distributed.get_rank() == rank:
            time.sleep(seconds)
        return method(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield


def _reduced_before_the_events(own: Node, events: Any) -> Any:
    own.meet_on_device()
    with own._lane.after(*events):
        return own._lane.mark()


def _nothing(*_: Any) -> None:
    return None


# Its moments depend on the weights.
DECAYING = Case(stage=0, optimizer="Adam", decay_groups=True, **WAITING)
# name: who is late, in front of what, what is removed, of which case, with lazy streams
MISSING: dict[str, tuple[int, tuple[Any, str], tuple[Any, str, Callable[..., Any]], Case, bool]] = {
    "all parts are written": (0, (BlockState, "_store_results"), (Node, "after_all", _nothing), CASES[10], False),
    "the first rank has written": (0, (BlockState, "_store_results"), (Node, "after_all", _nothing), CASES[0], False),
    "events of the writer": (0, (Turns, "prepare"), (Node, "after_all", _reduced_before_the_events), CASES[10], True),
    "masters are fetched": (1, (BlockState, "_fetch"), (Node, "meet_on_device", _nothing), DECAYING, False),
    "upper halves are fetched": (1, (BlockState, "_fetch"), (Node, "meet_on_device", _nothing), CASES[0], False),
}


def without(name: str, is_removed: bool) -> bool:
    """In a rank: whether training beside a late rank goes wrong. State is fetched in the step alone."""
    rank, slow, removed, case, lazy = MISSING[name]
    truth = trained(replace(case, waiting="device"), prefetch=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(late(rank, *slow))
        if is_removed:
            stack.enter_context(mock.patch.object(*removed))
        return not same(trained(case, lazy, prefetch=False), truth)


LATE = ["all parts are written", "events of the writer", "upper halves are fetched"]


@pytest.mark.parametrize("name", others_slow(MISSING, LATE))
def test_a_late_rank_is_waited_for(name: str) -> None:
    assert run_on_ranks(2, without, name, False) == [False, False]
    assert any(run_on_ranks(2, without, name, True))


def loss_after_loading(is_removed: bool) -> float:
    """In a rank: the loss of other weights, which are loaded beside a late first rank."""
    engine = make(CASES[10])
    other = {name: value * 0.5 for name, value in engine.module.state_dict().items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(late(0, HostWeights, "settle"))
        if is_removed:
            stack.enter_context(mock.patch.object(Node, "meet", _nothing))
        engine.module.load_state_dict(other)
        engine.eval()
        with torch.no_grad():
            loss = float(engine(**tiny.micro_batch(0, 0)).loss)
    distributed.barrier()
    engine.destroy()
    return loss


def test_the_rank_that_loads_weights_is_waited_for() -> None:
    first, second = run_on_ranks(2, loss_after_loading, False)
    assert first == second
    first, second = run_on_ranks(2, loss_after_loading, True)
    assert first != second


# ---- between steps ------------------------------------------------------------------------------------------------


CONTINUED = [CASES[0], CASES[2], CASES[10]]


@pytest.mark.parametrize("case", others_slow(CONTINUED, [CASES[10]]), ids=str)
def test_a_run_continues_from_a_checkpoint(case: Case, tmp_path: Path) -> None:
    found = run_on_ranks(2, cycles_with_a_save, case, str(tmp_path / "cpu"))
    assert all(same(continued, ours) for ours, continued, _ in found)
    on_device = replace(case, waiting="device")
    of_truth = run_on_ranks(2, cycles_with_a_save, on_device, str(tmp_path / "device"))
    for (ours, _, loaded), (truth, _, loss) in zip(found, of_truth, strict=True):
        assert same(ours, truth) and loaded == loss


def changed_between_steps(case: Case) -> Any:
    """In a rank: what a training becomes whose weights, masters and skipped steps are handled by a script."""
    from deepspeed.utils import safe_set_full_fp32_param

    rank = distributed.get_rank()
    with poisoned():
        engine = make(case)
        seen: list[Any] = []
        for step in range(3):
            seen += tiny.optimizer_step(engine, step)
        state = {name: value.clone() for name, value in engine.module.state_dict().items()}
        engine.module.load_state_dict({name: value * 0.5 for name, value in state.items()})
        seen += tiny.optimizer_step(engine, 3)
        if case.stage:
            named = dict(engine.module.named_parameters())
            name = engine.blocks[1].parameter_names[0]
            value = torch.linspace(-1, 1, named[name].numel()).view(named[name].shape)
            safe_set_full_fp32_param(named[name], value)
            seen += tiny.optimizer_step(engine, 4)
        before = tiny.weights(engine)
        loss = engine(**tiny.micro_batch(5, 0, rank)).loss
        engine.backward(loss * (torch.nan if rank else 1.0))
        engine.step()
        engine.backward(engine(**tiny.micro_batch(5, 1, rank)).loss)
        engine.step()
        assert not engine.was_step_applied() and tiny.identical(tiny.weights(engine), before)
        ids = tiny.micro_batch(0, 0)["input_ids"]
        if rank:  # beside a rank that goes on
            engine.eval()
            with torch.no_grad():
                seen.append(engine.module(ids).logits)
                seen.append(engine.module.generate(ids, max_new_tokens=5, do_sample=False))
            engine.train()
        for step in range(6, 8):
            seen += tiny.optimizer_step(engine, step)
        weights = tiny.weights(engine)
        engine.destroy()
        left = dict(engine.module.named_parameters())
        assert tiny.identical(tiny.copies(left), weights)
        distributed.barrier()
        for parameter in left.values():
            parameter.data.fill_(rank)
        distributed.barrier()
        assert all((parameter == rank).all() for parameter in left.values())
        return seen, weights


HANDLED = [CASES[0], CASES[2], CASES[6], CASES[10]]


@pytest.mark.parametrize("case", others_slow(HANDLED, [CASES[0], CASES[10]]), ids=str)
def test_what_a_script_does_between_steps(case: Case) -> None:
    ours = run_on_ranks(2, changed_between_steps, case)
    truth = run_on_ranks(2, changed_between_steps, replace(case, waiting="device"))
    for (seen, weights), (expected, wanted) in zip(ours, truth, strict=True):
        assert tiny.identical(weights, wanted)
        assert tiny.identical(tiny.tensors(seen), tiny.tensors(expected))
        assert [one for one in seen if isinstance(one, float)] == [one for one in expected if isinstance(one, float)]


# ---- what cannot be shared ----------------------------------------------------------------------------------------


def refused(case: Case, reason: str) -> str:
    """In a rank: the message of the error."""
    rank = distributed.get_rank()
    cause: Any = {
        "several machines": mock.patch.object(node, "machine", lambda: (f"machine {rank}", "")),
        "model parallelism": mock.patch.object(node, "check_ranks", node.check_ranks),
        "no access": mock.patch.object(node.os, "open", mock.Mock(side_effect=PermissionError(13, "not allowed"))),
        "another process": mock.patch.object(node.os, "getpid", lambda: 1),
        "no memory": mock.patch.object(node, "Region", mock.Mock(side_effect=MemoryError("a test"))),
    }[reason]
    mpu = mock.Mock(get_model_parallel_world_size=lambda: 2) if reason == "model parallelism" else None
    if mpu is not None:
        with pytest.raises(ValueError) as raised:
            node.check_ranks(0, mpu)
        return str(raised.value)
    with cause, pytest.raises((ValueError, MemoryError)) as raised:
        make(case)
    return str(raised.value)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("several machines", ("on 2 machines", "stage=2", "offload_param.device='cpu'")),
        ("model parallelism", ("model-parallel ranks have different ones", "weights='device'")),
        ("no access", ("rank 1:", "not allowed", "as one user in one container")),
        ("another process", ("rank 1:", "/proc/1/fd", "as one user in one container")),
        ("no memory", ("weights: ", "rank 0: a test", "rank 1: a test", "weights='device'")),
    ],
)
def test_what_is_refused(reason: str, words: tuple[str, ...]) -> None:
    first, second = run_on_ranks(2, refused, CASES[10], reason)
    assert first == second and all(word in first for word in words)


def test_memory_that_cannot_be_page_locked_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    own = Node(torch.device("cpu"), True)
    region = mock.Mock(register=mock.Mock(side_effect=RuntimeError("limit\nmore")))
    with mock.patch.object(node.logger, "warning") as warning:
        own._pins = True
        own._page_lock(region)
    assert not own._pins and "(limit)" in warning.call_args.args[0] and "ulimit -l" in warning.call_args.args[0]


def launched_from_files(argv: list[str]) -> bool:
    """In a rank: whether it has loaded the weights, in a run of the command."""
    load, seen = loading.load_model, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        seen.append(any(parameter.any() for parameter in model.parameters()))
        return model

    with mock.patch.object(loading, "load_model", watched):
        launched(argv)
    return seen[0]


def test_a_run_of_the_command(tmp_path: Path) -> None:
    """With held-out scores, a checkpoint, and an export. With weights that are shared, one rank loads them."""
    found, files = [], integrations.model_folder(tmp_path / "files")
    for waiting in ("device", "cpu"):
        out = tmp_path / waiting
        options = ("training.max_steps=4", "training.save_every=3", f"deepspeed.hift.offload.weights={waiting}")
        model = (f"model.name_or_path={files}", "model.config=null", "model.tokenizer=null")
        loaded = run_on_ranks(2, launched_from_files, arguments(out, *options, *model))
        assert loaded == [True, waiting == "device"]
        model = load_file(out / "model" / "model.safetensors")
        found.append(([(record["loss"], record.get("eval")) for record in records(out)], model))
    (truth, weights), (losses, ours) = found
    assert losses == truth and tiny.identical(ours, weights)
