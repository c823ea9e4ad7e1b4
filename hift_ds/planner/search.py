"""Find whether a run fits on a device, the cheapest change that makes it fit, and the largest sizes that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from hift_ds.config import ConfigError
from hift_ds.planner.accounting import MOMENTS
from hift_ds.planner.plan import Plan, Planner, TooManyOperationsError
from hift_ds.planner.request import ENCODED, Request
from hift_ds.planner.step_time import StepTimes, problems

_MAX_SEQ_LEN, _MAX_BATCH_SIZE = 2**20, 2**14  # a search ends here
_MOST_OPERATIONS = 1_500_000  # of a plan and its search: about a minute
_TOKENS = 64  # the search tries multiples of this sequence length
_OF_THE_STREAMED_STEP = ("nvme", "weights", "master", "moments", "prefetch", "buffer_size")

T = TypeVar("T")


def default_host_reserve(ranks: int) -> int:
    """Return the bytes of a machine's memory to keep free: 2 GiB for the system, and 2 GiB for each rank's process."""
    return 2**31 * (1 + ranks)


class Fit:
    """Answers what fits on a device and a machine, and which change makes a request fit.

    Args:
        planner: plans the variants of the request.
        memory: bytes of the device.
        reserve: bytes of the device that stay free.
        host_memory: bytes of the memory of the machine that has all ranks; None: enough.
        times: predicts step times, by which changes are compared; None: the first change in the order of their cost
            is taken.
        drive: the folder in which state may be in files; None: in none.
        drive_room: free bytes of the drive with the files; None: not known.
    """

    def __init__(
        self,
        planner: Planner,
        memory: int,
        reserve: int,
        host_memory: int | None = None,
        times: StepTimes | None = None,
        drive: str | None = None,
        drive_room: int | None = None,
    ):
        self.planner, self.memory, self.reserve, self.room = planner, memory, reserve, memory - reserve
        self.host_memory, self.times, self.drive, self.drive_room = host_memory, times, drive, drive_room

    def answer(self, plan: Plan) -> Plan:
        """Set the plan's ``fit`` and ``fitting``, and return the plan.

        ``fit`` holds ``gpu_memory``, ``reserve``, ``fits``, ``change`` (the change that makes the request fit, or
        None), ``positions`` of the model, and ``not_searched`` (names of what would take too long). If anything fits it
        also holds ``device_total``, ``host_total`` and ``nvme_total`` of a rank, ``longest_sequence`` (tokens) and
        ``largest_batch`` (sequences in a micro-batch) of the request with the change.

        With ``drive_room``, ``fit`` also holds it. With ``host_memory``, it holds ``host_memory`` and
        ``host_reserve``. With a predicted time, it holds
        ``seconds`` of a step with the change and ``hidden_from``, the sequences in a micro-batch from which copies
        take at most 5 % of its time. If nothing fits, ``missing`` has the bytes that are missing on the ``device``, on
        the ``host`` and in files (``nvme``) with the ``closest`` change, and ``helps`` names what would help most.
        """
        self.planner.limit = _MOST_OPERATIONS
        fits = self._total_of(plan) <= self.room and self._fits_machine(plan.request)
        plan.fit = {"gpu_memory": self.memory, "reserve": self.reserve, "fits": fits}
        plan.fit |= {"change": None, "longest_sequence": None, "largest_batch": None}
        plan.fit |= {"positions": plan.positions, "not_searched": []}
        if self.drive_room is not None:
            plan.fit |= {"drive_room": self.drive_room}
        if self.host_memory is not None:
            plan.fit |= {"host_memory": self.host_memory, "host_reserve": default_host_reserve(plan.request.ranks)}
        changes: list[str] = []
        request: Request | None = plan.request
        if not plan.fit["fits"]:
            found = self._unless_long(plan, "change", lambda: self._cheapest_change(plan.request))
            changes, request = found or ([], None)
        if request is not None:
            changed = self.planner.plan(request) if changes else plan
            positions = self.planner.build(request).positions
            limit = positions.tokens if positions.table and positions.tokens else _MAX_SEQ_LEN
            plan.fit |= {"change": " and ".join(changes) or None, "device_total": self._total_of(changed)}
            plan.fit |= {"host_total": sum(changed.host.values()), "nvme_total": sum(changed.nvme.values())}
            if self.times and plan.time and changes:
                plan.fit |= {"seconds": self.times.mean(request), "hidden_from": self.times.hidden_from(request)}
            longest = self._unless_long(
                plan, "longest_sequence", partial(self.largest, request, "seq_len", _TOKENS, limit)
            )
            # A batch with as many tokens.
            guess = longest * request.batch_size // request.seq_len if longest else None
            self._unless_long(
                plan, "largest_batch", partial(self.largest, request, "batch_size", 1, _MAX_BATCH_SIZE, guess)
            )
            plan.fitting = request
        elif "change" not in plan.fit["not_searched"]:
            plan.fit |= self._unless_long(plan, "missing", lambda: self._missing(plan.request)) or {}
        return plan

    def _unless_long(self, plan: Plan, name: str, search: Callable[[], T]) -> T | None:
        """Return what a search finds, and write a size into ``plan.fit``. Name it there if it takes too long."""
        assert plan.fit is not None
        try:
            found = search()
        except TooManyOperationsError:
            plan.fit["not_searched"].append(name)
            return None
        if isinstance(found, int):
            plan.fit[name] = found
        return found

    def _cheapest_change(self, request: Request) -> tuple[list[str], Request] | None:
        """Return the names of the cheapest changes that make a request fit, and the changed request.

        Changes of where and how state waits come last, those that change numbers after those that do not: state in
        host memory, then in 8 bits, then in files. With a card, the fastest of the changes that fit with the least of
        these is taken, otherwise the first.
        """
        states = [(changes, base) for changes, base in _states(request, self.drive) if self._fits_machine(base)]
        for names, base in states:
            fitting = ((names + changes, changed) for changes, changed in self._changes(base) if self.fits(changed))
            if not self.times:
                if first := next(fitting, None):
                    return first
            elif found := list(fitting):
                return min(found, key=lambda change: self._seconds(change[1]))
        more = ((names + changes, changed) for names, base in states for changes, changed in self._last_changes(base))
        return next((change for change in more if self.fits(change[1])), None)

    def _seconds(self, request: Request) -> float:
        """Return the predicted time of a step, or infinity where there is no prediction."""
        assert self.times is not None
        if problems(request, self.times.name):
            return math.inf
        return self.times.figures(request, len(self.planner.build(request).blocks) // 2).seconds

    def _missing(self, request: Request) -> dict[str, Any]:
        """Return what is missing with the closest change, and what would help most: see :meth:`answer`."""
        closest: tuple[int, list[str], dict[str, int]] | None = None
        for names, base in _states(request, self.drive):
            for changes, changed in [([], base), *places(base)]:
                try:
                    device = sum(self.planner.plan(changed).device.values()) - self.room
                    host = self._host_total(changed) - (self._host_room(changed) or 0)
                    files = self._file_total(changed) - (self.drive_room or 0)
                except ConfigError:
                    continue
                missing = {"device": max(0, device), "host": max(0, host) if self.host_memory is not None else 0}
                missing["nvme"] = max(0, files) if self.drive_room is not None else 0
                if closest is None or sum(missing.values()) < closest[0]:
                    closest = sum(missing.values()), names + changes, missing
        assert closest is not None
        _, changes, missing = closest
        in_files = request.offload_device == "nvme" or self.drive is not None
        if missing["host"] and not in_files and request.method == "hift":
            helps = "state in files on a drive (--nvme-path FOLDER)"
        elif missing["nvme"] or missing["host"] and self._lacks_drive(request):
            helps = "more host memory, or more free space on the drive"
        elif missing["device"]:
            helps = "shorter sequences, smaller blocks (--max-block-numel) or more GPUs (--ranks)"
        else:
            helps = "more host memory, or GPUs in several machines"
        return {"missing": missing, "closest": " and ".join(changes) or None, "helps": helps}

    def _host_total(self, request: Request) -> int:
        """Return the bytes of host memory that all ranks need together."""
        plan = self.planner.plan(request) if request.checkpoint_offload else None
        sizes = plan.host if plan else self.planner.off_device(request, "host")
        shared = sizes["parameters"] if request.weights == "cpu" else 0  # one copy, counted at the first rank
        return request.ranks * (sum(sizes.values()) - shared) + shared

    def _file_total(self, request: Request) -> int:
        """Return the bytes of files that all ranks need together."""
        return request.ranks * sum(self.planner.off_device(request, "nvme").values())

    def _lacks_drive(self, request: Request) -> bool:
        """Return whether files would need more than the free space of the drive."""
        bases = (base for _, base in _states(request, self.drive) if not base.problems())
        return self.drive_room is not None and any(self._file_total(base) > self.drive_room for base in bases)

    def _host_room(self, request: Request) -> int | None:
        return None if self.host_memory is None else self.host_memory - default_host_reserve(request.ranks)

    def _fits_machine(self, request: Request) -> bool:
        """Return whether state and weights fit in host memory and on the drive. A request with problems does not."""
        room = self._host_room(request)
        try:
            fits_drive = self.drive_room is None or self._file_total(request) <= self.drive_room
            return fits_drive and (room is None or self._host_total(request) <= room)
        except ConfigError:
            return False

    @staticmethod
    def _total_of(plan: Plan) -> int:
        return sum(plan.device.values())

    def fits(self, request: Request) -> bool:
        """Return whether a request fits. A request with problems does not."""
        try:
            blocks = self.planner.build(request).bounding_blocks()
        except ConfigError:  # the change conflicts with the rest of the request
            return False
        if any(self.planner.least(request, block) > self.room for block in blocks) or not self._fits_machine(request):
            return False
        return all(self.total(request, block) <= self.room for block in blocks)

    def largest(self, request: Request, name: str, granule: int, limit: int, guess: int | None = None) -> int:
        """Return the largest value of a size that fits.

        Memory is a convex, piecewise linear function of the size. Each guess is therefore where the line through the
        last two points meets the limit.

        Args:
            request: a request that fits.
            name: ``seq_len`` or ``batch_size``.
            granule: the result is a multiple of this.
            limit: the largest value to try.
            guess: the first value to try.
        """
        blocks = self.planner.build(request).bounding_blocks()
        granule = min(granule, getattr(request, name))

        def peak_of_passes(block: int) -> int:
            peaks = self.planner.simulate(request, block).peaks.items()
            return max(sum(peak.values()) for phase, peak in peaks if phase != "step")

        block = max(blocks, key=peak_of_passes)

        def at(count: int) -> Request:
            changed: Any = {name: max(1, count * granule)}
            return replace(request, **changed)

        first = max(1, getattr(request, name) // granule)

        def search(block: int, high: int, guess: int) -> int:
            """Return the largest count below ``high`` that fits in a step on a block; ``guess`` is tried first."""
            low, below = first, self.total(at(first), block)
            while high - low > 1:
                guess = min(max(guess, low + 1), high - 1)
                total = self.total(at(guess), block)
                slope = max(1, total - below) / (guess - low)
                if total <= self.room:
                    low, below = guess, total
                else:
                    high = guess
                guess = low + int((self.room - below) / slope)
            return low

        count = search(block, limit // granule + 1, 2 * first if guess is None else guess // granule)
        while count > 1:
            over = next((block for block in blocks if self.total(at(count), block) > self.room), None)
            if over is None:
                break
            most = search(over, count, count - count // 100)  # this block needs more memory than ``block``
            while count > max(most, 1):
                count -= max(1, count // 100)
        return max(1, count * granule)

    def total(self, request: Request, block: int) -> int:
        """Return the highest device total of a step on a block."""
        return max(sum(peak.values()) for peak in self.planner.simulate(request, block).peaks.values())

    def _changes(self, request: Request) -> Iterator[tuple[list[str], Request]]:
        """Yield a request and variants of it with the names of their changes, the cheapest changes first."""
        recomputed: list[tuple[list[str], Request]] = [([], request), *_recomputed(request)]
        yield from recomputed
        for changes, base in recomputed:
            yield from self._smaller_batches(changes, base)
            if base.method == "hift" and base.offload_device == "none" and base.precision != "mixed":
                yield changes + ["state in host memory"], replace(base, offload_device="cpu")
            elif base.method == "hift" and base.placement == "block" and base.optimizer != "adafactor":
                yield changes + ["the streamed step"], replace(base, offload_step="streamed")
        for changes, base in recomputed:
            for more, elsewhere in _weights_elsewhere(base):
                yield changes + more, elsewhere
                yield from self._smaller_batches(changes + more, elsewhere)

    def _last_changes(self, request: Request) -> Iterator[tuple[list[str], Request]]:
        """Yield variants that cost more: a step on the host, more ranks, shorter sequences."""
        variants = [([], request), *_recomputed(request)]
        for changes, base in list(variants):
            if base.placement != "host" and base.stage > 0 and base.method != "mezo":
                host: dict[str, Any] = {"offload_optimizer": "cpu", "offload_device": "cpu", "offload_step": "auto"}
                host |= {name: getattr(Request, name) for name in _OF_THE_STREAMED_STEP}
                variants.append((changes + ["the step on the host"], replace(base, **host, nvme_path=None)))
                yield variants[-1]
                yield from self._smaller_batches(*variants[-1])
        if request.optimizer != "adafactor" and request.method != "mezo":
            for ranks in (2**power for power in range(1, 8) if 2**power > request.ranks):
                for changes, base in variants:
                    sharded = replace(base, zero_stage=3, ranks=ranks, weights="device")
                    yield changes + [f"ZeRO-3 on {ranks} ranks"], sharded
        changes, least = [*variants, *_weights_elsewhere(variants[-1][1])][-1]
        short = replace(least, batch_size=1, seq_len=_TOKENS)
        if request.seq_len > _TOKENS and self.fits(short):
            length = self.largest(short, "seq_len", _TOKENS, request.seq_len)
            yield changes + [f"batch 1 and sequences of {length} tokens"], replace(short, seq_len=length)

    def _smaller_batches(self, changes: list[str], request: Request) -> Iterator[tuple[list[str], Request]]:
        """Yield the same batch in the largest micro-batches that fit."""
        batches = [batch for batch in _divisors(request.batch_size) if batch < request.batch_size]

        def changed(batch: int) -> Request:
            steps = request.gradient_accumulation_steps * (request.batch_size // batch)
            return replace(request, batch_size=batch, gradient_accumulation_steps=steps)

        # Batches from `low` on do not fit. Memory grows with the batch.
        low, high = -1, len(batches)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(changed(batches[middle])) else (low, middle)
        if low >= 0:
            best = changed(batches[low])
            steps = best.gradient_accumulation_steps
            yield [*changes, f"batch {best.batch_size} with {steps} gradient accumulation steps"], best


def _recomputed(request: Request) -> Iterator[tuple[list[str], Request]]:
    """Yield a request with activation checkpointing, and with the checkpoints in host memory."""
    if request.method == "mezo" or request.checkpoint_offload:
        return
    changes = [] if request.recomputes else ["activation checkpointing"]
    if changes:
        yield changes, replace(request, activation_checkpointing=True)
    offload = replace(request, activation_checkpointing=True, checkpoint_offload=True)
    yield [*changes, "checkpoints in host memory"], offload


def _weights_elsewhere(request: Request) -> Iterator[tuple[list[str], Request]]:
    """Yield a request whose weights are shared by its ranks, and one whose weights wait in host memory."""
    if request.method != "hift" or request.streams_weights or request.layout == "paper":
        return
    shards = request.ranks > 1 and request.optimizer != "adafactor"
    if shards and request.stage < 3:
        yield [f"ZeRO-3 on {request.ranks} ranks"], replace(request, zero_stage=3)
    if request.stage < 3 and request.placement != "host":
        yield ["weights in host memory"], replace(request, weights="cpu")
    if shards or request.stage == 3:
        elsewhere = replace(request, zero_stage=3, offload_param="cpu")
        yield [f"ZeRO-3 on {request.ranks} ranks with weights in host memory"], elsewhere


def places(request: Request) -> Iterator[tuple[list[str], Request]]:
    """Yield variants that need less memory of the device."""
    for changes, base in [([], request), *_recomputed(request)]:
        yield changes, base
        for more, elsewhere in _weights_elsewhere(base):
            yield changes + more, elsewhere


def _states(request: Request, drive: str | None) -> Iterator[tuple[list[str], Request]]:
    """Yield a request, and variants whose state needs less host memory, the cheapest first.

    Args:
        request: the request.
        drive: the folder for files; None: no state is in files.
    """
    yield [], request
    if request.method != "hift" or request.placement not in ("streamed", "block") or request.layout == "paper":
        return
    is_coded = request.moments == "8bit"
    coded = replace(request, moments="8bit") if request.optimizer in ENCODED and not is_coded else None
    if coded:
        yield ["8-bit moments"], coded
    if request.offload_device == "nvme" or drive is None:
        return
    files: dict[str, Any] = {"offload_device": "nvme", "nvme_path": drive}
    for changes, base in [([], request), *([(["8-bit moments"], coded)] if coded else [])]:
        if MOMENTS.get(base.optimizer):
            yield [*changes, "moments in files"], replace(base, **files, nvme="moments")
        yield [*changes, "all state in files"], replace(base, **files)


def _divisors(number: int) -> list[int]:
    """Return all divisors, from the smallest."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)})
