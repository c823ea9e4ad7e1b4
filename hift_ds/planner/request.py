"""What can be asked of the planner, which requests it refuses, and the DeepSpeed config of a request."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hift_ds.config import MIN_BUFFER, ConfigError, OffloadConfig
from hift_ds.config import problems as config_problems

TASKS = ("causal-lm", "sequence-classification")
METHODS = ("hift", "full", "lora", "mezo")
PRECISIONS = ("fp32", "mixed", "mixed-hi")
LAYOUTS = ("engine", "paper")

# name -> type and parameters of the optimizer section of a DeepSpeed config
_DEEPSPEED_OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "sgd": ("SGD", {}),
    "sgdm": ("SGD", {"momentum": 0.9}),
    "adafactor": ("Adafactor", {}),
    "adagrad": ("Adagrad", {}),
    "lion": ("Lion", {}),
}
ENCODED = ("adamw", "lion", "sgdm")  # whose state may be kept in 8 bits
_MOST = 2**31 - 1  # tokens, sequences, ...
_MOST_RANKS = 2**16
_MOST_BYTES = 2**60
OPTIMIZERS = tuple(_DEEPSPEED_OPTIMIZERS)


@dataclass(frozen=True)
class Request:
    """What to plan. The fields are the arguments of :func:`hift_ds.plan_memory`, which documents them."""

    model: Any
    method: str = "hift"
    precision: str = "mixed-hi"
    optimizer: str = "adamw"
    batch_size: int = 1
    seq_len: int = 512
    layers_per_block: int = 1
    max_block_numel: int | None = None
    balance: bool = False
    zero_stage: int | None = None
    ranks: int = 1
    offload_device: str = OffloadConfig.device
    offload_step: str = OffloadConfig.step
    buffer_size: int = OffloadConfig.buffer_size
    prefetch: int | None = None
    nvme_path: str | None = None
    nvme: str = OffloadConfig.nvme
    drive_read: int = 3_000_000_000
    drive_write: int = 2_000_000_000
    weights: str = OffloadConfig.weights
    master: str = OffloadConfig.master
    moments: str = OffloadConfig.moments
    offload_param: str = "none"
    offload_optimizer: str = "none"
    pin_memory: bool = True
    activation_checkpointing: bool = False
    checkpoint_offload: bool = False
    loss_chunk: int | None = None
    gradient_accumulation_steps: int = 1
    layout: str = "engine"
    accelerator: str = "gpu"
    attention: str | None = None
    task: str | None = None
    lora_rank: int = 8

    @property
    def name(self) -> str:
        """Readable name of the model."""
        return str(self.model if isinstance(self.model, (str, Path)) else getattr(self.model, "model_type", "model"))

    @property
    def stage(self) -> int:
        """ZeRO stage: ``zero_stage``, by default 2, or 0 for Adafactor."""
        if self.zero_stage is not None:
            return self.zero_stage
        return 0 if self.optimizer == "adafactor" else 2

    @property
    def weight(self) -> int:
        """Bytes of one element of the model's weights."""
        return 4 if self.precision == "fp32" else 2

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes layers."""
        return self.activation_checkpointing or self.checkpoint_offload

    @property
    def placement(self) -> str:
        """Where master weights and optimizer state are: see :class:`hift_ds.planner.accounting.Setup`."""
        if self.offload_optimizer == "cpu":
            return "host"
        if self.method != "hift" or self.precision == "mixed" or self.offload_device == "none":
            return "resident"
        if self.offload_step != "auto":
            return self.offload_step
        return "block" if self.optimizer == "adafactor" else "streamed"

    @property
    def splits(self) -> bool:
        """Whether the store keeps the remainder of a master weight beside the 16-bit weight, and no fp32 master."""
        return self.master == "split" or self.master == "auto" and self._may_split

    @property
    def _may_split(self) -> bool:
        is_stepped_from_store = self.placement in ("streamed", "block") and self.optimizer != "adafactor"
        return self.layout == "engine" and self.precision == "mixed-hi" and is_stepped_from_store

    @property
    def streams_weights(self) -> bool:
        """Whether the weights of layers wait in host memory: by ``offload.weights``, or at ZeRO-3 by DeepSpeed."""
        return self.weights == "cpu" or self.offload_param == "cpu"

    @property
    def in_files(self) -> tuple[bool, bool]:
        """Whether master weights are in files, and whether the optimizer's state is."""
        uses_files = self.offload_device == "nvme"
        return uses_files and self.nvme == "all", uses_files

    @property
    def offload(self) -> OffloadConfig:
        """What determines the slots of the streamed step."""
        return OffloadConfig(prefetch=self.prefetch or True, buffer_size=self.buffer_size)

    def problems(self) -> list[str]:
        """Return every problem of the request, each with the value and a remedy."""
        found = []
        choices: dict[str, Sequence[Any]] = {
            "method": METHODS,
            "precision": PRECISIONS,
            "optimizer": OPTIMIZERS,
            "offload_device": ("cpu", "nvme", "none"),
            "offload_step": ("auto", "block", "streamed"),
            "offload_optimizer": ("none", "cpu"),
            "nvme": ("all", "moments"),
            "weights": ("device", "cpu"),
            "master": ("auto", "fp32", "split"),
            "moments": ("fp32", "8bit"),
            "offload_param": ("none", "cpu"),
            "layout": LAYOUTS,
            "accelerator": ("gpu", "cpu"),
            "attention": (None, "sdpa", "eager"),
            "task": (None, *TASKS),
            "zero_stage": (None, 0, 1, 2, 3),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool):
                shown = [str(choice) for choice in allowed if choice is not None]
                near = difflib.get_close_matches(str(value), shown, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                found.append(f"{_option(name)}={value!r}: expected one of {', '.join(shown)}{hint}")
        for name in ("batch_size", "seq_len", "layers_per_block", "ranks", "gradient_accumulation_steps", "lora_rank"):
            value = getattr(self, name)
            most = _MOST_RANKS if name == "ranks" else _MOST
            if not is_count(value):
                found.append(f"{_option(name)}={value!r}: expected an integer of at least 1")
            elif value > most:
                found.append(f"{_option(name)}={value}: expected at most {most:,}")
        if self.max_block_numel is not None and (not is_count(self.max_block_numel)):
            found.append(f"--max-block-numel={self.max_block_numel!r}: expected an integer of at least 1")
        if not isinstance(self.buffer_size, int) or self.buffer_size < MIN_BUFFER:
            found.append(f"--buffer-size={self.buffer_size!r}: expected bytes, an integer of at least {MIN_BUFFER}")
        for name in ("drive_read", "drive_write"):
            if not is_count(rate := getattr(self, name)):
                found.append(f"{_option(name)}={rate!r}: expected bytes a second, an integer of at least 1")
        if self.prefetch is not None and (not is_count(self.prefetch) or self.prefetch < 2 * MIN_BUFFER):
            found.append(f"--prefetch={self.prefetch!r}: expected bytes, an integer of at least {2 * MIN_BUFFER}")
        chunk = self.loss_chunk
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 0):
            found.append(f"--loss-chunk={chunk!r}: expected tokens, an integer of at least 0 (0: all tokens at once)")
        return found or self._conflicts()

    def full_fine_tuning(self) -> Request:
        """Return the request for full fine-tuning of the same model on the same batch by DeepSpeed without HiFT."""
        only_hift = (
            *("offload_device", "offload_step", "nvme_path", "nvme", "weights", "master", "moments", "offload_param"),
            *("offload_optimizer", "pin_memory", "max_block_numel", "balance", "prefetch", "buffer_size"),
        )
        defaults: dict[str, Any] = {name: getattr(Request, name) for name in only_hift}
        return replace(self, method="full", **defaults)

    def _given(self, *names: str) -> str:
        """Return those of these options that do not have their default, each with its value."""
        return ", ".join(
            f"{_option(name)}={getattr(self, name)}" for name in names if getattr(self, name) != getattr(Request, name)
        )

    def _conflicts(self) -> list[str]:
        found = []
        moved = self._given("offload_device", "offload_step", "offload_optimizer")
        found += self._format_conflicts() + self._weight_conflicts()
        if self.layout == "paper":
            if self.ranks > 1:
                found.append(
                    f"--ranks={self.ranks} with --layout=paper: the paper counts one device; use --layout engine, or "
                    "--ranks 1"
                )
            if moved and self.offload_step != "block":
                found.append(
                    f"{moved} with --layout=paper: the paper keeps the whole state of the active block on "
                    "the device and all other state in host memory; leave it out, or use --layout engine"
                )
            return found
        if self.optimizer == "adafactor" and self.stage > 0:
            found.append(
                f"--optimizer=adafactor with --zero-stage={self.stage}: Adafactor needs the shape of a weight, and "
                "ZeRO flattens weights; use --zero-stage 0 or another optimizer"
            )
        if self.offload_optimizer == "cpu" and self.stage == 0 and self.method != "mezo":
            found.append(
                "--offload-optimizer=cpu with --zero-stage=0: DeepSpeed steps on the host only from ZeRO-1 on; use "
                "--zero-stage 1, 2 or 3"
            )
        if self.offload_optimizer == "cpu" and self._given("offload_device", "offload_step"):
            found.append(f"{moved}: a step on the host keeps all state there; leave the other options out")
        elif self.method != "hift" and moved and self.offload_optimizer == "none":
            found.append(f"{moved} with --method={self.method}: only hift moves the state of blocks; leave it out")
        elif self.offload_device == "none" and self.offload_step != "auto":
            found.append(
                f"--offload-step={self.offload_step} with --offload-device=none: state that stays on the device is "
                "never moved for a step; leave one of them out"
            )
        elif self.offload_step == "streamed" and self.optimizer == "adafactor":
            found.append(
                "--offload-step=streamed with --optimizer=adafactor: Adafactor is not element-wise; use "
                "--offload-step block"
            )
        if self.placement != "streamed" and (slots := self._given("prefetch", "buffer_size")):
            found.append(
                f"{slots}: only the streamed step has slots, and this step is {self.placement!r}; leave it out"
            )
        if self.method != "hift" and (finer := self._given("max_block_numel", "balance")):
            found.append(f"{finer} with --method={self.method}: only hift has blocks; leave it out")
        if not self.pin_memory and self.placement == "resident" and not self.streams_weights:
            found.append("--no-pin-memory: state and weights stay on the device; leave it out")
        if self.nvme_path is not None and self.offload_device != "nvme":
            found.append(
                f"--nvme-path={self.nvme_path}: only --offload-device nvme uses files, or a search with --host-memory; "
                "add one of them, or leave it out"
            )
        return found

    def _format_conflicts(self) -> list[str]:
        """Return the problems of ``master``, ``moments`` and ``nvme`` with the rest."""
        found = []
        if self.master == "split" and not self._may_split:
            found.append(
                "--master=split: it is the remainder of a bf16 weight, for a step on the device with state that waits "
                "off it; use --method hift, --precision mixed-hi, an element-wise optimizer, and no --offload-device "
                "none or --offload-optimizer cpu; or leave --master out"
            )
        if self.moments == "8bit" and (
            self.optimizer not in ENCODED or self.placement not in ("streamed", "block") or self.layout == "paper"
        ):
            found.append(
                f"--moments=8bit: expected --method hift with --optimizer {', '.join(ENCODED)}, whose state waits off "
                "the device and is stepped on it; leave it out, or leave out --offload-device none, "
                "--offload-optimizer cpu and --layout paper"
            )
        if self.nvme != "all" and self.offload_device != "nvme":
            found.append(f"--nvme={self.nvme}: only --offload-device nvme uses files; leave it out")
        if self.nvme == "moments" and self.optimizer == "sgd":
            found.append(
                "--nvme=moments with --optimizer=sgd, which has no state: nothing would be in files; leave it out, or "
                "use --nvme all"
            )
        return found

    def _weight_conflicts(self) -> list[str]:
        """Return the problems of ``weights`` and ``offload_param`` with the rest."""
        found = []
        if self.weights == "cpu" and (self.method != "hift" or self.layout == "paper" or self.precision == "mixed"):
            found.append(
                f"--weights=cpu with {self._given('method', 'precision', 'layout')}: weights wait in host memory with "
                "hift, mixed-hi or fp32, and the engine's layout; leave it out"
            )
        elif self.weights == "cpu" and self.stage == 3:
            found.append(
                "--weights=cpu with --zero-stage=3: it is for ZeRO-0 to ZeRO-2; use --offload-param cpu instead"
            )
        if self.weights == "cpu" and (self.offload_device == "none" or self.offload_optimizer == "cpu"):
            found.append(
                f"--weights=cpu with {self._given('offload_device', 'offload_optimizer')}: the state must wait off the "
                "device, and the step be computed there; leave the other option out"
            )
        if self.offload_param == "cpu" and (self.method != "hift" or self.stage != 3 or self.layout == "paper"):
            found.append(
                f"--offload-param=cpu with {self._given('method', 'zero_stage', 'layout') or f'ZeRO-{self.stage}'}: "
                "expected --method hift and --zero-stage 3; on one GPU use --weights cpu, otherwise add --zero-stage 3"
            )
        return found

    def deepspeed_config(self, freeze: Sequence[str] = ()) -> dict[str, Any]:
        """Return the DeepSpeed config of the planned run, with its ``hift`` section.

        Args:
            freeze: ``hift.freeze``.

        The learning rate is ``auto``. ``launch/train.py`` replaces it by ``training.learning_rate``; a program that
        calls ``hift_ds.initialize`` must replace it by a number.

        Raises:
            ConfigError: the engine cannot run this request.
        """
        found = []
        if self.layout == "paper":
            found.append(
                "--write-config with --layout=paper: the engine does not run the paper's layout; use --layout engine"
            )
        if self.method == "mezo":
            found.append("--write-config with --method=mezo: MeZO has no DeepSpeed optimizer; use another method")
        if self.method == "hift" and self.precision == "mixed":
            found.append(
                "--write-config with --precision=mixed: the engine trains with mixed-hi; use --precision mixed-hi, or "
                "--method full"
            )
        if found:
            raise ConfigError(found)
        kind, params = _DEEPSPEED_OPTIMIZERS[self.optimizer]
        zero: dict[str, Any] = {"stage": self.stage}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.batch_size,
            "optimizer": {"type": kind, "params": {"lr": "auto", **params}},
            "zero_optimization": zero,
            "hift": {"enabled": False},
        }
        if self.gradient_accumulation_steps > 1:
            config["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        if self.precision != "fp32":
            config["bf16"] = {"enabled": True}
        if self.offload_optimizer == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.pin_memory}
            if self.optimizer in (
                "sgd",
                "sgdm",
            ):  # DeepSpeed has no host kernel for SGD and refuses it without this key
                config["zero_force_ds_cpu_optimizer"] = False
        if self.method == "hift":
            config["hift"] = {"enabled": True, "layers_per_block": self.layers_per_block}
            offload = {
                "device": self.offload_device, "step": self.offload_step, "buffer_size": self.buffer_size,
                "nvme_path": self.nvme_path, "prefetch": self.prefetch or OffloadConfig.prefetch,
                "nvme": self.nvme, "weights": self.weights, "master": self.master, "moments": self.moments,
            }  # fmt: skip
            changed = {key: value for key, value in offload.items() if value != getattr(OffloadConfig, key)}
            if not self.pin_memory and self.placement != "host":
                changed["pin_memory"] = False
            if self.offload_param == "cpu":
                zero["offload_param"] = {"device": "cpu", "pin_memory": self.pin_memory}
            config["hift"] |= {"offload": changed} if changed else {}
            finer = {"max_block_numel": self.max_block_numel, "balance": self.balance, "freeze": list(freeze)}
            config["hift"] |= {key: value for key, value in finer.items() if value}
        elif self.stage > 0:
            config["zero_allow_untested_optimizer"] = True
        with_rate = config | {"optimizer": {"type": kind, "params": params}}
        problems = config_problems(with_rate)
        if problems:
            raise ConfigError([f"--write-config: {problem}" for problem in problems])
        return config


def is_count(value: Any) -> bool:
    """Return whether a value is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_size(option: str, value: int | str) -> int:
    """Return the bytes of a size such as ``24GiB``; a number is in bytes.

    Args:
        option: name of the option, for the error message.
        value: the size.

    Raises:
        ConfigError: ``value`` is not a size.
    """
    units = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    nbytes = float(match[1]) * units.get(match[2], math.inf) if match and not isinstance(value, bool) else math.inf
    if nbytes > _MOST_BYTES or nbytes <= 0 and "mem" in option:
        raise ConfigError(
            [f"{option}={value!r}: expected a size like 24GiB, above 0 (a card sold as 24 GB has 24 GiB)"]
        )
    return int(nbytes)
