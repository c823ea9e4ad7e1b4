"""The ``hift`` section of a DeepSpeed config: its fields, their checks, and the settings it cannot be combined with."""

import difflib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from hift_ds import paths
from hift_ds.blocks.schedule import STRATEGIES

SECTION = "hift"
LR_TICKS = ("cycle", "step")


class _Internal(str, Enum):
    WHERE_POSSIBLE = "where possible"
    AS_ALLOWED = "as allowed"


# Value of `offload.defer` in loops that need no `settle()`: true wherever the engine can do it. Not for users: a string
# in a config is never this object.
WHERE_POSSIBLE = _Internal.WHERE_POSSIBLE
# Value of `offload.pin_memory` after a check of what the system allows: `auto` without another check.
AS_ALLOWED = _Internal.AS_ALLOWED
# Smallest `offload.buffer_size` in bytes: in a smaller one, alignment would take more space than the elements.
MIN_BUFFER = 65536
# Vectors of encoded state have a multiple of this many elements. The rest is padded with zeros.
CODEC_ALIGNMENT = 1024
# Elements by which the alignment of a parameter's state in a slot can enlarge it, at most, if nothing is encoded.
PLAIN_ALIGNMENT = 256
# Spare elements in a chunk that holds a whole block, for the padding of its parameter groups.
_BLOCK_OVERHEAD = 4096
# Bytes by which the alignment of encoded values can enlarge a chunk in a slot, at most.
SLOT_OVERHEAD = 4096
# Elements of a gradient in one chunk of its norm, which DeepSpeed copies to fp64.
NORM_CHUNK = 2**22
# Bytes that are read from files, or written to them, at a time.
AIO_CHUNK = 2**23


def noise_chunk(device: str) -> int:
    """Return the number of elements of MeZO's noise that share a seed and are computed at a time.

    Another size gives other noise. It depends on the kind of device, as random generators do. On a CPU, 2^17 elements
    fit into a core's cache: MeZO's own arithmetic takes 0.6 of the time that it takes with 2^20. On an H200, the
    overhead of a chunk of 2^20 elements was 0.2 ms, far more than its computation, so chunks are larger there.

    Args:
        device: the device's type, such as ``cpu``.
    """
    return 2**17 if device == "cpu" else 2**22


def file_buffer_bytes(largest: int) -> int:
    """Return the bytes of page-locked host memory between the device and files: room for the state of two blocks.

    While one is stepped, the next one's is read, and the one before is written.

    Args:
        largest: the most bytes that one block has in files, on one rank.
    """
    return 2 * (-(-largest // AIO_CHUNK) + 1) * AIO_CHUNK  # a block's state begins and ends inside of a piece


class ConfigError(ValueError):
    """Lists every problem of a config, one per line.

    Attributes:
        problems: one message each.
    """

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class OffloadConfig:
    """The section ``hift.offload``: where the state of inactive blocks lives, and how the active block is stepped.

    Attributes:
        device: ``cpu``: in host memory; ``nvme``: in files in ``nvme_path``; ``none``: on the device.
        step: ``block``: the whole block's state comes to the device for the step; ``streamed``: it comes in chunks;
            ``auto``: streamed if the optimizer is element-wise.
        buffer_size: bytes of a chunk, as the step needs them. A slot holds one chunk, in the formats of ``master`` and
            ``moments``. Two slots are on the device, or what ``prefetch`` says.
        pin_memory: page-lock the host buffers. ``auto``: as far as the system allows it, with a warning if that is not
            all; true: refuse to run otherwise.
        prefetch: start to copy state to the device before the step. With ``streamed``, chunks are copied during
            forward and backward, as many as there are slots; with ``block``, the whole state is copied after backward.
            A number of bytes is the memory for slots, in place of two. A chunk has ``buffer_size`` bytes, but at
            least a twelfth of this number, and a slot at most half of it. A block's state and two slots hide all
            copies.
        defer: let the device update a block during the next forward pass, until that reaches the block. ``auto``:
            only in ``launch/train.py`` and in transformers' own Trainer inside :class:`hift_ds.enabled`, because plain
            reads of the weights after a step need ``engine.settle()`` first.
        nvme_path: an existing folder, for ``device: nvme``.
        weights: ``device``: the weights of the whole model are on the device; ``cpu``: they wait in host memory, and
            layers take turns in two slots on the device. For ZeRO 0 to 2; the ranks of a machine share one copy.
        master: the format of masters off the device: ``fp32``; ``split``: what the bf16 weights lack of them, which
            is exact, in 2.125 bytes an element; ``auto``: ``split`` if the weights are bf16, the optimizer is
            element-wise, and it computes on the device.
        moments: the format of optimizer state off the device: ``fp32``: as the optimizer makes it; ``8bit``: codes of
            8 bits with a scale for each 256 elements, which is not exact.
        nvme: what is in files with ``device: nvme``: ``all`` state, or the ``moments`` alone, with the masters in host
            memory.
    """

    device: str = "cpu"
    step: str = "auto"
    buffer_size: int = 67108864
    pin_memory: bool | str = "auto"
    prefetch: bool | int = True
    defer: bool | str = "auto"
    nvme_path: str | None = None
    weights: str = "device"
    master: str = "auto"
    moments: str = "fp32"
    nvme: str = "all"

    @property
    def pins(self) -> bool:
        """Whether host buffers are page-locked where the system allows it."""
        return self.pin_memory is not False

    @property
    def defers(self) -> bool:
        """Whether the engine defers the update if it can."""
        return self.defer is True or self.defer is WHERE_POSSIBLE

    def slots(
        self, blocks: Iterable[Sequence[int]], ranks: int, per_element: int, stored: float | None = None
    ) -> tuple[int, int]:
        """Return the bytes of each slot of the streamed step, and the number of slots.

        A chunk is at most the largest block's state on one rank, with room for the alignment of its tensors. More slots
        than two blocks have chunks would stay empty.

        Args:
            blocks: the number of elements of each parameter, for each block.
            ranks: number of ranks that share the state.
            per_element: bytes of fp32 master and state of one element.
            stored: the same in a slot, if the store keeps some of it encoded; None: the same.
        """
        alignment, overhead, in_slot = PLAIN_ALIGNMENT, 0, 1.0
        if stored is not None:
            alignment, overhead, in_slot = CODEC_ALIGNMENT, SLOT_OVERHEAD, stored / per_element
        numel = max(-(-sum(block) // ranks) + alignment * len(block) for block in blocks) + _BLOCK_OVERHEAD
        largest = max(numel * per_element, MIN_BUFFER)
        chunk = min(self.buffer_size, largest)
        if not isinstance(self.prefetch, bool):
            # Few large copies take the host less time than many small ones, and a large budget has room for them.
            most = int((self.prefetch // 2 - overhead) / in_slot)
            chunk = min(max(self.buffer_size, self.prefetch // 12), most, largest)
        size = math.ceil(chunk * in_slot) + overhead
        count = 2 if isinstance(self.prefetch, bool) else self.prefetch // size
        return size, max(2, min(count, 2 * math.ceil(largest / chunk)))


@dataclass(frozen=True)
class HiFTConfig:
    """The ``hift`` section. Names follow the paper (section 3.1 and table 4) if it has one.

    Attributes:
        enabled: False gives DeepSpeed's own full-parameter training.
        layers_per_block: the paper's m: number of consecutive layers in a block.
        strategy: order of the blocks: ``bottom2up``, ``top2down`` or ``random``.
        seed: seed of the ``random`` order.
        steps_per_block: number of consecutive optimizer steps on a block.
        freeze: glob patterns of names of parameters that are never trained.
        max_block_numel: cut blocks with more elements between modules or tensors, or cut a tensor by rows.
        balance: cut blocks that are much larger than the typical block, and join blocks that are much smaller.
        lr_ticks: what the learning-rate schedule counts: ``cycle``: it advances once per cycle; ``step``: whoever owns
            the schedule advances it every step, and the engine holds one rate through a cycle.
        offload: see :class:`OffloadConfig`.
    """

    enabled: bool = True
    layers_per_block: int = 1
    strategy: str = "bottom2up"
    seed: int = 0
    steps_per_block: int = 1
    freeze: tuple[str, ...] = ()
    max_block_numel: int | None = None
    balance: bool = False
    lr_ticks: str = "cycle"
    offload: OffloadConfig = field(default_factory=OffloadConfig)

    @classmethod
    def from_dict(cls, section: Mapping[str, Any] | None) -> "HiFTConfig":
        """Build from the section's mapping; None: all defaults.

        Raises:
            ConfigError: lists every problem with its key, its value and the remedy.
        """
        problems = section_problems(section)
        if problems:
            raise ConfigError(problems)
        values = dict(section or {})
        values["freeze"] = tuple(values.get("freeze", ()))
        values["offload"] = OffloadConfig(**values.get("offload", {}))
        return cls(**values)


def read(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Return a DeepSpeed config as a new dict.

    Args:
        config: a mapping, or the path of a JSON file.

    Raises:
        ConfigError: the file cannot be read, or does not hold a JSON object.
    """
    if isinstance(config, Mapping):
        return dict(config)
    try:
        loaded = json.loads(Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"config={str(config)!r} cannot be read: {error.strerror}"]) from error
    except json.JSONDecodeError as error:
        raise ConfigError([f"config={str(config)!r} is not valid JSON: {error}"]) from error
    if not isinstance(loaded, dict):
        raise ConfigError([f"config={str(config)!r} holds a {type(loaded).__name__}; expected a JSON object"])
    return loaded


def with_deferred_step(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``hift`` section whose ``offload.defer: auto`` defers, for a loop that never needs ``settle()``."""
    offload = section.get("offload")
    if offload is not None and not isinstance(offload, Mapping):
        return dict(section)  # `section_problems` reports it
    offload = dict(offload or {})
    if offload.get("defer", OffloadConfig.defer) == "auto":
        offload["defer"] = WHERE_POSSIBLE
    return {**section, "offload": offload}


def problems(config: Mapping[str, Any]) -> list[str]:
    """Return the problems of a DeepSpeed config's ``hift`` section and of its combination with other keys."""
    is_enabled = _get(config, f"{SECTION}.enabled") is not False
    return section_problems(config.get(SECTION)) + (conflicts(config) if is_enabled else [])


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# A check of a key's value, and what the error message says is expected.
_Check = tuple[Callable[[Any], bool], str]
_SECTION_CHECKS: dict[str, _Check] = {
    "enabled": (lambda v: isinstance(v, bool), "true or false"),
    "layers_per_block": (
        lambda v: _is_int(v) and v >= 1,
        "an integer from 1 to the model's number of layers",
    ),
    "strategy": (lambda v: v in STRATEGIES, "one of " + ", ".join(STRATEGIES)),
    "seed": (_is_int, "an integer"),
    "steps_per_block": (lambda v: _is_int(v) and v >= 1, "an integer of at least 1"),
    "freeze": (
        lambda v: isinstance(v, (list, tuple)) and all(isinstance(pattern, str) for pattern in v),
        "a list of glob patterns over parameter names",
    ),
    "max_block_numel": (
        lambda v: v is None or _is_int(v) and v >= 1,
        "null, or the largest number of elements in a block",
    ),
    "balance": (lambda v: isinstance(v, bool), "true or false"),
    "lr_ticks": (lambda v: v in LR_TICKS, "one of " + ", ".join(LR_TICKS)),
    "offload": (lambda v: isinstance(v, Mapping), "a mapping"),
}
_OFFLOAD_CHECKS: dict[str, _Check] = {
    "device": (lambda v: v in ("cpu", "nvme", "none"), "cpu, nvme or none"),
    "step": (lambda v: v in ("auto", "block", "streamed"), "auto, block or streamed"),
    "buffer_size": (lambda v: _is_int(v) and v >= MIN_BUFFER, f"bytes, an integer of at least {MIN_BUFFER}"),
    "pin_memory": (lambda v: isinstance(v, bool) or v == "auto" or v is AS_ALLOWED, "true, false or auto"),
    "prefetch": (
        lambda v: isinstance(v, bool) or _is_int(v) and v >= 2 * MIN_BUFFER,
        f"true, false, or the bytes of all slots, an integer of at least {2 * MIN_BUFFER}",
    ),
    "defer": (lambda v: isinstance(v, bool) or v == "auto" or v is WHERE_POSSIBLE, "true, false or auto"),
    "weights": (lambda v: v in ("device", "cpu"), "device or cpu"),
    "master": (lambda v: v in ("auto", "fp32", "split"), "auto, fp32 or split"),
    "moments": (lambda v: v in ("fp32", "8bit"), "fp32 or 8bit"),
    "nvme_path": (lambda v: v is None or isinstance(v, str) and bool(v.strip()), "the path of a folder, or null"),
    "nvme": (lambda v: v in ("all", "moments"), "all or moments"),
}


def _place_problems(offload: Mapping[str, Any]) -> list[str]:
    """Check that what is for files is given only with ``device: nvme``, and that ``nvme_path`` can be written."""
    device, folder = offload.get("device", OffloadConfig.device), offload.get("nvme_path")
    prefix = f"{SECTION}.offload"
    if device != "nvme":
        return [
            f"{prefix}.{key}={offload[key]!r} has no effect with device={device!r}; remove it, or set {prefix}.device "
            "to nvme"
            for key, default in (("nvme_path", None), ("nvme", OffloadConfig.nvme))
            if offload.get(key, default) != default
        ]
    if not folder:
        return [f"{prefix}.device='nvme' needs {prefix}.nvme_path, an existing folder on the drive"]
    if reason := paths.fault(folder):
        return [f"{prefix}.nvme_path: {reason}"]
    if not Path(folder).is_dir():
        return [f"{prefix}.nvme_path={folder!r} is not a folder; create it, or choose one that exists"]
    try:
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        return [f"{prefix}.nvme_path={folder!r} cannot be written ({error.strerror}); choose a writable folder"]


def _weight_problems(offload: Mapping[str, Any]) -> list[str]:
    """Check that weights do not wait in host memory while the state, which is larger, is on the device."""
    if offload.get("weights") != "cpu" or offload.get("device") != "none":
        return []
    return [
        f"{SECTION}.offload.weights='cpu' with {SECTION}.offload.device='none': masters and optimizer state, which are "
        "larger than the weights, would be on the device; set device to cpu or nvme, or weights to device"
    ]


def needs_streamed_step(offload: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that have an effect with the streamed step only, each with its value and the remedy."""
    found = {}
    if not isinstance(prefetch := offload.get("prefetch", True), bool):
        found[f"{SECTION}.offload.prefetch={prefetch}"] = "set prefetch to true, or remove it"
    if offload.get("defer") is True:
        found[f"{SECTION}.offload.defer=true"] = "set defer to auto, or remove it"
    if (size := offload.get("buffer_size", OffloadConfig.buffer_size)) != OffloadConfig.buffer_size:
        found[f"{SECTION}.offload.buffer_size={size}"] = "remove it"
    return found


def _slot_problems(offload: Mapping[str, Any]) -> list[str]:
    """Check that what needs the streamed step, or state in host memory, is given only where it has an effect."""
    found = [
        f"{setting} has no effect with {key}={value!r}: only the streamed step has slots and is deferred; {remedy}"
        for key, value in (("device", "none"), ("step", "block"))
        if offload.get(key) == value
        for setting, remedy in needs_streamed_step(offload).items()
    ]
    if offload.get("device") == "none":
        found += [
            f"{SECTION}.offload.{key}={value!r} has no effect with device='none': state that stays on the device is "
            "never copied for a step; remove it, or set device to cpu"
            for key, value in (("step", "streamed"), ("prefetch", False))
            if offload.get(key) == value
        ]
    if offload.get("device") == "nvme" and offload.get("defer") is True:
        found.append(
            f"{SECTION}.offload.defer=true has no effect with device='nvme': only a step from host memory is deferred; "
            "set defer to auto, or remove it"
        )
    return found


_FORMATS = (("master", "split"), ("moments", "8bit"))  # of state off the device, if a step decodes them there


def _format_problems(offload: Mapping[str, Any]) -> list[str]:
    """Check that formats of state off the device are given only if state leaves the device."""
    if offload.get("device") != "none":
        return []
    return [
        f"{SECTION}.offload.{key}={value!r} has no effect with device='none', which keeps state on the device; set "
        "device to cpu or nvme, or remove it"
        for key, value in offload.items()
        if (key, value) in _FORMATS
    ]


def _key_problems(values: Mapping[str, Any], checks: dict[str, _Check], prefix: str) -> list[str]:
    found = []
    for key, value in values.items():
        if key not in checks:
            nearest = difflib.get_close_matches(str(key), checks, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            found.append(f"{prefix}.{key}={value!r} is an unknown key; {hint}known keys: {', '.join(checks)}")
            continue
        is_right, expected = checks[key]
        if not is_right(value):
            nearest = (
                difflib.get_close_matches(value, STRATEGIES, n=1)
                if key == "strategy" and isinstance(value, str)
                else []
            )
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            found.append(f"{prefix}.{key}={value!r}: expected {expected}{hint}")
    return found


def section_problems(section: Any) -> list[str]:
    """Return the problems inside the ``hift`` section itself."""
    if section is None:
        return []
    if not isinstance(section, Mapping):
        return [f"{SECTION}={section!r}: expected a mapping with keys {', '.join(_SECTION_CHECKS)}"]
    found = _key_problems(section, _SECTION_CHECKS, SECTION)
    if isinstance(section.get("offload"), Mapping):
        inside = _key_problems(section["offload"], _OFFLOAD_CHECKS, f"{SECTION}.offload")
        found += inside or [
            problem
            for check in (_place_problems, _slot_problems, _weight_problems, _format_problems)
            for problem in check(section["offload"])
        ]
    assert set(_SECTION_CHECKS) == {f.name for f in fields(HiFTConfig)}
    return found


def _get(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _on(value: Any) -> bool:
    return bool(value) and value != "none"


def _above(limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and value > limit


# Keys of DeepSpeed that change which parameters train, where their state is, or how gradients are computed. No test
# shows that HiFT equals Algorithm 1 with them, so HiFT refuses them.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    # Checks of other settings read the places that DeepSpeed moves these two deprecated keys to.
    "zero_optimization.cpu_offload": (_on, "write offload_optimizer: {device: cpu} in its place, at stage 1, 2 or 3"),
    "zero_optimization.cpu_offload_param": (_on, "write offload_param: {device: cpu} in its place, at stage 3"),
    "zero_optimization.zenflow": (_on, "remove it"),
    "zero_optimization.super_offload": (_on, "remove it"),
    "zero_optimization.elastic_checkpoint": (_on, "remove it"),
    "zero_optimization.zero_hpz_partition_size": (lambda v: v is not None and v != 1, "remove it"),
    "zero_optimization.mics_shard_size": (_above(0), "remove it"),
    "zero_optimization.zero_quantized_weights": (_on, "remove it"),
    "zero_optimization.zero_quantized_nontrainable_weights": (_on, "remove it"),
    "zero_optimization.zero_quantized_gradients": (_on, "remove it"),
    "zero_optimization.offload_optimizer.ratio": (lambda v: v is not None and v != 1.0, "set it to 1.0"),
    "hybrid_engine.enabled": (_on, "remove it"),
    "aio.use_gds": (_on, "remove it"),
    "expert_parallel.enabled": (_on, "remove it"),
    "tensor_parallel.autotp_size": (_above(1), "remove it"),
    "torch_autocast.enabled": (_on, "use bf16 or fp16"),
    "amp.enabled": (_on, "use bf16 or fp16"),
    "compile.deepcompile": (_on, "remove it"),
    "sparse_gradients": (_on, "remove it"),
    "checkpoint.load_universal": (_on, "remove it"),
    "checkpoint.writer": (_on, "remove it"),
    "datastates_ckpt.enabled": (_on, "remove it"),
    "managed_gradient_accumulation": (lambda v: v is False, "remove it"),
    "fp16.fp16_master_weights_and_grads": (_on, "remove it"),
    "bf16.bf16_master_weights_and_grads": (_on, "remove it"),
    "progressive_layer_drop.enabled": (_on, "remove it"),
    "compression_training": (_on, "remove it"),
    "data_efficiency.data_routing.random_ltd.enabled": (_on, "remove it"),
}


def _host_weight_conflicts(config: Mapping[str, Any], stage: int, offload: Any) -> list[str]:
    """Return what weights that wait in host memory cannot be combined with."""
    found, key = [], f"{SECTION}.offload.weights='cpu'"
    if stage == 3:
        found.append(
            f"{key} with zero_optimization.stage=3: there, DeepSpeed brings the weights to the device; set "
            "zero_optimization.offload_param.device='cpu' in its place"
        )
    elif _on(offload):
        found.append(
            f"{key} with zero_optimization.offload_optimizer.device={offload!r}: the step on the host needs the "
            "weights on the device; remove offload_optimizer, or set weights to device"
        )
    return found


def conflicts(config: Mapping[str, Any]) -> list[str]:
    """Return the settings in the rest of a DeepSpeed config with which HiFT would not be exact."""
    stage = _get(config, "zero_optimization.stage") or 0
    offload = _get(config, "zero_optimization.offload_optimizer.device")
    found = []
    if stage == 0 and _on(_get(config, "fp16.enabled")):
        found.append(
            "fp16.enabled=true with zero_optimization.stage=0: there, DeepSpeed divides gradients by a loss scale that "
            "it did not apply; use bf16, or stage 1, 2 or 3"
        )
    if stage == 0 and _on(offload):
        found.append(
            f"zero_optimization.offload_optimizer.device={offload!r} with zero_optimization.stage=0: DeepSpeed cannot "
            "step on the host there; use stage 1, 2 or 3, or remove offload_optimizer"
        )
    if _get(config, "optimizer.params.lr") == "auto":
        found.append(
            "optimizer.params.lr='auto': expected a number; only launch/train.py replaces it (training.learning_rate)"
        )
    place = _get(config, f"{SECTION}.offload.device")
    if stage != 0 and _on(offload) and place not in (None, "cpu"):
        found.append(
            f"{SECTION}.offload.device={place!r} with zero_optimization.offload_optimizer.device={offload!r}: the step "
            "on the host needs the state in host memory; remove one of them"
        )
    own = _get(config, f"{SECTION}.offload")
    if stage != 0 and _on(offload) and isinstance(own, Mapping):
        found += [
            f"{setting} has no effect with zero_optimization.offload_optimizer.device={offload!r}: the step on the "
            f"host has no slots and is not deferred; {remedy}"
            for setting, remedy in needs_streamed_step(own).items()
        ]
        found += [
            f"{SECTION}.offload.{key}={value!r} has no effect with zero_optimization.offload_optimizer.device="
            f"{offload!r}: the step on the host keeps fp32 numbers; remove one of them"
            for key, value in own.items()
            if (key, value) in _FORMATS
        ]
    if stage == 3 and _get(config, f"{SECTION}.offload.defer") is True:
        found.append(
            f"{SECTION}.offload.defer=true has no effect with zero_optimization.stage=3, which gathers weights ahead "
            "of the layers; set defer to auto, or remove it"
        )
    if _get(config, f"{SECTION}.offload.weights") == "cpu":
        found += _host_weight_conflicts(config, stage, offload)
    if stage != 0 and offload == "nvme":
        found.append("zero_optimization.offload_optimizer.device='nvme' is not available with HiFT; use cpu")
    weights = _get(config, "zero_optimization.offload_param.device")
    if weights == "nvme":
        found.append(
            "zero_optimization.offload_param.device='nvme': HiFT does not read weights from files in each step; use "
            "cpu, and hift.offload.device='nvme' for masters and optimizer state"
        )
    elif _on(weights) and stage != 3:
        found.append(
            f"zero_optimization.offload_param.device={weights!r} needs zero_optimization.stage=3, found {stage}; set "
            "the stage to 3, or remove offload_param"
        )
    for path, (is_refused, remedy) in _REFUSED.items():
        value = _get(config, path)
        if is_refused(value):
            found.append(
                f"{path}={value!r} cannot be combined with HiFT; {remedy}, or set "
                "hift.enabled=false (with launch/train.py: method.name=full)"
            )
    return found
