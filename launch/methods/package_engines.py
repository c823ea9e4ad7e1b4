"""Engines without DeepSpeed for MeZO, LOMO, BAdam and GaLore, with the part of DeepSpeed's interface that we use.

ZeRO cannot run these optimizers: MeZO has no gradients, LOMO updates each weight inside the backward pass, and BAdam
and GaLore keep their own masters and state. Every rank holds all weights; gradients are averaged over the ranks.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_model, save_model

import hift_ds
from hift_ds.checkpoint import store
from hift_ds.checkpoint.files import FileEngine, Files
from hift_ds.checkpoint.manifest import Checkpoint
from hift_ds.launch.errors import NotApplicable, UserError
from hift_ds.launch.methods.adapter_modules import MATRICES
from hift_ds.launch.methods.settings import MethodSettings

PACKAGES = {"lomo": "lomo-optim", "badam": "badam", "galore": "galore-torch"}


class PlainEngine:
    """Train whole weights with a PyTorch optimizer: sum gradients over a window, average over ranks, clip, step.

    A non-finite loss or gradient on one rank prevents the update on all ranks, and the schedule does not advance.

    Args:
        model: on the device.
        optimizer: of the model's parameters.
        factor: the learning rate at a tick of the schedule (0-based), as a fraction of the optimizer's own rate.
        settings: the run's `hift_ds.launch.config.settings.Settings`.
    """

    skips_by_itself = True

    def __init__(self, model: torch.nn.Module, optimizer: Any, factor: Callable[[int], float], settings: Any):
        self.module = model
        self.optimizer = self.basic_optimizer = optimizer
        self.device = torch.device(get_accelerator().current_device_name())
        self._factor, self._tick = factor, 0
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._set_rates()
        self.clip = settings.deepspeed["gradient_clipping"]
        self.accumulation = settings.accumulation
        self._norm: float | None = None
        self._backwards = 0
        self._is_finite: torch.Tensor | None = None  # whether each loss of the window is finite
        self._applied = True

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def train(self) -> None:
        """Switch to training mode."""
        self.module.train()

    def eval(self) -> None:
        """Switch to evaluation mode."""
        self.module.eval()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a micro-batch's loss, divided by the number of micro-batches."""
        (loss / self.accumulation).backward()
        self._backwards += 1
        is_finite = loss.detach().isfinite()
        self._is_finite = is_finite if self._is_finite is None else self._is_finite & is_finite

    def step(self) -> None:
        """At the end of an accumulation window: average gradients over ranks, clip, update the weights."""
        if self._backwards % self.accumulation:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if dist.get_world_size() > 1:
            for gradient in gradients:
                dist.all_reduce(gradient.div_(dist.get_world_size()))
        norm = torch.nn.utils.get_total_norm(gradients)
        assert self._is_finite is not None
        is_finite = (self._is_finite & norm.isfinite()).to(norm.dtype)
        dist.all_reduce(is_finite, op=dist.ReduceOp.MIN)
        self._norm, applied = torch.stack([norm, is_finite]).tolist()  # the host waits for the device here only
        self._applied, self._is_finite = bool(applied), None
        if self._applied:
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(
                    [p for p in self.module.parameters() if p.grad is not None], self.clip, norm
                )
            self.optimizer.step()
            self._advance()
        self.module.zero_grad(set_to_none=True)

    def _advance(self) -> None:
        self._tick += 1
        self._set_rates()

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor(self._tick)

    def get_global_grad_norm(self) -> float | None:
        """Return the norm of the last step's gradients before clipping, if it is known."""
        return self._norm

    def was_step_applied(self) -> bool:
        """Return whether the last step updated the weights."""
        return self._applied

    def fp16_enabled(self) -> bool:
        """Return False: there is no loss scale."""
        return False

    def zero_optimization_stage(self) -> int:
        """Return 0: every rank holds everything."""
        return 0

    def destroy(self) -> None:
        """Do nothing; DeepSpeed's engine removes its hooks here."""

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any]) -> None:
        """Save weights, schedule and optimizer state. Rank 0 writes, since all ranks hold the same."""

        def write(folder: str, name: str) -> Files:
            files = FileEngine()
            if dist.get_rank() == 0:
                place = Path(folder) / name
                save_model(self.module, str(place / "weights.safetensors"))
                files.save({"client": client_state, **self._state()}, str(place / "state.pt"))
            return files.finish()

        about = {"step": client_state["step"], "world_size": dist.get_world_size()}
        store.save(folder, tag, write, about)

    def load_checkpoint(self, folder: str, tag: Checkpoint) -> tuple[str, dict[str, Any]]:
        """Load a checkpoint; return its path and the client state.

        Raises:
            ValueError: the weights cannot be read, or belong to another model.
        """
        try:
            load_model(self.module, str(tag.path / "weights.safetensors"))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{str(tag.path)!r} cannot be read: {error}") from error
        state = FileEngine().load(str(tag.path / "state.pt"), map_location="cpu")
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self._tick = state["tick"]
        self._set_rates()
        return str(tag.path), state["client"]

    def _state(self) -> dict[str, Any]:
        return {"tick": self._tick, "optimizer": None}


class MeZOEngine(PlainEngine):
    """Take two forward passes a step (`hift_ds.MeZO`), without dropout, as its authors do."""

    def train(self) -> None:
        """Keep evaluation mode: both forward passes must compute the same."""
        self.module.eval()

    def step(self) -> None:
        """Advance the schedule after an update; MeZO's optimizer has moved the weights already."""
        self._applied = math.isfinite(self.optimizer.projected_gradient)
        if self._applied:
            self._advance()

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"optimizer": self.optimizer.state_dict()}


class LomoEngine(PlainEngine):
    """Update each weight as soon as its gradient exists. Clipping by norm takes an additional backward pass.

    Without clipping, a non-finite gradient of a finite loss is only noticed after the weights are updated.
    """

    def backward(self, loss: torch.Tensor) -> None:
        """Update the weights during the backward pass, unless the loss or the gradient norm is non-finite."""
        self._applied = math.isfinite(loss.item())
        if self._applied and self.clip:
            self.optimizer.grad_norm(loss)
            self._norm = float(torch.norm(self.optimizer.grad_norms, 2.0))
            self._applied = math.isfinite(self._norm)
        if self._applied:
            self.optimizer.fused_backward(loss, self.basic_optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Advance the schedule after an update."""
        if self._applied:
            self._advance()


def make_plain_engine(model: torch.nn.Module, settings: Any, factor: Callable[[int], float]) -> PlainEngine:
    """Make the engine of a method that does not use DeepSpeed (see `hift_ds.launch.methods.table.Method.engine`).

    Args:
        factor: the learning rate at a tick of the schedule (0-based), as a fraction of the highest one.

    Raises:
        UserError: the method's package is not installed.
        NotApplicable: the method does not fit the model or the number of ranks.
    """
    method: MethodSettings = settings.method
    kind = method.name.partition("-")[0]
    model = model.to(get_accelerator().current_device_name(), getattr(torch, settings.dtype))
    params = settings.deepspeed["optimizer"]["params"]
    rate, decay = params["lr"], params["weight_decay"]
    if kind == "mezo":
        adam, seed = method.name == "mezo-adam", settings.training.seed
        optimizer = hift_ds.MeZO(model, rate, method.mezo_eps, decay, adam, seed=seed)
        return MeZOEngine(model, optimizer, factor, settings)
    return {"lomo": _lomo, "badam": _badam, "galore": _galore}[kind](model, rate, decay, settings, factor)


def _lomo(model: Any, rate: float, decay: float, settings: Any, factor: Any) -> PlainEngine:
    if dist.get_world_size() > 1:
        why = "lomo-optim 0.1 averages gradients over ranks only in Hugging Face's Trainer under ZeRO 3; use one rank"
        raise NotApplicable("lomo", model, why)
    if settings.accumulation > 1:
        why = (
            f"it updates inside the backward pass, so it cannot accumulate {settings.accumulation} micro-batches; set "
            f"training.micro_batch_size={settings.training.batch_size}"
        )
        raise NotApplicable("lomo", model, why)
    clip = settings.deepspeed["gradient_clipping"] or None
    optimizer = _package("lomo", "lomo_optim").Lomo(model, lr=rate, clip_grad_norm=clip, weight_decay=decay)
    return LomoEngine(model, optimizer, factor, settings)


def _badam(model: Any, rate: float, decay: float, settings: Any, factor: Any) -> PlainEngine:
    badam = _package("badam", "badam")
    blocks = [list(block.parameter_names) for block in hift_ds.partition_model(model)]
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):  # it prints the names of blocks, and warns about fp32 weights
        warnings.simplefilter("ignore")
        optimizer = badam.BlockOptimizer(
            torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay),
            list(model.named_parameters()),
            blocks,
            switch_block_every=settings.method.badam_switch_every,
            switch_mode=settings.method.badam_order,
            verbose=0,
        )
    switch, generator = optimizer.switch_trainable_params, torch.Generator().manual_seed(settings.training.seed)

    def switch_on_all_ranks() -> None:
        # The package draws the order from PyTorch's generator, whose state differs between ranks because of dropout.
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            torch.set_rng_state(generator.get_state())
            switch(verbose=0)
            generator.set_state(torch.get_rng_state())

    optimizer.switch_trainable_params = switch_on_all_ranks
    return PlainEngine(model, optimizer, factor, settings)


def _galore(model: Any, rate: float, decay: float, settings: Any, factor: Any) -> PlainEngine:
    galore = _package("galore", "galore_torch")
    method = settings.method
    inner = {id(m.weight) for m in model.modules() if isinstance(m, MATRICES)}
    outer = getattr(model, "get_output_embeddings", lambda: None)()
    inner -= {id(outer.weight)} if outer is not None else set()
    projected = [p for p in model.parameters() if id(p) in inner and min(p.shape) > method.galore_rank]
    if not projected:
        why = f"no weight of its layers is larger than method.galore_rank {method.galore_rank} on both sides; lower it"
        raise NotApplicable("galore", model, why)
    chosen = {id(p) for p in projected}
    options = {"rank": method.galore_rank, "update_proj_gap": method.galore_update_every, "scale": method.galore_scale}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": others}, {"params": projected, **options, "proj_type": "std"}]
    optimizer = galore.GaLoreAdamW(groups, lr=rate, weight_decay=decay, no_deprecation_warning=True)
    return PlainEngine(model, optimizer, factor, settings)


def _package(method: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"method.name: {method!r} needs the package {PACKAGES[method]}: pip install {PACKAGES[method]} ({error})"
        ) from error
