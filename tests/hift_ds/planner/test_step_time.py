"""Predicted step times: against measurements, the promises for the 7B shape, and what the command says."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest

from hift_ds.config import ConfigError
from hift_ds.planner.api import plan_memory
from hift_ds.planner.command import main
from hift_ds.planner.picture import _step_time
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request
from hift_ds.planner.step_time import Figures, Stepper, StepTimes, chunks, program
from hift_ds.planner.timeline import (
    CARDS,
    FETCH,
    HOST,
    HOST_SECONDS,
    KERNEL,
    MAIN,
    READ,
    STEP,
    STORE,
    TO_DEVICE,
    TO_HOST,
    WEIGHTS,
    WRITE,
    Operation,
    kernel_seconds,
    simulate,
)

H200 = CARDS["h200"]
GIB = 2**30


class Run(NamedTuple):
    """A request."""

    seq_len: int = 512
    zero_stage: int = 2
    activation_checkpointing: bool = False
    method: str = "hift"
    prefetch: int | None = None
    model: str = "llama-7b"
    master: str = "fp32"  # as in the engines that were measured

    def request(self) -> Request:
        return Request(**self._asdict())


SHORT, MEDIUM = Run(), Run(2048)
LONG = Run(8192, zero_stage=0, activation_checkpointing=True)
SMALL = Run(model="llama-3.2-1b")
LORA, LORA_MEDIUM = Run(method="lora"), Run(2048, method="lora")


@functools.cache
def times_of(run: Run) -> tuple[StepTimes, int]:
    """What predicts the times of a run, and its middle block, whose step takes as long as the mean of all."""
    planner = Planner(run.request())
    return StepTimes(planner, "h200"), len(planner.build(planner.request).blocks) // 2


@functools.cache
def figures_of(run: Run) -> Figures:
    times, middle = times_of(run)
    return times.figures(run.request(), middle)


# ---- measurements ---------------------------------------------------------------------------------------------------
# Three machines with an NVIDIA H200 and 16 CPU cores, torch 2.11.0+cu130, random weights of LLaMA-7B's shape in bf16
# (if no other is named), one sequence. The engine of commit 260450c copied after the backward pass, with two slots, and
# at ZeRO 2 the host waited for each chunk before it issued the chunk's step. It launched more kernels than passes and
# step need.
LAUNCHES = {0: 3114, 2: 3082}  # by ZeRO stage, in a step

# Seconds of the host for an operation, by machine: each fitted to one row.
FIRST, SECOND, THIRD = 36e-6, 33e-6, 30e-6  # 2026-11-27, and both others 2026-11-28


def passes(run: Run) -> list[Operation]:
    times, middle = times_of(run)
    found = times.planner.trace(run.request(), middle)
    return found["forward"] + found["backward"]


def of_260450c(run: Run, host: float) -> float:
    """Seconds of a middle block's step of the engine of commit 260450c."""
    times, middle = times_of(run)
    stepper = times.stepper(run.request(), middle)
    result = passes(run)
    done: list[tuple[int, ...]] = [(), ()]
    fetched: list[int] = []
    kernels = len(result) + sum(len(stepper.kernels(slices, MAIN, ())) for slices in stepper.chunks)
    more = max(0, LAUNCHES[run.zero_stage] - kernels) // len(stepper.chunks)  # of each chunk

    def fetch(number: int) -> None:
        if number == len(fetched) < len(stepper.chunks):
            copy = Operation(
                FETCH, TO_DEVICE, nbytes=stepper.nbytes(stepper.chunks[number]) / 3, after=done[number % 2]
            )
            result.extend([copy] * 3)  # of masters and two moments
            fetched.append(len(result) - 1)

    for number, slices in enumerate(stepper.chunks):
        fetch(number)
        fetch(number + 1)
        gradient, *others = stepper.kernels(slices, MAIN, (fetched[number],))
        result.append(gradient)
        if run.zero_stage:
            result.append(Operation(HOST, after=(len(result) - 1,)))
        result += [Operation(MAIN)] * more + others
        last = len(result) - 1
        result += [Operation(STORE, TO_HOST, nbytes=stepper.nbytes(slices) / 3, after=(last,))] * 3
        done[number % 2] = (len(result) - 1,)
    return max(simulate(result, H200, host).done)


def without_copies(run: Run, host: float) -> float:
    """Seconds of a step of BAdam, whose state stays on the device."""
    times, middle = times_of(run)
    stepper = times.stepper(run.request(), middle)._replace(slots=0, defer=False)
    step = stepper.kernels([sum(map(sum, stepper.chunks))], MAIN, ())
    return max(simulate(passes(run) + step, H200, host).done)


def planned(run: Run, host: float) -> float:
    """Seconds of a middle block's step of this engine, or of LoRA."""
    times, middle = times_of(run)
    return StepTimes(times.planner, "h200", host_seconds=host).figures(run.request(), middle).seconds


def alone(run: Run, kind: str) -> float:
    """Seconds of a step's kernels or of its copies to the host, with nothing beside them."""
    times, middle = times_of(run)
    stepper = times.stepper(run.request(), middle)
    operations = program(passes(run), [], [], stepper, 1)[0]
    if kind == KERNEL:
        return kernel_seconds(operations, H200)
    return sum(one.seconds(H200) for one in operations if one.kind == TO_HOST)


def kernels(run: Run, host: float) -> float:
    return alone(run, KERNEL)


def copies(run: Run, host: float) -> float:
    return alone(run, TO_HOST)


# What, the machine, seconds, what predicts them, and the run. The commit is 260450c on the first machine, ec6895f on
# the second where no other is named, and f73ec05 on the third. Left out are the rows with a prefetch budget, which
# faults of the engine made slower: at ec6895f the next forward pass waited for a number behind the copies of a block,
# and f73ec05 fetched all state twice. With two slots it fetched 2 of 37 chunks twice, which changes little.
MEASURED = [
    ("kernels of 8,192 tokens, mean of the machines (fitted)", 0, 0.541, kernels, LONG),
    ("kernels of 8,192 tokens", FIRST, 0.510, kernels, LONG),
    ("kernels of 8,192 tokens", SECOND, 0.547, kernels, LONG),
    ("kernels of 8,192 tokens", THIRD, 0.565, kernels, LONG),
    ("kernels of 512 tokens", FIRST, 0.030, kernels, SHORT),
    ("kernels of 512 tokens", SECOND, 0.0289, kernels, SHORT),
    ("kernels of 512 tokens", THIRD, 0.0291, kernels, SHORT),
    ("copies to the host", FIRST, 0.0465, copies, SHORT),
    ("BAdam, 512 tokens (fitted)", FIRST, 0.083, without_copies, SHORT),
    ("HiFT at 260450c, 512 tokens, ZeRO 2", FIRST, 0.187, of_260450c, SHORT),
    ("HiFT at 260450c, 2,048 tokens, ZeRO 2", FIRST, 0.181, of_260450c, MEDIUM),
    ("HiFT at 260450c, 8,192 tokens with checkpointing, ZeRO 0", FIRST, 0.618, of_260450c, LONG),
    ("LoRA, 512 tokens", FIRST, 0.164, planned, LORA),
    ("LoRA, 2,048 tokens", FIRST, 0.171, planned, LORA_MEDIUM),
    ("HiFT, two slots, 512 tokens (fitted)", SECOND, 0.0791, planned, SHORT),
    ("HiFT, two slots, 512 tokens, LLaMA-3.2-1B", SECOND, 0.0469, planned, SMALL),
    ("HiFT at 260450c, 512 tokens, ZeRO 0", SECOND, 0.124, of_260450c, Run(zero_stage=0)),
    ("HiFT at 260450c, 8,192 tokens with checkpointing, ZeRO 0", SECOND, 0.611, of_260450c, LONG),
    ("BAdam without switches, 512 tokens (fitted)", THIRD, 0.0688, without_copies, SHORT),
    ("HiFT, two slots, 512 tokens", THIRD, 0.0847, planned, SHORT),
    ("LoRA, 512 tokens", THIRD, 0.1426, planned, LORA),
]  # fmt: skip


@pytest.mark.parametrize(("what", "host", "measured", "predict", "run"), MEASURED)
def test_predictions_are_near_the_measurements(
    what: str, host: float, measured: float, predict: Callable[[Run, float], float], run: Run
) -> None:
    assert predict(run, host) == pytest.approx(measured, rel=0.05 if "fitted" in what else 0.25)


def test_the_default_host_is_the_mean_of_the_machines() -> None:
    assert pytest.approx((FIRST + SECOND + THIRD) / 3) == HOST_SECONDS


# ---- promises -------------------------------------------------------------------------------------------------------


def host_of_the_passes(run: Run) -> float:
    """Seconds in which the host issues the model's own forward and backward pass."""
    return HOST_SECONDS * len(passes(run))


def test_a_short_step_takes_little_longer_than_the_host_needs_for_the_model() -> None:
    one = figures_of(SHORT)
    assert one.seconds <= 1.15 * max(one.kernels, one.bus, host_of_the_passes(SHORT)), one


def test_a_long_step_takes_as_long_as_its_kernels() -> None:
    one = figures_of(LONG)
    assert one.limit == "kernels" and one.seconds <= 1.05 * one.kernels, one


def test_a_slow_bus_needs_more_slots() -> None:
    """With two slots, most of a block's state is copied after the backward pass."""
    times, middle = times_of(SHORT)
    times = StepTimes(times.planner, "4090")
    narrow, wide = (times.figures(run.request(), middle) for run in (SHORT, Run(prefetch=5 * GIB // 2)))
    assert wide.hides_copies and not narrow.hides_copies
    assert wide.seconds < 1.05 * wide.kernels < 0.85 * narrow.seconds


def test_an_update_that_is_not_deferred_is_waited_for() -> None:
    times, middle = times_of(MEDIUM)
    deferred, waited = (StepTimes(times.planner, "a100", bool(d)).figures(MEDIUM.request(), middle) for d in (1, 0))
    assert waited.seconds > deferred.seconds + 0.5 * waited.bus


# ---- the program of a step ------------------------------------------------------------------------------------------


def test_chunks_have_all_elements() -> None:
    assert chunks([5, 3, 9], None) == [[5, 3, 9]]
    assert chunks([5, 3, 9], 6) == [[5, 1], [2, 4], [5]]


@pytest.mark.parametrize(("slots", "defer"), [(1, False), (2, False), (2, True), (3, True), (9, True)])
def test_a_slot_holds_one_chunk_at_a_time(slots: int, defer: bool) -> None:
    """Between the copy to it and the copy from it; and a chunk is there when it is stepped."""
    stepper = Stepper([[1], [2, 3], [4], [5]], 2, 2, slots, defer=defer, position=0.5)
    passes = [Operation(MAIN, nbytes=1.0)] * 4
    operations, begins = program(passes, passes, [15], stepper, 3)
    found = simulate(operations, H200, 0.0)
    fetches = [index for index, one in enumerate(operations) if one.kind == TO_DEVICE]
    stores = [index for index, one in enumerate(operations) if one.stream == STORE]
    assert len(begins) == 4 and (begins[-1] < len(operations)) == defer  # the last update is late
    sizes = [one.nbytes for one in (operations[index] for index in stores)]
    assert sizes == [operations[index].nbytes for index in fetches[: len(stores)]]
    assert sum(sizes) == 3 * 4 * 3 * 15
    for number, index in enumerate(stores):
        assert found.done[fetches[number]] <= found.begun[index]
        if number + slots < len(fetches):
            assert found.done[index] <= found.begun[fetches[number + slots]]


def test_a_late_update_begins_in_the_next_forward_pass_and_fetches_in_turns() -> None:
    stepper = Stepper([[1], [2, 3], [4], [5]], 2, 2, 4, defer=True, position=0.8)
    passes = [Operation(MAIN, nbytes=1.0)] * 10
    operations, begins = program(passes, passes, [15], stepper, 3)
    step = operations[begins[1] : begins[2]]
    first = next(index for index, one in enumerate(step) if one.stream != MAIN)
    assert first == 4 and [one.stream for one in step if one.is_copy] == [STORE, FETCH] * 4 + [MAIN]
    (waits,) = [index for index, one in enumerate(step) if one.stream == MAIN and one.after]
    assert step[waits].after == (begins[1] + max(index for index, one in enumerate(step) if one.stream == STEP),)
    assert sum(one.stream == MAIN for one in step[:waits]) == int(0.8 * 9)


def test_the_decision_waits_behind_the_copies_of_the_last_update() -> None:
    stepper = Stepper([[10**8]] * 4, 2, 2, 9, defer=True)
    passes = [Operation(MAIN, nbytes=1.0)] * 4
    operations, begins = program(passes, passes, [15], stepper, 3)
    found = simulate(operations, H200)
    stores = [index for index in range(begins[2]) if operations[index].stream == STORE]
    assert found.issued[begins[2]] >= max(found.done[index] for index in stores) > 0.08


def test_state_on_the_device_is_not_copied() -> None:
    stepper = Stepper([[10, 20]], 2, 4, 0)
    operations, _ = program([Operation(MAIN)], [Operation(MAIN)], [10, 20], stepper, 2)
    assert sum(one.nbytes for one in operations if one.is_copy) < 100  # the decisions to skip


# ---- weights that wait in host memory, and files --------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "active", "defer"), [(1, 0, True), (2, 1, False), (5, 0, True), (5, 3, True)])
def test_layers_take_turns_in_two_slots(layers: int, active: int, defer: bool) -> None:
    """A layer is there when its pass begins, and no copy begins before the slot's layer is done."""
    up = [Operation(MAIN, nbytes=2e9, enters=number) for number in range(layers) for _ in range(2)]
    for index in range(1, len(up), 2):
        up[index] = up[index]._replace(enters=None)
    down = [Operation(MAIN, nbytes=2e9, enters=number) for number in range(layers - 1, active - 1, -1)]
    stepper = Stepper([[10**6]] * 3, 2, 2, 2, defer=defer, position=active / layers, layers=(active,))
    sizes = [1e8 * (1 + number) for number in range(layers)]
    operations, begins = program([Operation(MAIN), *up], [Operation(MAIN), *down], [1], stepper, 3, sizes)
    found = simulate(operations, H200)
    held: dict[int, int] = {}  # slot -> the copy in it
    current, last = None, {0: 0.0, 1: 0.0}  # the layer at work, and when the last use of each slot ended
    for index, one in enumerate(operations):
        if one.stream == WEIGHTS:
            layer = sizes.index(one.nbytes)
            assert found.begun[index] >= last[layer % 2]
            held[layer % 2] = index
        elif one.enters is not None:
            current = one.enters
            copy = held[current % 2]
            assert operations[copy].nbytes == sizes[current] and found.done[copy] <= found.begun[index]
        if one.stream == MAIN and one.nbytes == 2e9 and current is not None:
            last[current % 2] = found.done[index]
    moved = [sizes.index(one.nbytes) for one in operations[begins[1] : begins[2]] if one.stream == WEIGHTS]
    stored = [index for index in range(begins[2]) if operations[index].stream == STORE]
    again = [i for i, one in enumerate(operations) if one.stream == WEIGHTS and one.nbytes == sizes[active]]
    assert any(found.begun[i] >= found.done[stored[2]] for i in again)  # after the host has the new weights
    if layers == 5 and active == 0:  # up, but for layer 1, which the last step left there; and down from layer 2
        assert sorted(moved) == [0, 0, 1, 2, 2, 3, 4]


def test_state_in_files_is_read_a_block_ahead_and_written_behind() -> None:
    stepper = Stepper([[10**7]] * 4, 2, 2, 2, in_files=12)
    passes = [Operation(MAIN, nbytes=1e12)] * 4
    operations, begins = program(passes, passes, [15], stepper, 3)
    found = simulate(operations, H200)
    reads, writes = ([i for i, one in enumerate(operations) if one.kind == kind] for kind in (READ, WRITE))
    fetches = [i for i, one in enumerate(operations) if one.stream == FETCH]
    assert all(found.done[read] <= found.begun[fetch] for read, fetch in zip(reads, fetches, strict=False))
    stores = [i for i, one in enumerate(operations) if one.stream == STORE]
    assert all(found.done[store] <= found.begun[write] for store, write in zip(stores, writes, strict=True))
    step = found.issued[begins[2]] - found.issued[begins[1]]
    assert step < 1.1 * 8 * passes[0].seconds(H200)  # 0.8 s of reads and writes beside 3 s of kernels
    slow = H200._replace(read=1e8, write=1e8)
    found = simulate(operations, slow)
    assert found.issued[begins[2]] - found.issued[begins[1]] >= 12 * 4e7 / 1e8  # it waits for the drive


def test_from_the_batch_that_is_named_copies_cost_at_most_5_percent() -> None:
    wide = {**TINY, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 8192}
    request = Request(wide, seq_len=128, weights="cpu", activation_checkpointing=True)
    times = StepTimes(Planner(request), "4090", host_seconds=0.0)
    least = times.hidden_from(request)
    assert least is not None and least > 2
    there, before = (times.figures(request, 3, size) for size in (least, least - 1))
    assert there.hides_copies and not before.hides_copies
    resident = times.figures(Request(wide, seq_len=128, activation_checkpointing=True), 3, least)
    assert there.seconds <= 1.05 * resident.seconds and there.bus > resident.bus


def test_encoded_state_moves_fewer_bytes_and_takes_more_kernels() -> None:
    request = Request(TINY, seq_len=64, master="fp32")
    times = StepTimes(Planner(request), "h200")
    plain, split, coded = (
        times.stepper(one, 2) for one in (request, Request(TINY, seq_len=64), Request(TINY, seq_len=64, moments="8bit"))
    )
    assert (plain.moved, split.moved, coded.moved) == (12, 10.125, 2.125 + 2 * (1 + 4 / 256))
    assert not plain.codes and 0 < len(split.codes) < len(coded.codes)
    in_files = times.stepper(Request(TINY, seq_len=64, offload_device="nvme", nvme="moments"), 2)
    assert (in_files.moved, in_files.in_files, in_files.defer) == (10.125, 8, False)


# ---- what the command says ------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 128,
}  # fmt: skip


def test_a_plan_has_the_time_of_a_step() -> None:
    plan = plan_memory(TINY, seq_len=64, gpu="h200")
    assert plan.time is not None and plan.time["limit"] == "host" and plan.time["measured"]
    assert len(plan.time["by_block"]) == len(plan.blocks) == 5
    assert plan.time["seconds"] == pytest.approx(sum(plan.time["by_block"]) / 5)
    assert plan.time["tokens_per_second"] == pytest.approx(64 / plan.time["seconds"])
    assert plan.time["bus_hidden_from"] == 1
    assert json.loads(json.dumps(plan.as_dict()))["time"] == plan.time
    assert plan_memory(TINY, seq_len=64).as_dict().get("time") is None


@pytest.mark.parametrize(("method", "moved"), [("hift", True), ("full", False), ("lora", False)])
def test_other_methods_have_times_too(method: str, moved: bool) -> None:
    plan = plan_memory(TINY, seq_len=64, method=method, gpu="a100")
    assert plan.time is not None and (plan.time["bus"] > 0) == moved == (plan.time["bus_hidden_from"] is not None)
    assert any("no step was measured on a100" in note for note in plan.notes)


def test_accumulation_takes_longer_and_keeps_the_rate() -> None:
    one, four = (plan_memory(TINY, seq_len=64, gpu="h200", gradient_accumulation_steps=n).time for n in (1, 4))
    assert one and four and 2 < four["seconds"] / one["seconds"] < 4 and four["bus"] == one["bus"]


def test_the_host_waits_for_copies_of_memory_that_is_not_page_locked() -> None:
    times, middle = times_of(SHORT)
    locked, pageable = (
        times.figures(replace(SHORT.request(), pin_memory=is_locked), middle) for is_locked in (True, False)
    )
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    copies = 2 * 12 * layer / (0.33 * 0.87 * 63e9)  # in both directions, one after the other
    assert pageable.bus == pytest.approx(copies / 2) and locked.bus == pytest.approx(0.33 * copies / 2)
    assert copies + 0.95 * locked.host < pageable.seconds < copies + locked.host + locked.kernels
    assert locked.seconds < 0.5 * pageable.seconds
    on_host = replace(SHORT.request(), weights="cpu", pin_memory=False)
    came = 2 * layer / (0.33 * 0.87 * 63e9)  # a layer's weights: 32 forward, and about 15 backward down to the block
    assert times.figures(on_host, middle).seconds > pageable.seconds + 44 * came


def test_a_plan_without_page_locking_says_so_and_writes_it() -> None:
    locked, pageable = (plan_memory(TINY, seq_len=64, gpu="h200", pin_memory=value) for value in (True, False))
    assert (locked.device, locked.host) == (pageable.device, pageable.host)
    assert any("0.33 of the rate" in note and "no machine was measured" in note for note in pageable.notes)
    assert pageable.request.deepspeed_config()["hift"]["offload"]["pin_memory"] is False
    assert "pin_memory" not in locked.request.deepspeed_config()["hift"].get("offload", {})


def test_more_slots_take_more_memory() -> None:
    two, five = (plan_memory(TINY, seq_len=64, buffer_size=2**16, prefetch=n, master="fp32") for n in (None, 5 * 2**16))
    assert five.device["buffers"] - two.device["buffers"] == 3 * 2**16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "rtx4090"}, "did you mean '4090'"),
        ({"gpu": "3060"}, "--gpu='3060': expected one of .*b200, h200, .*, 3090$"),  # a 4060 is another card
        ({"gpu": "h200", "method": "mezo"}, "--gpu=h200 with --method=mezo"),
        ({"gpu": "h200", "layout": "paper"}, "--layout=paper"),
        ({"gpu": "h200", "offload_optimizer": "cpu"}, "whose processor sets the pace"),
        ({"gpu": "h200", "accelerator": "cpu"}, "--accelerator=cpu"),
        ({"prefetch": 0}, "--prefetch=0: expected bytes"),
        ({"prefetch": 2**30, "offload_step": "block"}, "only the streamed step has slots"),
    ],
)
def test_what_cannot_be_predicted_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_memory(TINY, seq_len=64, **options)


def test_the_command_prints_the_time(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert main(["--model", str(tmp_path), "--seq-len", "64", "--gpu", "3090", "--write-config", f"{tmp_path}/d"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Predicted on 3090: ") and "tokens a second" in last
    assert "The host limits the step. Copies hide behind the rest." in last


@pytest.mark.parametrize(
    ("kernels", "bus", "drive", "host", "limit"),
    [(9, 8, 0, 7, "kernels"), (8, 9, 0, 7, "bus"), (8, 7, 0, 9, "host"), (7, 8, 9, 7, "drive")],
)
def test_what_takes_longest_alone_limits_a_step(kernels: int, bus: int, drive: int, host: int, limit: str) -> None:
    assert Figures(10, kernels, bus, drive, host, 10).limit == limit


@pytest.mark.parametrize(
    ("without_bus", "least", "expected"),
    [
        (9.9, 1, "Copies hide behind the rest."),
        (9, 1, "without them, it would take 9 s. On the middle block, they add at most 5 % with any micro-batch."),
        (9, 4, "On the middle block, they add at most 5 % with micro-batches of 4 or more sequences."),
        (9, None, "a larger --prefetch helps."),
    ],
)
def test_the_sentences_agree_with_the_times(without_bus: float, least: int | None, expected: str) -> None:
    one = Figures(10, 9, 8, 0, 7, without_bus)
    time = {**one._asdict(), "gpu": "l4", "by_block": [10], "limit": one.limit, "hides_copies": one.hides_copies}
    plan = mock.Mock(time={**time, "tokens_per_second": 1, "bus_hidden_from": least}, request=mock.Mock(ranks=1))
    said = _step_time(plan)
    assert said.endswith(expected) and "copies in each direction 8000 ms" in said and "Kernels limit the step." in said
    assert ("Copies hide behind the rest." in said) == (without_bus == 9.9)
