"""Find whether a run fits on a device, the smallest change that makes it fit, and the largest sizes that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from hift_ds.config import ConfigError
from hift_ds.planner.plan import Plan, Planner, TooManyOperationsError
from hift_ds.planner.request import Request

_MAX_SEQ_LEN, _MAX_BATCH_SIZE = 2**20, 2**14  # a search ends here
_MOST_OPERATIONS = 1_500_000  # of a plan and its search: about a minute
_TOKENS = 64  # the search tries multiples of this sequence length

T = TypeVar("T")


class Fit:
    """Answers what fits on a device, and which change makes a request fit.

    Args:
        planner: plans the variants of the request.
        memory: bytes of the device.
        reserve: bytes of the device that stay free.
    """

    def __init__(self, planner: Planner, memory: int, reserve: int):
        self.planner, self.memory, self.reserve, self.room = planner, memory, reserve, memory - reserve

    def answer(self, plan: Plan) -> Plan:
        """Set the plan's ``fit`` and ``fitting``, and return the plan.

        ``fit`` holds ``gpu_memory``, ``reserve``, ``fits``, ``change`` (the smallest change that makes the request
        fit, or None), ``positions`` of the model, and ``not_searched`` (names of what would take too long). If anything
        fits it also holds ``device_total``, ``longest_sequence`` (tokens) and ``largest_batch`` (sequences in a
        micro-batch) of the request with the change.
        """
        self.planner.limit = _MOST_OPERATIONS
        plan.fit = {"gpu_memory": self.memory, "reserve": self.reserve, "fits": self._total_of(plan) <= self.room}
        plan.fit |= {"change": None, "longest_sequence": None, "largest_batch": None}
        plan.fit |= {"positions": plan.positions, "not_searched": []}
        changes: list[str] = []
        request: Request | None = plan.request
        if not plan.fit["fits"]:
            found = self._unless_long(plan, "change", lambda: self._smallest_change(plan.request))
            changes, request = found or ([], None)
        if request is not None:
            changed = self.planner.plan(request) if changes else plan
            positions = self.planner.build(request).positions
            limit = positions.tokens if positions.table and positions.tokens else _MAX_SEQ_LEN
            plan.fit |= {"change": " and ".join(changes) or None, "device_total": self._total_of(changed)}
            longest = self._unless_long(
                plan, "longest_sequence", partial(self.largest, request, "seq_len", _TOKENS, limit)
            )
            # A batch with as many tokens.
            guess = longest * request.batch_size // request.seq_len if longest else None
            self._unless_long(
                plan, "largest_batch", partial(self.largest, request, "batch_size", 1, _MAX_BATCH_SIZE, guess)
            )
            plan.fitting = request
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

    def _smallest_change(self, request: Request) -> tuple[list[str], Request] | None:
        """Return the names of the smallest changes that make a request fit, and the changed request."""
        return next((change for change in self._changes(request) if self.fits(change[1])), None)

    @staticmethod
    def _total_of(plan: Plan) -> int:
        return sum(plan.device.values())

    def fits(self, request: Request) -> bool:
        """Return whether a request fits. A request with problems does not."""
        try:
            blocks = self.planner.build(request).bounding_blocks()
        except ConfigError:  # the change conflicts with the rest of the request
            return False
        if any(self.planner.least(request, block) > self.room for block in blocks):
            return False
        return all(self._total(request, block) <= self.room for block in blocks)

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
            low, below = first, self._total(at(first), block)
            while high - low > 1:
                guess = min(max(guess, low + 1), high - 1)
                total = self._total(at(guess), block)
                slope = max(1, total - below) / (guess - low)
                if total <= self.room:
                    low, below = guess, total
                else:
                    high = guess
                guess = low + int((self.room - below) / slope)
            return low

        count = search(block, limit // granule + 1, 2 * first if guess is None else guess // granule)
        while count > 1:
            over = next((block for block in blocks if self._total(at(count), block) > self.room), None)
            if over is None:
                break
            most = search(over, count, count - count // 100)  # this block needs more memory than ``block``
            while count > max(most, 1):
                count -= max(1, count // 100)
        return max(1, count * granule)

    def _total(self, request: Request, block: int) -> int:
        """Return the highest device total of a step on a block."""
        return max(sum(peak.values()) for peak in self.planner.simulate(request, block).peaks.values())

    def _changes(self, request: Request) -> Iterator[tuple[list[str], Request]]:
        """Yield variants of a request with the names of their changes, the smallest changes first."""
        variants: list[tuple[list[str], Request]] = [([], request)]
        if request.method != "mezo":
            if not request.recomputes:
                variants.append((["activation checkpointing"], replace(request, activation_checkpointing=True)))
                yield variants[-1]
            if not request.checkpoint_offload:
                changes = [] if request.recomputes else ["activation checkpointing"]
                offload = replace(request, activation_checkpointing=True, checkpoint_offload=True)
                variants.append((changes + ["checkpoints in host memory"], offload))
                yield variants[-1]
        for changes, base in list(variants):
            yield from self._smaller_batches(changes, base)
            if base.method == "hift" and base.offload_device == "none" and base.precision != "mixed":
                variants.append((changes + ["state in host memory"], replace(base, offload_device="cpu")))
                yield variants[-1]
            elif base.method == "hift" and base.placement == "block" and base.optimizer != "adafactor":
                yield changes + ["the streamed step"], replace(base, offload_step="streamed")
            if base.placement != "host" and base.stage > 0 and base.method != "mezo":
                host: dict[str, Any] = {"offload_optimizer": "cpu", "offload_device": "cpu", "offload_step": "auto"}
                variants.append((changes + ["the step on the host"], replace(base, **host, nvme_path=None)))
                yield variants[-1]
                yield from self._smaller_batches(*variants[-1])
        if request.optimizer != "adafactor" and request.method != "mezo":
            for ranks in (2**power for power in range(1, 8) if 2**power > request.ranks):
                for changes, base in variants:
                    yield changes + [f"ZeRO-3 on {ranks} ranks"], replace(base, zero_stage=3, ranks=ranks)
        changes, least = variants[-1]
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


def _divisors(number: int) -> list[int]:
    """Return all divisors, from the smallest."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)})
