"""Memory and start time of each rank with few and with many rows.

    python -m evaluation.cost.data_start --rows 10000 1000000 --ranks 2 --folder FOLDER

For each number of rows, a file of that many rows is written to the folder, and the ranks start three times: the first
start tokenizes the rows, the second one uses the result, and the third one reads the rows as a stream. A start ends
with the first batch. Memory is the anonymous memory of each rank: what the kernel cannot drop, without the pages of
files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hift_ds
from hift_ds.evaluation.cost.machine import machine
from hift_ds.evaluation.cost.process_memory import anonymous, peak_memory
from hift_ds.launch.errors import UserError

STARTS = ("first", "second", "stream")
BATCH, STEPS = 16, 200


@dataclass
class Start:
    """What one rank measured, in seconds and bytes.

    Attributes:
        seconds: until the first batch.
        libraries: anonymous memory before.
        highest, after: above it, at the peak until the first batch and after all steps.
        examples: of all steps, read back.
    """

    rows: int
    start: str
    rank: int
    seconds: float
    libraries: int
    highest: int
    after: int
    examples: int


def write_rows(path: Path, rows: int) -> None:
    """Write rows of seven words, which are about 50 tokens of the byte tokenizer."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt, completion = (" ".join(draw.choices(words, k=k)) for k in (4, 2))
            file.write(json.dumps({"prompt": f"{number} {prompt}", "completion": completion}) + "\n")


def measure(path: Path, rows: int, start: str) -> Start:
    """Start one rank, and take some batches. To be called in a new process."""
    from hift_ds.launch.data.batches import Share, load_windows
    from hift_ds.launch.data.loading import open_data, prepare_data
    from hift_ds.launch.data.settings import DataSettings
    from hift_ds.launch.model.tokenizer import byte_tokenizer
    from hift_ds.launch.runtime.ranks import first_on_node, join

    join(1800)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tokenizer = byte_tokenizer()
    settings = DataSettings("jsonl", str(path), cache=str(path.parent / "cache"), streaming=start == "stream")
    import datasets  # noqa: F401

    began = time.perf_counter()
    with peak_memory() as peak:
        folder = first_on_node(prepare_data(settings, tokenizer, task="causal-lm", seed=0))
        data = open_data(settings, tokenizer, folder)
        share = Share(tokenizer.pad_token_id, BATCH, BATCH // world, rank, world)
        windows = load_windows(data.train, 0, share, 0, STEPS, 0)
        examples = [len(next(windows).rows)]
        seconds = time.perf_counter() - began
    examples += [len(window.rows) for window in windows]
    return Start(rows, start, rank, seconds, peak.start, peak.above, anonymous() - peak.start, sum(examples))


def starts(path: Path, rows: int, start: str, ranks: int) -> list[Start]:
    """Start all ranks in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "hift_ds.evaluation.cost.data_start", "--rank", str(path), str(rows), start]
    source = str(Path(hift_ds.__file__).parent.parent)
    places = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    common = {**os.environ, "PYTHONPATH": places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        processes.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if failed := [rank for rank, process in enumerate(processes) if process.returncode]:
        raise UserError(f"{start} start with {rows} rows: ranks {failed} failed")
    return [Start(**json.loads(output.splitlines()[-1])) for output in outputs]


def compare(folder: Path, numbers: Sequence[int], ranks: int) -> Iterator[Start]:
    """Measure all starts. What is written to the folder is removed."""
    for rows in numbers:
        place = folder / f"rows-{rows}"
        place.mkdir(parents=True)
        try:
            write_rows(place / "rows.jsonl", rows)
            for start in STARTS:
                yield from starts(place / "rows.jsonl", rows, start, ranks)
        finally:
            shutil.rmtree(place)


def line(one: Start) -> str:
    """Return a row of the table."""
    mib = 2.0**20
    memory = " | ".join(f"{value / mib:.1f}" for value in (one.libraries, one.highest, one.after))
    return f"| {one.rows:,} | {one.start} | {one.rank} | {one.seconds:.1f} | {memory} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.cost.data_start", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], help="numbers of rows")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4, 8, 16), help="processes on this machine")
    parser.add_argument("--folder", type=Path, required=True, help="where the rows are written, and removed afterwards")
    options: Any = parser.parse_args(arguments)
    print(f"Start of {options.ranks} ranks on {machine()}\n")
    print("| rows | start | rank | seconds to the first batch | MiB before | more at the peak | more after 200 steps |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for one in compare(options.folder, options.rows, options.ranks):
        print(line(one), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        made = measure(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        print(json.dumps(asdict(made)))
    else:
        main()
