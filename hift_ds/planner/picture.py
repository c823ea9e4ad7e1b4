"""Show a plan as a table of text or as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from hift_ds.config import ConfigError
from hift_ds.planner.plan import Plan, with_total
from hift_ds.planner.simulation import CATEGORIES

GIB = 2**30
_PHASES = {"forward": "forward pass", "backward": "backward pass", "step": "optimizer step"}
_LONGEST_NAME = 60  # characters
_FULL_NOTE = (
    "full fine-tuning is DeepSpeed without HiFT and without offload; from ZeRO-1 on, its step makes flat copies and "
    "fp32 copies of all gradients"
)


def table(plan: Plan, full: Plan | None = None, shown: Plan | None = None) -> str:
    """Return the plan as text: first whether it fits, if that was asked, then its sizes.

    Args:
        plan: the plan.
        full: that of full fine-tuning, whose sizes are a column.
        shown: the plan with the change that makes it fit, whose sizes are shown in its place.
    """
    verdict = [f"{_verdict(plan)}\n"] if plan.fit else []
    if shown is not None and shown is not plan:
        assert plan.fit is not None
        verdict.append(f"With {plan.fit['change']}:")
        plan = shown

    request, peak = plan.request, plan.peak
    zero = f"ZeRO-{request.stage} on {request.ranks} rank{'s' * (request.ranks > 1)}"
    lines = [
        f"{request.name}: {plan.total_parameters:,} parameters; {request.method}, {request.precision}, "
        f"{request.optimizer}, batch {request.batch_size} x {request.seq_len} tokens, "
        + (zero if request.layout == "engine" else "the paper's accounting"),
        f"{_needs(plan)} A step trains at most {plan.peak_trainable_parameters:,} parameters. The peak is in the "
        f"{_PHASES[peak['phase']]} of block {peak['block']}, {peak['name']}.",
    ]
    columns = {"device": plan.device, "host": plan.host}
    if any(plan.nvme.values()):
        columns["files"] = plan.nvme
    if full:
        columns["full fine-tuning"] = full.device
    lines.append(f"\n{'':<18}" + "".join(f"{name:>{_width(name)}}" for name in columns))
    for key in (*CATEGORIES, "total"):
        row = "".join(f"{_size(with_total(sizes)[key]):>{_width(name)}}" for name, sizes in columns.items())
        lines.append(f"{key.replace('_', ' '):<18}{row}")
    lines += ["", *_blocks(plan)]
    notes = [*plan.notes, _FULL_NOTE] if full else plan.notes
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    lines += [f"\n{_step_time(plan)}"] if plan.time else []
    return "\n".join([*verdict, *lines])


def _needs(plan: Plan) -> str:
    """Return a sentence on the memory that a rank needs."""
    needs = [f"{_size(sum(plan.device.values()))} on the device", f"{_size(sum(plan.host.values()))} of host memory"]
    needs += [f"{_size(total)} in files"] if (total := sum(plan.nvme.values())) else []
    each = "Each rank" if plan.request.ranks > 1 else "The run"
    if plan.request.ranks > 1 and plan.request.weights == "cpu":
        needs[1] += " (weights once on a machine)"
    return f"{each} needs {', '.join(needs[:-1])} and {needs[-1]}."


def _blocks(plan: Plan) -> list[str]:
    """Return the lines of the table of blocks. Consecutive ones of the same size and phase share a line."""
    rows = []
    for (numel, phase), found in groupby(plan.blocks, key=lambda block: (block.numel, block.phase)):
        blocks = list(found)
        name = blocks[0].name if len(blocks) == 1 else f"{blocks[0].name} to {blocks[-1].name}, each"
        totals = [sum(block.device.values()) for block in blocks]
        sizes = list(dict.fromkeys((_size(min(totals)), _size(max(totals)))))
        label = textwrap.shorten(name, _LONGEST_NAME, placeholder=" ...")
        rows.append((label, f"{numel:,}", " to ".join(sizes), _PHASES[phase]))
    rows.insert(0, ("block", "parameters", "device", "peak in"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in rows]


def _size(nbytes: int) -> str:
    """Return a size with the unit that leaves digits to read."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if nbytes >= size / 10:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 2**10:.2f} KiB" if nbytes else "0"


def _step_time(plan: Plan) -> str:
    """Return sentences on the predicted time of a step."""
    assert plan.time is not None
    time, milliseconds = plan.time, {name: f"{1000 * plan.time[name]:.0f} ms" for name in ("kernels", "bus", "host")}
    parts = [f"kernels {milliseconds['kernels']}", f"the host to issue them {milliseconds['host']}"]
    if time["bus"]:
        parts.insert(1, f"copies in each direction {milliseconds['bus']}")
    shortest, longest = min(time["by_block"]), max(time["by_block"])
    spread = f" ({shortest:.3g} to {longest:.3g} s by block)" if len(time["by_block"]) > 1 else ""
    each = " on each rank" if plan.request.ranks > 1 else ""
    if time["drive"]:
        parts.insert(2, f"the drive {1000 * time['drive']:.0f} ms")
    limits = {"kernels": "Kernels limit", "bus": "The bus limits", "host": "The host limits"}
    limits["drive"] = "The drive limits"
    sentences = [
        f"Predicted on {time['gpu']}: {time['seconds']:.3g} s a step{spread}, "
        f"{time['tokens_per_second']:,.0f} tokens a second{each}.",
        f"Each alone: {', '.join(parts)}.",
        f"{limits[time['limit']]} the step.",
    ]
    least, hidden = time["bus_hidden_from"], time["hides_copies"]
    if time["bus"]:
        part = f"Copies hide only in part: without them, it would take {time['without_bus']:.3g} s."
        sentences.append("Copies hide behind the rest." if hidden else part)
    if time["bus"] and not least:
        sentences.append("On the middle block, they hide with no micro-batch; a larger --prefetch helps.")
    elif least and (least > 1 or not hidden):
        batches = "any micro-batch" if least == 1 else f"micro-batches of {least:,} or more sequences"
        sentences.append(f"On the middle block, they add at most 5 % with {batches}.")
    return " ".join(sentences)


def _verdict(plan: Plan) -> str:
    """Return sentences that say whether the plan fits, with which change, and what that costs."""
    assert plan.fit is not None
    fit = plan.fit
    room = f"{fit['gpu_memory'] / GIB:g} GiB with {fit['reserve'] / GIB:g} GiB kept free"
    if "host_memory" in fit:
        room += f" and {fit['host_memory'] / GIB:g} GiB of host memory with {fit['host_reserve'] / GIB:g} GiB kept free"
    if "drive_room" in fit:
        room += f" and {fit['drive_room'] / GIB:.1f} GiB free on the drive"
    missing = ", ".join(name.replace("_", " ") for name in fit["not_searched"])
    skipped = [f"Not searched: {missing}. It would take minutes of simulation."] if missing else []
    if "device_total" not in fit:
        known = [] if missing else ["No change that the planner knows makes it fit."]
        return " ".join([f"The run does not fit on {room}.", *known, *_missing(fit), *skipped])
    needs = f"{fit['device_total'] / GIB:.2f} GiB"
    if "host_memory" in fit:
        needs = f"{needs} on the device and {plan.request.ranks * fit['host_total'] / GIB:.1f} GiB of host memory"
    if fit["nvme_total"]:
        needs += f", and {plan.request.ranks * fit['nvme_total'] / GIB:.1f} GiB in files"
    if fit["fits"]:
        sentences = [f"The run fits on {room}: it needs {needs}."]
    else:
        sentences = [f"The run does not fit on {room}. It fits with {fit['change']}: it then needs {needs}."]
    if "seconds" in fit:
        sentences += _cost(plan)
    longest, positions, batch = fit["longest_sequence"], fit["positions"], fit["largest_batch"]
    if longest and positions and longest > positions:
        limit = f"at most {positions:,} tokens, the positions of the model; memory would allow {longest:,}"
        sentences.append(f"The longest sequence that fits: {limit}.")
    elif longest:
        sentences.append(f"The longest sequence that fits: {longest:,} tokens.")
    if batch:
        sentences.append(f"The largest micro-batch that fits: {batch:,} sequence{'s' * (batch != 1)}.")
    return " ".join([*sentences, *skipped])


def _missing(fit: Mapping[str, Any]) -> list[str]:
    """Return sentences on what is missing if nothing fits."""
    if "missing" not in fit:
        return []
    names = {"device": "of device memory", "host": "of host memory", "nvme": "of the drive"}
    sizes = [f"{fit['missing'][place] / GIB:.2f} GiB {name}" for place, name in names.items() if fit["missing"][place]]
    closest = f"With {fit['closest']}" if fit["closest"] else "As it is"
    return [f"{closest}, {' and '.join(sizes)} are missing. What would help most: {fit['helps']}."]


def _cost(plan: Plan) -> list[str]:
    """Return sentences on the time of a step with the change that makes a run fit."""
    assert plan.fit is not None and plan.time is not None and plan.fitting is not None
    before, after, changed = plan.time["seconds"], plan.fit["seconds"], plan.fitting
    sentences = [
        f"A step then takes {after:.3g} s on {plan.time['gpu']}, {after / before:.1f} times the {before:.3g} s that it "
        "would take unchanged, on a card where that fits."
    ]
    least = plan.fit["hidden_from"]
    if not changed.streams_weights:
        return sentences
    if least is None:
        return [*sentences, "Its copies hide with no micro-batch."]
    tokens = f"{least * changed.seq_len:,} tokens"
    sentences.append(f"From micro-batches of {least:,} x {changed.seq_len} = {tokens} on, copies cost at most 5 %.")
    if (plan.fit["largest_batch"] or least) < least and not changed.recomputes:
        sentences.append("Fewer fit; --activation-checkpointing makes room for more.")
    return sentences


def _width(name: str) -> int:
    return max(12, len(name) + 4)


def plot(plan: Plan, full: Plan, path: str) -> None:
    """Draw the plan as a stacked bar next to the one of full fine-tuning.

    Args:
        plan: the plan.
        full: the plan of full fine-tuning.
        path: file to write; its suffix selects the format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(["--plot: matplotlib is not installed; install it with: pip install matplotlib"]) from error
    colors = (
        "#0072B2",
        "#56B4E9",
        "#009E73",
        "#E69F00",
        "#CC79A7",
        "#999999",
    )  # Okabe and Ito's palette, safe for color-blind readers
    axes = (figure := Figure(figsize=(7, 5), layout="constrained")).subplots()
    bars = {"full fine-tuning": full, f"{plan.request.method}, {plan.request.precision}": plan}
    bottom = [0.0] * len(bars)
    for category, color in zip(CATEGORIES, colors, strict=True):
        heights = [entry.device[category] / GIB for entry in bars.values()]
        axes.bar(list(bars), heights, 0.55, bottom, color=color, edgecolor="white", label=category.replace("_", " "))
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    for position, total in enumerate(bottom):
        axes.annotate(f"{total:.1f} GiB", (position, total), (0, 4), textcoords="offset points", ha="center")
    if plan.fit:
        axes.axhline(plan.fit["gpu_memory"] / GIB, color="black", linestyle="--", linewidth=1, label="the device")
    request = plan.request
    axes.set(ylabel="GiB on the device", ylim=(0, max(bottom) * 1.12), xlim=(-0.6, len(bars) - 0.4))
    axes.set_title(f"{request.name}, {request.optimizer}, {request.batch_size} x {request.seq_len} tokens")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
