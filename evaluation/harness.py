"""Evaluate a model with lm-evaluation-harness: its prompts, metrics and task definitions, on local files.

    python -m evaluation.harness --model FOLDER --tasks gsm8k,rte --data FOLDER --output FILE.json

The results are comparable with published results of the harness. Each task is the harness's YAML, included by a YAML
that only sets the location of the data. Rows are converted to the columns of the Hub's copies, which the harness reads.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from deepspeed.accelerator import get_accelerator

from hift_ds import paths
from hift_ds.evaluation.tasks.catalog import TASKS, find_task
from hift_ds.evaluation.tasks.loading import read_task
from hift_ds.launch.data.formats import LABEL_TASKS, converter, flatten
from hift_ds.launch.data.sources import Row
from hift_ds.launch.errors import UserError, looked_in, nearest
from hift_ds.launch.model.loading import load_config, load_model, load_tokenizer
from hift_ds.launch.model.settings import ModelSettings
from hift_ds.model.quantization import quantization_method

# Our name -> the harness's YAML and the columns it reads. ReCoRD needs a module that transformers 5 lacks.
HARNESS = {
    "gsm8k": ("gsm8k/gsm8k.yaml", ("question", "answer")),
    "sst2": ("glue/sst2/default.yaml", ("sentence", "label")),
    "rte": ("super_glue/rte/default.yaml", ("premise", "hypothesis", "label")),
    "cb": ("super_glue/cb/default.yaml", ("premise", "hypothesis", "label")),
    "boolq": ("super_glue/boolq/default.yaml", ("passage", "question", "label")),
    "copa": ("super_glue/copa/default.yaml", ("premise", "choice1", "choice2", "question", "label")),
    "multirc": ("super_glue/multirc/default.yaml", ("paragraph", "question", "answer", "label")),
    "wic": ("super_glue/wic/default.yaml", ("sentence1", "sentence2", "start1", "end1", "label")),
    "wsc": ("super_glue/wsc/default.yaml", ("text", "span1_text", "span2_text", "span2_index", "label")),
    "cola": ("glue/cola/default.yaml", ("sentence", "label")),
    "mnli": ("glue/mnli/default.yaml", ("premise", "hypothesis", "label")),
    "mrpc": ("glue/mrpc/default.yaml", ("sentence1", "sentence2", "label")),
    "qnli": ("glue/qnli/default.yaml", ("question", "sentence", "label")),
    "qqp": ("glue/qqp/default.yaml", ("question1", "question2", "label")),
}


def run(
    model: Any,
    tasks: Sequence[str],
    data: Path,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Evaluate a model.

    Args:
        model: the folder of a causal language model with its tokenizer, or an `lm_eval.api.model.LM`, such as an `HFLM`
            around a loaded model.
        tasks: names from `HARNESS`.
        data: a folder with a subfolder for each task, directly or in `superglue`. A subfolder has the publisher's files
            (gsm8k, sst2, SuperGLUE), or a file per split with the Hub's columns.
        limit: evaluate only the first examples of each task; None = all.
        num_fewshot: solved examples in the prompt; None = the number in the harness's task definition.

    Returns:
        `lm_eval` (its version), `limit`, and for each task in `tasks`: its name in the harness (`task`), `version`,
        `examples`, `num_fewshot`, `files` (path -> sha256) and `metrics` by the harness's names, from 0 to 1. GSM8K
        also has `unanswered`, the number of replies in which the strict match finds no number.

    Raises:
        UserError: lm-evaluation-harness is not installed, or a task, the model or the data does not exist.
    """
    try:
        from lm_eval import evaluator
        from lm_eval import tasks as definitions
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed ({error}); install it: pip install 'hift_ds[harness]'"
        ) from error
    names = list(dict.fromkeys(name.lower() for name in tasks))
    for name in names:
        if name not in HARNESS:
            raise UserError(f"--tasks: unknown task {name!r}; expected {', '.join(HARNESS)}{nearest(name, HARNESS)}")
    if isinstance(model, str | Path):
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"--model: {str(model)!r} is not a folder with a config.json{looked_in(model)}")
        model = _load(HFLM, folder, batch_size)
    with tempfile.TemporaryDirectory() as place:
        root = Path(definitions.__file__).parent
        defined = {name: _define(name, data, root, Path(place)) for name in names}
        theirs = [task for task, _ in defined.values()]
        found = evaluator.simple_evaluate(
            model,
            tasks=list(theirs),
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            task_manager=definitions.TaskManager(include_path=place, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    assert found is not None  # None only on ranks other than 0
    report: dict[str, Any] = {"lm_eval": importlib.metadata.version("lm_eval"), "limit": limit, "tasks": {}}
    for name, (task, files) in defined.items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in found["results"][task].items()
            if isinstance(value, float) and "_stderr" not in key
        }
        report["tasks"][name] = {
            "task": task,
            "version": found["versions"].get(task),
            "examples": found["n-samples"][task]["effective"],
            "num_fewshot": found["n-shot"][task],
            "files": files,
            "metrics": metrics,
        }
        if find_task(name).max_new_tokens:
            written = {one["doc_id"]: one["resps"][0][0] for one in found["samples"][task]}  # once for each filter
            report["tasks"][name]["unanswered"] = find_task(name).unanswered(list(written.values()))
    return report


def _load(kind: Callable[..., Any], folder: Path, batch_size: int) -> Any:
    """Load a model as training does, which refuses weights that are not the model's; quantized weights as HFLM does."""
    device = get_accelerator().current_device_name()
    settings, say = ModelSettings(name_or_path=str(folder)), functools.partial(print, file=sys.stderr)
    if problems := settings.problems():
        raise UserError("\n".join(problems))
    tokenizer = load_tokenizer(settings)
    config = load_config(settings, tokenizer, say=say, allow_quantized=True)
    if quantization_method(config):
        return kind(pretrained=str(folder), tokenizer=tokenizer, device=device, dtype="auto", batch_size=batch_size)
    model = load_model(settings, config, "auto", say, device)
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _define(name: str, data: Path, root: Path, place: Path) -> tuple[str, dict[str, str]]:
    """Write the data and a task that reads it; return the harness's name of the task and the files' SHA-256."""
    definition = root / HARNESS[name][0]
    theirs = _definition(definition)
    rows, files = read_task(find_task(name), str(_folder(name, data)), None, None)
    if not rows["eval"]:
        raise UserError(f"{name}: {_folder(name, data)} has no held-out file with labels to score on")
    splits = {"train": theirs.get("training_split"), "eval": theirs.get("test_split") or theirs["validation_split"]}
    paths = {}
    for part, split in splits.items():
        if split is not None and rows[part]:
            paths[split] = str(place / f"{name}-{split}.parquet")  # parquet keeps the types
            datasets.Dataset.from_list(_columns(name, rows[part])).to_parquet(paths[split])
    task = theirs["task"]
    ours = {
        "include": str(definition),
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": paths, "cache_dir": str(place / "cache")},
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump(ours))
    return task, files


def _definition(path: Path) -> dict[str, Any]:
    """Read the plain values of a task's YAML and of the files it includes, without its functions."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    found = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    return {**_definition(path.parent / found["include"]), **found} if "include" in found else found


def _folder(name: str, data: Path) -> Path:
    """Find the task's folder, ignoring letter case."""
    if not data.is_dir():
        raise UserError(f"--data: {str(data)!r} is not a folder{looked_in(data)}")
    for above in (data, data / "superglue"):
        if above.is_dir():
            for one in sorted(above.iterdir()):
                if one.is_dir() and one.name.lower() == name:
                    return one
    raise UserError(f"--data: {str(data)!r} has no folder {name!r}, directly or in 'superglue'")


def _columns(name: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Convert rows to the columns of the Hub's copy."""
    source = TASKS[name].data
    flat = [(where, one) for where, row in rows for one in flatten(source, row, where)]
    if source in LABEL_TASKS:
        convert = converter(source, "text-label", {})
        flat = [(where, {**row, "label": convert(row, where)["label"]}) for where, row in flat]
    found = []
    for where, row in flat:
        columns = HARNESS[name][1]
        if missing := [column for column in columns if column not in row]:
            raise UserError(f"{where}: expected the columns {', '.join(columns)}; {', '.join(missing)} missing")
        if row.get("label") != -1:  # skip unlabelled rows
            found.append({column: row[column] for column in columns})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`; return the exit code: 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.harness", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        type=paths.to_read,
        required=True,
        metavar="FOLDER",
        help="a causal language model with its tokenizer",
    )
    add("--tasks", required=True, help=f"comma-separated: {', '.join(HARNESS)}")
    add("--data", type=paths.to_read, required=True, metavar="FOLDER", help="has a folder for each task")
    add("--limit", type=_positive, metavar="N", help="only the first N examples of each task")
    add(
        "--num-fewshot",
        type=_natural,
        metavar="K",
        help="solved examples in the prompt; default: the task's",
    )
    add("--batch-size", type=_positive, default=8, metavar="N")
    add("--output", type=paths.to_write, required=True, metavar="FILE", help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    try:
        if not options.output.parent.is_dir():  # found before the evaluation, whose results would be lost
            raise UserError(f"--output: the folder {str(options.output.parent)!r} does not exist; create it")
        report = run(
            options.model,
            options.tasks.split(","),
            options.data,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
        )
        options.output.write_text(json.dumps({"model": str(options.model), **report}, indent=1) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, one in report["tasks"].items():
        figures = ", ".join(f"{metric} {value:.4f}" for metric, value in one["metrics"].items())
        empty = f", {one['unanswered']} without an answer" if one.get("unanswered") else ""
        print(f"{name}: {figures} ({one['examples']} examples, {one['num_fewshot']} shots{empty})")
    return 0


def _natural(text: str, least: int = 0) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {least}")
    return int(text)


def _positive(text: str) -> int:
    return _natural(text, 1)


if __name__ == "__main__":
    sys.exit(main())
