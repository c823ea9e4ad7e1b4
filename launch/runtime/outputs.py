"""The output folder of a run: whether it may be used, where to continue in it, and what made it.

OUT/run.json        what the run is: its settings, and what must be the same when it is resumed
OUT/metrics.jsonl   one record a step
OUT/checkpoints/    what `--resume` continues from (hift_ds/checkpoint/store.py)
OUT/model/          the trained model, a Hugging Face folder
OUT/logs/           what each rank did last; a start that failed leaves it too, so it alone is no run
OUT/summary.json    written last: the run is finished
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hift_ds.checkpoint import store
from hift_ds.checkpoint.files import CheckpointError, write_durably
from hift_ds.checkpoint.lock import Lock
from hift_ds.checkpoint.manifest import Checkpoint
from hift_ds.launch import cuts
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.data.cache import tokenizer_hash
from hift_ds.launch.data.loading import Data
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.table import METHODS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OWN_FILES = ("run.json", "metrics.jsonl", "summary.json", "checkpoints", "model")
LOGS = "logs"  # rank logs start before the earlier run in the folder is replaced (ranks.py), so they are not deleted

# Settings that may change between a run and its continuation, because they do not change what is trained, or because
# a checkpoint is converted. Instead of the paths of the data, the hashes of the rows are compared, and instead of those
# of the model its configuration and tokenizer.
FREE = (
    *("model.name_or_path", "model.revision", "model.tokenizer"),
    *("data.path", "data.eval_path", "data.workers", "data.cache", "model.gradient_checkpointing", "model.attention"),
    *("deepspeed.hift.offload", *(f"deepspeed.hift.{key}" for key in cuts.KEYS)),
)
_PLACE_OF_CONFIG = ("_name_or_path", "transformers_version")
STAGE, RANKS = "deepspeed.zero_optimization.stage", "number of ranks"  # DeepSpeed's own engine needs them as they were


def folder(settings: Settings) -> Path:
    """Return the run's output folder."""
    return Path(str(settings.output.dir)).expanduser()


def check_start(folder: Path, settings: Settings, resume: str | None) -> None:
    """Check that the folder is free for a new run, or holds a run to continue or a finished one. Only reads files.

    `resume` is None, "yes" (`--resume`) or "auto" (`--resume auto`).

    Raises:
        UserError: the folder holds a run and neither resume nor overwrite is set; or resume is set, there is no
            checkpoint, and resume is "yes" or a checkpoint is missing.
    """
    used = [name for name in OWN_FILES if (folder / name).exists()]
    if resume is None:
        if used and not settings.output.overwrite:
            raise UserError(
                f"output.dir: {str(folder)!r} already holds a run ({', '.join(used)}). Set another output.dir, "
                f"continue it with --resume, or delete it with --set output.overwrite=true."
            )
        return
    if settings.output.overwrite:
        raise UserError("output.overwrite: true would delete the run that --resume continues. Use one of them.")
    steps = None if settings.training.epochs else settings.training.max_steps
    if steps_of_finished(folder, settings, steps) or has_checkpoint(folder):
        return
    place = folder / "checkpoints"
    named = store.pointed(place)
    missing = f"{str(place)!r} has none" + (f", though {store.POINTER!r} there names {named!r}" if named else "")
    if resume == "yes":
        raise UserError(
            f"--resume: there is no checkpoint to continue from: {missing}. Checkpoints are written every "
            "training.save_every steps, and of the best step with training.keep_best. "
            "`--resume auto` starts a new run in that case."
        )
    if named or _got_to_a_checkpoint(folder):
        raise UserError(
            f"--resume auto: {str(folder)!r} is a run that wrote checkpoints, and {missing}. Restore them, or start a "
            "new run with output.overwrite=true instead of --resume."
        )


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run has ever committed a checkpoint, whole or damaged."""
    return store.exists(folder / "checkpoints")


def find_checkpoint(folder: Path, tag: str | None = None) -> Checkpoint | None:
    """Return the newest whole checkpoint of the run, or the one with this tag, verified. All ranks call it.

    Raises:
        UserError: all checkpoints are damaged, or this one is.
    """
    try:
        return store.find(folder / "checkpoints", tag)
    except CheckpointError as error:
        raise UserError(
            f"--resume: {error}\nNothing was changed. To start a new run, use another output.dir."
        ) from None


def _got_to_a_checkpoint(folder: Path) -> bool:
    """Return whether the run in the folder has reached its first checkpoint."""
    try:
        training = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]["training"]
        save_every = training["save_every"] or training.get("keep_best") and training["eval_every"]
        steps = len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(save_every) and steps > save_every  # a step's record is written before its checkpoint


def steps_of_finished(folder: Path, settings: Settings, steps: int | None) -> int:
    """Return the number of steps of the finished run in the folder; 0 if there is none or it is shorter than asked for.

    Args:
        steps: the steps that the settings ask for; None while they are given as epochs of data not yet loaded.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    if settings.output.export and not (folder / "model").is_dir():
        return 0
    done = summary.get("steps", 0)
    if steps is None:
        return done if (summary.get("epochs") or 0) >= (settings.training.epochs or 0) else 0
    return done if done >= steps else 0


def check_free(folder: Path) -> None:
    """Refuse a folder into which another run is writing. Changes nothing.

    Raises:
        UserError: naming the process.
    """
    try:
        Lock.check(folder)
    except CheckpointError as error:
        raise UserError(f"output.dir: {error}") from None


def claim(folder: Path) -> Lock:
    """Make the folder, and keep other runs out of it until `release` or the end of this process. Call it on one rank.

    Raises:
        UserError: another run writes into it.
    """
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            return Lock(folder)
    except CheckpointError as error:
        raise UserError(f"output.dir: {error}") from None


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before anything is loaded. Leaves nothing behind.

    Raises:
        UserError: naming the folder that is not writable.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"output.dir: {str(folder)!r}: {str(place)!r} cannot be written to ({error.strerror}). Set another "
            f"output.dir, or free space or grant permission there."
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that could not be written, and the remedy.

    Raises:
        UserError: instead of the system's error, e.g. of a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: cannot be written ({reason}). Free space or grant permission there; then continue from the "
            f"newest checkpoint with --resume auto, or start a new run in another output.dir."
        ) from error


def clear(folder: Path) -> None:
    """Make the folder, and delete an earlier run's files in it. Other files stay."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in OWN_FILES:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def identity(
    settings: Settings, world_size: int, data: Data, config: PretrainedConfig, tokenizer: Any
) -> dict[str, Any]:
    """Return what a continued run must share with the run it continues, by the names of the settings.

    The model may be at another path: the weights come from the checkpoint.
    """
    absent = () if settings.data.streaming else ("streaming", "shuffle_rows")  # and in runs of earlier versions
    found = {
        "method": asdict(settings.method),
        "model": asdict(settings.model),
        "configuration of the model (sha256)": _config_hash(config),
        "tokenizer (sha256)": tokenizer_hash(tokenizer),
        "data": {key: value for key, value in asdict(settings.data).items() if key not in absent},
        "rows of the data (sha256)": [data.report[part]["sha256"] for part in ("train", "eval")],
        "training.seed": settings.training.seed,
        "training.batch_size": settings.training.batch_size,
        # The checkpoint holds the settings of optimizer and schedule, so new ones would have no effect.
        "training.lr_schedule": settings.training.lr_schedule,
        "training.warmup_ratio": settings.training.warmup_ratio,
        "deepspeed.scheduler": settings.deepspeed.get("scheduler"),
        "deepspeed.optimizer": settings.deepspeed["optimizer"],
        "deepspeed.hift": settings.deepspeed["hift"],
        "dtype of the weights (deepspeed.bf16, fp16)": settings.dtype,
    }
    if METHODS[settings.method.name].engine == "deepspeed":
        found |= {STAGE: settings.zero_stage, RANKS: world_size}
    return found


def _config_hash(config: PretrainedConfig) -> str:
    """Hash what decides the model's shape and computation, and not where it was found."""
    content = {key: value for key, value in config.to_dict().items() if key not in _PLACE_OF_CONFIG}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def recorded(folder: Path) -> dict[str, Any]:
    """Return the content of run.json.

    Raises:
        UserError: it is missing, unreadable, or of an earlier version.
    """
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--resume: {str(folder / 'run.json')!r} is missing or unreadable, so these settings cannot be compared "
            f"with the run's. Start a new run in another output.dir."
        ) from None
    if "cuts" not in found:
        raise UserError(
            f"--resume: an earlier version of hift_ds made {str(folder)!r}. Continue it with that version, or start a "
            "new run in another output.dir."
        )
    return found


def rate_of(recorded: Mapping[str, Any]) -> float | None:
    """Return the highest learning rate of a run, from its run.json; None if that has none."""
    section = recorded.get("settings", {}).get("deepspeed", {})
    return section.get("optimizer", {}).get("params", {}).get("lr")


def check_same_run(folder: Path, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a run continues with its own settings.

    Args:
        recorded: the content of run.json.
        current: from `identity`.

    Raises:
        UserError: naming each setting that differs.
    """
    now = json.loads(json.dumps(current))  # tuples as lists, as in the file
    before = recorded["identity"]
    differing = [text for key, value in now.items() for text in _differences(key, before.get(key), value)]
    if differing:
        first = f"--resume: {str(folder)!r} was made with other settings. Use the same, or another output.dir:"
        raise UserError("\n".join([first, *differing]))


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield a line for each differing value, at any depth of the mappings. Those in `FREE` may differ."""
    if name in FREE:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        was, is_now = ("nothing" if value is None else repr(value) for value in (before, now))
        yield f"  - {name}: the run has {was}, these settings have {is_now}"


def layout_note(settings: Settings, world_size: int, about: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Say in which layout a run continues, if it is not the one that saved the checkpoint; else "".

    Args:
        world_size: number of ranks now.
        about: the description of the run in the checkpoint's manifest.
        recorded: run.json.
    """
    config = about.get("config", {})
    now = {
        "ranks": world_size,
        "ZeRO stage": settings.zero_stage,
        "micro-batches of": settings.micro_batch_size,
        "accumulation": settings.accumulation,
    }
    before = {
        "ranks": about.get("world_size"),
        "ZeRO stage": about.get("zero_stage"),
        "micro-batches of": config.get("train_micro_batch_size_per_gpu"),
        "accumulation": config.get("gradient_accumulation_steps"),
    }
    changed = [
        f"{name} {value} (before: {before[name]})" for name, value in now.items() if before[name] not in (None, value)
    ]
    offload = settings.deepspeed["hift"].get("offload", {})
    earlier = recorded.get("settings", {}).get("deepspeed", {}).get("hift", {}).get("offload", {})
    changed += [
        f"offload.{key} {offload.get(key, 'default')} (before: {earlier.get(key, 'default')})"
        for key in {**earlier, **offload}
        if offload.get(key) != earlier.get(key)
    ]
    if not changed:
        return ""
    batch = settings.training.batch_size
    return f"note: the checkpoint is continued with {', '.join(changed)}; the global batch stays {batch}"


def write_json(path: Path, content: Any) -> None:
    """Write the file atomically: a reader never sees half of it."""
    with writing(path):
        write_durably(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
