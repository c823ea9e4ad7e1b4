"""Records of a comparison that never was, as evaluation/compare/command.py writes them."""

from __future__ import annotations

import random
from typing import Any

from hift_ds.evaluation.report.resampling import bootstrap_scores, interval
from hift_ds.evaluation.report.results import METHODS

UNTRAINED = ("zero-shot", "icl")
METRICS = {"sst2": "accuracy", "rte": "accuracy", "cb": "accuracy", "squad": "f1", "e2e": "bleu"}


def cell(
    label: str = "hift",
    method: str | None = None,
    task: str = "sst2",
    seed: int = 0,
    right: list[int] | None = None,
    accuracy: float = 0.8,
    n: int = 40,
    replicates: int = 60,
    **changes: Any,
) -> dict[str, Any]:
    """A cell that is ok: `right` tells of each test example whether it was answered, else drawn by `accuracy`."""
    method = method or label
    draw = random.Random(f"{label} {task} {seed}")
    if right is None:
        hard = random.Random(f"{task} {seed}")  # the same examples are hard for all methods
        right = [int(0.7 * hard.random() + 0.3 * draw.random() < 0.15 + 0.7 * accuracy) for _ in range(n)]
    found = right
    scores = bootstrap_scores(lambda some: sum(found[i] for i in some) / len(some), len(found), replicates, task)
    trained = method not in UNTRAINED
    place = METHODS.index(method) if method in METHODS else 0
    steps, a_step = 100, 0.05 * (1 + place % 5)
    floor = 0.1 + 0.05 * place
    curve = [[s, s * a_step, s * 512, floor + 2.2 * 0.96**s + 0.1 * draw.random()] for s in range(1, steps + 1)]
    parts = {"parameters": 2**29, "gradients": 2**28 >> place % 4, "master_weights": 2**27, "buffers": 2**24}
    parts |= {"optimizer_state": 2**30 >> place % 5, "activations": 2**28}
    record = {
        "label": label,
        "method": method,
        "model": "smollm2-135m",
        "task": task,
        "seed": seed,
        "budget": "1024 samples",
        "status": "ok",
        "reason": None,
        "metric": METRICS.get(task, "accuracy"),
        "score": sum(right) / len(right),
        "n": len(right),
        "metrics": {METRICS.get(task, "accuracy"): sum(right) / len(right)},
        "interval": list(interval(scores)),
        "bootstrap": scores,
        "steps": steps if trained else 0,
        "samples": 8 * steps if trained else 0,
        "tokens": 512 * steps if trained else 0,
        "seconds": steps * a_step * (1 + 0.1 * draw.random()) if trained else 0,
        "step_seconds": a_step if trained else None,
        "tokens_per_second": 512 / a_step if trained else None,
        "trained_parameters": 134_515_008 >> place if trained else 0,
        "total_parameters": 134_515_008,
        "peak_memory": sum(parts.values()) * (1.02 + 0.05 * draw.random()),
        "peak_memory_kind": "resident set of the process above the loaded libraries",
        "planned_memory": parts | {"total": sum(parts.values())} if trained else None,
        "flops": 6e9 * 512 * steps if trained else 0,
        "loss_first": curve[0][3] if trained else None,
        "loss_last": curve[-1][3] if trained else None,
        "curve": curve if trained else [],
        "learning_rate": 3e-5 if trained else None,
        "tuning": [{"learning_rate": r, "score": 0.5} for r in (1e-5, 3e-5, 1e-4)] if trained else [],
        "versions": {"torch": "2.11.0", "transformers": "5.1.0"},
        "git": "e7fe1c8",
        "data_sha256": f"{task}{seed}",
        "ranks": 1,
        "date": "2026-11-23",
        "machine": "2 cores of a CPU",
    }
    return record | changes


def missing(
    label: str, task: str = "sst2", seed: int = 0, status: str = "failed", reason: str = "out of memory"
) -> Any:
    names = {"label": label, "method": label, "model": "smollm2-135m", "task": task, "seed": seed}
    return names | {"budget": "1024 samples", "status": status, "reason": reason}


def many(tasks: tuple[str, ...] = ("sst2", "rte", "squad"), seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """All methods, three rows more of HiFT's, a method that fits no task, one that failed once."""
    rows = {method: method for method in METHODS}
    rows |= {"hift, top2down": "hift", "hift, random": "hift", "hift, m = 4": "hift", "hift, m = 8": "hift"}
    found = []
    for place, (label, method) in enumerate(rows.items()):
        for task in tasks:
            for seed in seeds:
                if method == "full-top2" or (method == "prelayer" and task == "squad"):
                    reason = "the model has no layer norm that it could read"
                    found.append(missing(label, task, seed, "not_applicable", reason))
                elif method == "galore" and seed == 1:
                    found.append(missing(label, task, seed))
                else:
                    found.append(cell(label, method, task, seed, accuracy=0.9 - 0.02 * place, n=200, replicates=200))
    return found
