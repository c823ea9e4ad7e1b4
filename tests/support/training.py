"""Runs of `launch/train.py` on the tiny config, in ranks that live through the session: their arguments and results."""

import contextlib
import io
import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.support.paths import REPOSITORY
from tests.support.ranks import run_on_ranks

TINY = str(REPOSITORY / "configs" / "tiny.yaml")
SHORT = ("training.max_steps=2", "data.eval_examples=0")


def arguments(out: Path, *overrides: str, resume: str | None = None) -> list[str]:
    pairs = [f"output.dir={out}", *overrides]
    flags = {None: [], "yes": ["--resume"], "auto": ["--resume", "auto"]}[resume]
    return ["--config", TINY, *(part for pair in pairs for part in ("--set", pair)), *flags]


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def train_and_compare(
    argv: Sequence[str], stop_after: int | None = None, sleep: Callable[[float], None] = lambda _: None
) -> dict[str, Any]:
    """Runs the command line on this rank, and compares the exported folder with the engine's own weights.

    Args:
        stop_after: raise once that many steps are recorded, as if the process had been killed there.
        sleep: takes the place of the minute for which a rank with a mistake waits for the launcher to end it.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from hift_ds.launch import run, train
    from hift_ds.launch.callbacks import records as log_records
    from hift_ds.launch.runtime import process

    seen: dict[str, Any] = {}
    export, record_step = run.export_model, log_records.RunLog.step

    def spy(engine: Any, tokenizer: Any, folder: Path, *others: Any) -> None:
        seen["tensors"] = {}
        tensors = [*engine.module.named_parameters(remove_duplicate=False), *engine.module.named_buffers()]
        for name, tensor in tensors:
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                seen["tensors"][name] = tensor.detach().cpu().clone()
        seen["causal"] = "SequenceClassification" not in type(engine.module).__name__
        export(engine, tokenizer, folder, *others)
        seen["folder"] = folder

    def step_until(log: Any, record: dict[str, Any], *left: Any) -> None:
        record_step(log, record, *left)
        if record["step"] == stop_after:
            raise KeyboardInterrupt

    code: Any = None
    printed = io.StringIO()
    patches: list[Any] = [
        mock.patch.object(run, "export_model", spy),
        mock.patch.object(log_records.RunLog, "step", step_until),
        mock.patch.object(process, "time", types.SimpleNamespace(sleep=sleep)),
    ]
    with patches[0], patches[1], patches[2], contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        with contextlib.suppress(KeyboardInterrupt):
            code = train.main(list(argv))
    result: dict[str, Any] = {"code": code, "printed": printed.getvalue()}
    if "folder" in seen:
        kind = AutoModelForCausalLM if seen["causal"] else AutoModelForSequenceClassification
        loaded = kind.from_pretrained(seen["folder"])
        exported = {**dict(loaded.named_parameters(remove_duplicate=False)), **dict(loaded.named_buffers())}
        result["same_names"] = set(exported) == set(seen["tensors"])
        result["different"] = [
            name
            for name, tensor in seen["tensors"].items()
            if not (tensor.dtype == exported[name].dtype and torch.equal(tensor, exported[name].detach()))
        ]
        result["digest"] = {name: tensor.double().sum().item() for name, tensor in seen["tensors"].items()}
    return result


def run_tiny(ranks: int, out: Path, *overrides: str, resume: str | None = None, stop_after: int | None = None) -> Any:
    """`train_and_compare` on ranks that live through the session; rank 0's result."""
    return run_on_ranks(ranks, train_and_compare, arguments(out, *overrides, resume=resume), stop_after=stop_after)[0]
