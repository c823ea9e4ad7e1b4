"""Write docs/cards.md: which models fit on which cards, with how much host memory, at which predicted speed.

    python -m hift_ds.planner.cards docs/cards.md

Everything in it is planned. It takes some minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from hift_ds.planner.api import default_reserve
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request
from hift_ds.planner.search import Fit
from hift_ds.planner.step_time import StepTimes

GIB = 2**30
MODELS = {
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.2-3b": "Llama-3.2-3B",
    "llama-7b": "LLaMA-7B",
    "llama-3-8b": "Llama-3-8B",
    "llama-13b": "LLaMA-13B",
    "qwen2.5-32b": "Qwen2.5-32B",
    "llama-3-70b": "Llama-3-70B",
}
# GiB of memory -> the card whose speed is predicted, a key of hift_ds.planner.timeline.CARDS
CARDS = {8: "4060", 12: "4070", 16: "4080", 24: "4090", 48: "l40s", 80: "h100"}
BATCHES = (1, 8)  # sequences of SEQ_LEN tokens in a micro-batch
SEQ_LEN = 512
# Of the table of host memory: what waits there or in files, and the options.
STATES: dict[str, dict[str, Any]] = {
    "state": {},
    "state, 8-bit moments": {"moments": "8bit"},
    "state and weights": {"weights": "cpu"},
    "state and weights, 8-bit moments": {"weights": "cpu", "moments": "8bit"},
    "weights; state in files": {"weights": "cpu", "offload_device": "nvme"},
    "weights; state in files, 8-bit moments": {"weights": "cpu", "offload_device": "nvme", "moments": "8bit"},
}
# What a model is planned with, the fastest first, and the letters that stand for it.
MEASURES: dict[str, dict[str, Any]] = {
    "": {},
    "C": {"activation_checkpointing": True},
    "W": {"weights": "cpu"},
    "C W": {"activation_checkpointing": True, "weights": "cpu"},
}


class Shape:
    """The plans of one model."""

    def __init__(self, model: str):
        self.model = model
        self.planner = Planner(Request(model, master="split", seq_len=SEQ_LEN))

    def host(self) -> list[str]:
        """Return the cells of the table of host memory."""
        cells = []
        for options in STATES.values():
            request = replace(self.planner.request, **options)
            host, files = (sum(self.planner.off_device(request, place).values()) for place in ("host", "nvme"))
            cells.append(f"{host / GIB:.1f}" + (f" + {files / GIB:.1f}" if files else ""))
        return cells

    def cell(self, memory: int, batch: int) -> str:
        """Return how a model fits on a card of ``memory`` GiB with micro-batches of ``batch`` sequences, and its speed.

        The fastest measures are taken that fit; micro-batches of several sequences are checkpointed.
        """
        fit = Fit(self.planner, memory * GIB, default_reserve(memory * GIB))
        for letters, options in MEASURES.items():
            request = replace(self.planner.request, batch_size=batch, **options)
            if (batch > 1) > request.recomputes or not fit.fits(request):
                continue
            middle = len(self.planner.build(request).blocks) // 2
            seconds = StepTimes(self.planner, CARDS[memory]).figures(request, middle).seconds
            return f"{letters}{': ' * bool(letters)}{seconds:.2g} s, {batch * SEQ_LEN / seconds:,.0f}"
        return "-"

    def cells(self, batch: int) -> list[str]:
        """Return the cells of a table of speeds."""
        return [self.cell(memory, batch) for memory in CARDS]


@cache
def shape_of(model: str) -> Shape:
    """Return the plans of a model, which its tables share."""
    return Shape(model)


def row(first: str, cells: Sequence[str]) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join([first, *cells])} |"


def rows_of(model: str) -> Iterator[str]:
    """Yield the rows of a model: in the table of host memory, and in those of speeds."""
    yield row(MODELS[model], shape_of(model).host())
    for batch in BATCHES:
        yield row(MODELS[model], shape_of(model).cells(batch))


def page() -> str:
    """Return the text of docs/cards.md."""
    rows = []
    for model in MODELS:
        rows.append(list(rows_of(model)))
        print(f"planned {model}", file=sys.stderr, flush=True)
    of_host, *of_speed = zip(*rows, strict=True)

    def table(columns: Sequence[str], lines: Sequence[str]) -> str:
        return "\n".join([row("model", columns), row("---", ["---"] * len(columns)), *lines])

    titles = [f"One sequence of {SEQ_LEN} tokens", *(f"{n} sequences of {SEQ_LEN} tokens" for n in BATCHES[1:])]
    speeds = [
        f"### {title}\n\n{table([f'{memory} GB, {card}' for memory, card in CARDS.items()], lines)}"
        for title, lines in zip(titles, of_speed, strict=True)
    ]
    return _TEXT.format(host=table(list(STATES), of_host), speeds="\n\n".join(speeds))


_TEXT = """# Which card for which model

Everything on this page is planned, nothing is measured. `python -m hift_ds.planner.cards docs/cards.md` writes it, in
some minutes and without a GPU. One card, bf16, AdamW, one layer per block, ZeRO 2. What a plan counts, and how exact it
is, is in [Memory](memory.md#planned-and-measured).

## Host memory

GiB that the run needs in addition to the process itself and the system, for which the planner keeps 4 GiB free. The
figure after "+" is the space in files on a drive. Masters are split (`offload.master: split`). 8-bit moments are
`offload.moments: 8bit`, weights in host memory `offload.weights: cpu`, state in files `offload.device: nvme`.
Several cards in one machine share the weights in host memory, and at ZeRO 2 each rank has its part of the state: the
figures are those of all ranks together.

{host}

## Speed

Seconds of a step and tokens a second with exact state in host memory, on a middle block: **C** with activation
checkpointing, **W** with weights in host memory, no letter: neither. "-": it does not fit. 1 GiB and a twentieth
of the card stay free. The cards are examples of their size. Their rates come from data sheets, and only the H200's
prediction was compared with measurements.

With weights in host memory, a small micro-batch waits for the bus, and a large one hides it. The micro-batches of the
second table have activation checkpointing.

{speeds}
"""


def main(arguments: Sequence[str]) -> int:
    """Write the page into the file that is named, and return the exit code."""
    if len(arguments) != 1:
        print("usage: python -m hift_ds.planner.cards FILE.md", file=sys.stderr)
        return 2
    Path(arguments[0]).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
