"""What the project promises of a device, and whether the results of a check hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30
# Allowed difference of the planned and the measured peak, as a fraction of the measured one; with weights on the host,
# where the peak is small, less.
PLANNED, PLANNED_STREAMED = 0.05, 0.03
HOST, HOST_BYTES = 0.02, GIB  # allowed growth above what the engine counts, whichever is more
SETUP_SECONDS = 45.0
FIRST_CYCLE = 1.25  # allowed time of the first cycle, as a multiple of a later one
BADAM, LORA = 1.05, 0.6  # allowed time of a step, as a multiple of that of another method
ON_HOST = "weights on the host"  # end of the name of a task whose weights wait there
WAITS = 1  # in a step, outside the model's forward

Results = Mapping[str, Mapping[str, Any]]  # by task


@dataclass
class Promise:
    """A promise and what was measured.

    Attributes:
        holds: None: it was not measured.
    """

    name: str
    measured: str
    holds: bool | None


def promises(results: Results, on_device: bool) -> list[Promise]:
    """Compare results with the promises.

    Args:
        results: of the tasks by name.
        on_device: the accelerator is not the CPU. Times and memory of a CPU promise nothing.
    """
    several = [
        (name, result) for name, result in results.items() if {"cases", "runs"} & set(result) and name != "weights"
    ]
    found = list(_weights(results.get("weights", {})))
    for name, result in several:
        found += _weights(result, f"{name}, weights")
        found += _of_ranks(name, result, on_device)
    found += _of_a_device(results) if on_device else ()
    return found + [
        Promise(f"all of {name!r}", result["skipped"], None) for name, result in results.items() if "skipped" in result
    ]


def _of_ranks(name: str, result: Mapping[str, Any], on_device: bool) -> Iterator[Promise]:
    """Of runs on several ranks: planned memory on each, waits, collectives beside copies; what one rank continues."""
    if found := result.get("continued"):
        is_right = found.get("equal", False) and found["block"] == found["blocks"] - 1
        measured = found.get("reason", f"equal weights: {found.get('equal')}, block {found.get('block')}")
        yield Promise(f"{name}: one rank continues a checkpoint of all", measured, is_right)
    for run, ranks in result.get("runs", {}).items():
        reasons = [found["reason"] for found in ranks if "reason" in found]
        if reasons:
            yield Promise(f"{name}, {run}: it runs", reasons[0], False)
            continue
        if not on_device:
            yield Promise(f"{name}, {run}: it runs", f"{len(ranks)} ranks", True)
            continue
        yield Promise(
            f"{name}, {run}: planned device peak within {PLANNED:.0%} on each rank",
            ", ".join(
                f"{found['planned'] / GIB:.2f} planned, {found['peak'] / GIB:.2f} GiB measured" for found in ranks
            ),
            all(abs(found["planned"] - found["peak"]) <= PLANNED * found["peak"] for found in ranks),
        )
        waits = [found["trace"]["waits"] - found["trace"]["waits_in_forward"] for found in ranks]
        most = f"at most {WAITS} wait a step" if "ZeRO 3" not in run else "waits a step (DeepSpeed gathers)"
        yield Promise(
            f"{name}, {run}: {most}", f"{max(waits):.2f}", max(waits) <= WAITS if "ZeRO 3" not in run else None
        )
        beside = [found["trace"] for found in ranks]
        yield Promise(
            f"{name}, {run}: collectives beside copies",
            ", ".join(f"{t['collective_beside_copies_ms']:.1f} of {t['collective_ms']:.1f} ms" for t in beside),
            None,
        )


def _weights(result: Mapping[str, Any], title: str = "weights") -> Iterator[Promise]:
    for name, case in result.get("cases", {}).items():
        error = f"{case['error']:.1e}" if "error" in case else case["reason"]
        yield Promise(f"{title}, {name}: error at most {case['bound']:g}", error, case.get("holds", False))


def _of_a_device(results: Results) -> Iterator[Promise]:
    for name, result in results.items():
        for length in filter(str.isdigit, result):
            found = result[length]
            if name.startswith("hift") and found.get("planned") and "peak" in found:
                planned, peak = found["planned"], found["peak"]
                allowed = PLANNED_STREAMED if name.endswith(ON_HOST) else PLANNED
                yield Promise(
                    f"{name}, {length} tokens: planned device peak within {allowed:.0%}",
                    f"{planned / GIB:.2f} planned, {peak / GIB:.2f} GiB measured",
                    abs(planned - peak) <= allowed * peak,
                )
            if name.startswith("hift") and "trace" in found:
                waits = found["trace"]["waits"] - found["trace"]["waits_in_forward"]
                yield Promise(f"{name}, {length} tokens: at most {WAITS} wait a step", f"{waits:.2f}", waits <= WAITS)
        if (host := result.get("host", {})).get("counted") is not None and name.startswith("hift"):
            allowed = host["counted"] + max(HOST * host["counted"], HOST_BYTES)
            yield Promise(
                f"{name}: host memory at most 2 % or 1 GiB above the ledger",
                f"{host['counted'] / GIB:.2f} counted, {host['grown'] / GIB:.2f} GiB grown",
                host["grown"] <= allowed,
            )
        if name.startswith("hift large") and "setup_seconds" in result:
            seconds = result["setup_seconds"]
            yield Promise(f"{name}: set-up in {SETUP_SECONDS:g} s", f"{seconds:.1f} s", seconds <= SETUP_SECONDS)
        if name.startswith("hift large") and "seconds" in (found := _first_length(result)):
            ratio = found["first_seconds"] / found["seconds"]
            yield Promise(
                f"{name}: first cycle at most {FIRST_CYCLE:g} of a later one", f"{ratio:.2f}", ratio <= FIRST_CYCLE
            )
    yield from _ratios(results)


def _ratios(results: Results) -> Iterator[Promise]:
    badam, lora = _first_length(results.get("badam large", {})), _first_length(results.get("lora large", {}))
    others = {
        "BAdam, switching after every step": (badam.get("seconds"), BADAM),
        "BAdam, switching after every 100 steps": (badam.get("every_100"), BADAM),
        "LoRA": (lora.get("seconds"), LORA),
    }
    for name, result in results.items():
        seconds = _first_length(result).get("seconds")
        if not name.startswith("hift large") or name.endswith(ON_HOST) or seconds is None:
            continue
        for other, (theirs, bound) in others.items():
            ratio = seconds / theirs if theirs else None
            yield Promise(
                f"{name}: step at most {bound:g} of {other}",
                "not measured" if ratio is None else f"{ratio:.2f}",
                None if ratio is None else ratio <= bound,
            )


def _first_length(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((result[key] for key in result if key.isdigit()), {})
