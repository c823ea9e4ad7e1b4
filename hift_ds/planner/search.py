"""Does a planned run fit on a device; if not, with which smallest change; and what fits at most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hift_ds.config import ConfigError
from hift_ds.planner.presets import Request

if TYPE_CHECKING:
    from hift_ds.planner.plan import Plan, Planner

_LONGEST, _MOST = 2**20, 2**14  # tokens and sequences that a search ends at
_GRANULE = 64  # tokens; the longest sequence is found to this


class Fit:
    """Answers what fits on a device, and what would make it fit."""

    def __init__(self, planner: Planner, memory: int, reserve: int):
        self.planner, self.memory, self.reserve, self.room = planner, memory, reserve, memory - reserve

    def answer(self, plan: Plan) -> Plan:
        """The plan with its ``fit``: the smallest change that fits where the plan does not, and what fits at most."""
        chosen: tuple[list[str], Request] | None = ([], plan.request)
        if sum(plan.device.values()) > self.room:
            chosen = next((change for change in self._changes(plan.request) if self.fits(change[1])), None)
        plan.fit = {"gpu_memory": self.memory, "reserve": self.reserve, "fits": chosen is not None and not chosen[0]}
        plan.fit |= {"change": None, "longest_sequence": None, "largest_batch": None}
        if chosen is not None:
            change, request = chosen
            changed = self.planner.plan(request) if change else plan
            limit = self.planner.build(request).longest_input or _LONGEST
            longest = self.largest(request, "seq_len", _GRANULE, limit)
            as_long = longest * request.batch_size // request.seq_len  # as many tokens, in sequences as asked for
            plan.fit |= {
                "change": " and ".join(change) or None,
                "device_total": sum(changed.device.values()),
                "longest_sequence": longest,
                "largest_batch": self.largest(request, "batch_size", 1, _MOST, guess=as_long),
            }
            plan.fitting = request
        return plan

    def fits(self, request: Request) -> bool:
        try:
            units = self.planner.build(request).decisive()
        except ConfigError:  # a change that cannot be had with the rest
            return False
        if sum(self.planner.holds(request, units[0]).values()) > self.room:
            return False
        return all(self._total(request, unit) <= self.room for unit in units)

    def largest(self, request: Request, name: str, granule: int, limit: int, guess: int | None = None) -> int:
        """The largest value of a size that fits, a multiple of ``granule``, up to ``limit``; ``request`` must fit.

        Memory grows in straight lines with it, ever steeper ones, so two points tell the next one to try; the first
        is ``guess``.
        """
        units = self.planner.build(request).decisive()
        granule = min(granule, getattr(request, name))

        def grows(unit: int) -> int:
            peaks = self.planner.simulate(request, unit).peaks.items()
            return max(sum(peak.values()) for phase, peak in peaks if phase != "step")

        unit = max(units, key=grows)

        def at(count: int) -> Request:
            changed: Any = {name: max(1, count * granule)}
            return replace(request, **changed)

        low, high = max(1, getattr(request, name) // granule), limit // granule + 1  # fits, does not
        below, guess = self._total(at(low), unit), 2 * low if guess is None else guess // granule
        while high - low > 1:
            guess = min(max(guess, low + 1), high - 1)
            total = self._total(at(guess), unit)
            slope = max(1, total - below) / (guess - low)
            if total <= self.room:
                low, below = guess, total
            else:
                high = guess
            guess = low + int((self.room - below) / slope)
        while low > 1 and not self.fits(at(low)):  # another block needs more than the one that was followed
            low -= max(1, low // 100)
        return max(1, low * granule)

    def _total(self, request: Request, unit: int) -> int:
        return max(sum(peak.values()) for peak in self.planner.simulate(request, unit).peaks.values())

    def _changes(self, request: Request) -> Iterator[tuple[list[str], Request]]:
        """Variants of a request with what is changed, the smallest changes first."""
        variants: list[tuple[list[str], Request]] = [([], request)]
        if request.method != "mezo":
            if not request.recomputes:
                variants.append((["activation checkpointing"], replace(request, activation_checkpointing=True)))
                yield variants[-1]
            if not request.checkpoint_offload:
                said = [] if request.recomputes else ["activation checkpointing"]
                offload = replace(request, activation_checkpointing=True, checkpoint_offload=True)
                variants.append((said + ["checkpoints in host memory"], offload))
                yield variants[-1]
        for said, base in list(variants):
            yield from self._smaller_batches(said, base)
            if base.method == "hift" and base.offload_device == "none" and base.precision != "mixed":
                variants.append((said + ["state in host memory"], replace(base, offload_device="cpu")))
                yield variants[-1]
            elif base.method == "hift" and base.placement == "block" and base.optimizer != "adafactor":
                yield said + ["the streamed step"], replace(base, offload_step="streamed")
            if base.placement != "host" and base.stage > 0 and base.method != "mezo":
                host: dict[str, Any] = {"offload_optimizer": "cpu", "offload_device": "cpu", "offload_step": "auto"}
                variants.append((said + ["the step on the host"], replace(base, **host, nvme_path=None)))
                yield variants[-1]
                yield from self._smaller_batches(*variants[-1])
        if request.optimizer != "adafactor" and request.method != "mezo":
            for ranks in (2**power for power in range(1, 8) if 2**power > request.ranks):
                for said, base in variants:
                    yield said + [f"ZeRO-3 on {ranks} ranks"], replace(base, zero_stage=3, ranks=ranks)
        said, least = variants[-1]
        short = replace(least, batch_size=1, seq_len=_GRANULE)
        if request.seq_len > _GRANULE and self.fits(short):
            length = self.largest(short, "seq_len", _GRANULE, request.seq_len)
            yield said + [f"batch 1 and sequences of {length} tokens"], replace(short, seq_len=length)

    def _smaller_batches(self, said: list[str], request: Request) -> Iterator[tuple[list[str], Request]]:
        """The same batch in more, smaller micro-batches."""
        for parts in range(2, request.batch_size + 1):
            batch, rest = divmod(request.batch_size, parts)
            steps = request.gradient_accumulation_steps * parts
            if rest == 0 and (batch == 1 or self.fits(replace(request, batch_size=1))):
                changed = replace(request, batch_size=batch, gradient_accumulation_steps=steps)
                yield said + [f"batch {batch} with {steps} gradient accumulation steps"], changed
