"""``hift_ds.enabled``: HiFT inside code that calls ``deepspeed.initialize`` itself.

The Trainer of transformers, TRL, accelerate and Lightning look ``deepspeed.initialize`` up each time they call it, and
have no setting for another function. So for the time of an :class:`Interception`, another function stands in its
place. Importing this module changes nothing.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hift_ds import config as hift_config
from hift_ds.engine import HiFTEngine
from hift_ds.initialization import initialize
from hift_ds.integrations.messages import MODEL_INIT, NO_ENGINE, too_short
from hift_ds.model.activations import limit_recomputation


@contextmanager
def enabled(**section: Any) -> Iterator[None]:
    """Make HiFT engines in existing code: inside the ``with`` block, ``deepspeed.initialize`` makes them.

    Calls without an optimizer, or with a model of which no parameter requires gradients (reference and reward models,
    evaluation) make DeepSpeed's own engines. The block can be nested; the innermost one counts. After the block,
    ``deepspeed.initialize`` is as before, and the parameters of the engines made inside require gradients as before.

    Where the model's activation checkpointing is on, backward recomputes layers from the active block up only.

    Args:
        section: keys of the config section ``hift`` (:class:`hift_ds.config.HiFTConfig`). Here, ``lr_ticks`` is
            ``"step"`` by default. Keys of a ``hift`` section in the DeepSpeed config replace these.

    Raises:
        hift_ds.config.ConfigError: (a ValueError) lists every problem of ``section``.
        RuntimeError: a torch optimizer stepped before an engine was made, as it does without DeepSpeed, or no engine
            was made.

    Example::

        with hift_ds.enabled(layers_per_block=1):
            trainer.train()
    """
    interception = Interception(section, refuses_other_steps=True)
    try:
        yield
        if not interception.made:
            raise RuntimeError(f"hift_ds.enabled: {NO_ENGINE}")
        interception.warn_of_untrained_blocks()
    finally:
        interception.close()


class Interception:
    """Makes HiFT engines of the calls of ``deepspeed.initialize`` with something to train, from now until ``close``.

    Args:
        section: keys of the config section ``hift``.
        model: only engines of this model; None: of every model. It is not kept alive.
        refuses_other_steps: raise an error if a torch optimizer steps before an engine was made.

    Attributes:
        made: number of engines with an optimizer that were made.
        is_loop_known: the engines are made for a loop that reads weights only in ways that finish a deferred update.

    Raises:
        hift_ds.config.ConfigError: (a ValueError) lists every problem of ``section``.
    """

    def __init__(
        self, section: Mapping[str, Any], model: torch.nn.Module | None = None, refuses_other_steps: bool = False
    ):
        if problems := hift_config.section_problems(section):
            raise hift_config.ConfigError(problems)
        self.made = 0
        self.is_loop_known = False
        self.refuses_other_steps = refuses_other_steps
        self._section = dict(section)
        self._model = None if model is None else weakref.ref(model)
        self._engines: list[weakref.ref[torch.nn.Module]] = []
        if not _open:
            _originals.replace()
        _open.append(self)

    @property
    def is_for_one_model(self) -> bool:
        """Whether this makes the engines of one model only."""
        return self._model is not None

    def applies_to(self, model: Any) -> bool:
        """Return whether this makes the engine of a model."""
        return self._model is None or self._model() is model

    def close(self) -> None:
        """Make no more engines, and let the parameters of those made require gradients as before."""
        if self not in _open:
            return
        _open.remove(self)
        if not _open:
            _originals.restore()
        for reference in self._engines:
            if isinstance(engine := reference(), HiFTEngine):
                engine.unfreeze()

    def warn_of_untrained_blocks(self) -> None:
        """Warn if training ended before each block was trained."""
        for reference in self._engines:
            engine = reference()
            if isinstance(engine, HiFTEngine) and 0 < engine.global_steps and not engine.cycle:
                logger.warning(too_short(engine, f"training ended after {engine.global_steps} steps"))

    def engine_of(self, model: Any) -> Any:
        """Return the last engine with an optimizer that was made of a model, or None."""
        alive = (engine for reference in reversed(self._engines) if (engine := reference()) is not None)
        return next((engine for engine in alive if engine.module is model), None)

    def make(self, arguments: dict[str, Any], config: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        """Call ``hift_ds.initialize``; its arguments and results."""
        given = config.get(hift_config.SECTION) or {}
        if isinstance(given, Mapping):
            for key in self._section.keys() & given.keys():
                if self._section[key] != given[key]:
                    logger.warning(
                        f"hift.{key}={given[key]!r} of the DeepSpeed config replaces {self._section[key]!r}, which "
                        "hift_ds.enabled or HiFTCallback received"
                    )
            given = {"lr_ticks": "step", **self._section, **given}
            if self.is_loop_known:
                given = hift_config.with_deferred_step(given)
        rest = {key: value for key, value in arguments.items() if key != "config_params"}
        results = initialize(**{**rest, "config": {**config, hift_config.SECTION: given}})
        engine = results[0]
        if isinstance(engine, HiFTEngine):
            engine.register_forward_pre_hook(_limit_recomputation)
        self._engines.append(weakref.ref(engine))
        for interception in _open:  # an outer one has no engine to miss
            interception.made += 1
        return results


def _limit_recomputation(engine: Any, _: Any) -> None:
    """Before a forward pass of an engine: let its backward pass recompute layers from the active block up only."""
    if engine.module.training:
        limit_recomputation(engine.module)


_open: list[Interception] = []  # the last one is the innermost


def find(model: Any) -> Interception | None:
    """Return the innermost open interception that makes the engine of a model, or None."""
    return next((interception for interception in reversed(_open) if interception.applies_to(model)), None)


_TRAINER = "transformers.trainer"  # importing it takes seconds, so it is left to the script


class _Originals:
    """What an interception replaces, and how it is put back.

    Attributes:
        initialize: DeepSpeed's function, while it is replaced.
        is_making: an engine is being made, and calls go to DeepSpeed's function.
    """

    initialize: Any = None
    is_making = False
    _trainer: Any = None
    _train: Any = None

    def replace(self) -> None:
        """Put functions of this module in the place of DeepSpeed's and the Trainer's."""
        self.initialize = deepspeed.initialize
        deepspeed.initialize = functools.wraps(self.initialize)(_initialize)
        self._hook = register_optimizer_step_pre_hook(_refuse_other_steps)
        sys.meta_path.insert(0, _trainer_finder)
        if _TRAINER in sys.modules:
            self.replace_train(sys.modules[_TRAINER])

    def replace_train(self, module: Any) -> None:
        """Put a function of this module in the place of the Trainer's ``train``.

        Args:
            module: ``transformers.trainer``.
        """
        self._trainer, self._train = module.Trainer, module.Trainer.train
        self._trainer.train = _with_reports(self._train)

    def restore(self) -> None:
        """Put the originals back."""
        deepspeed.initialize, self.initialize = self.initialize, None
        self._hook.remove()
        sys.meta_path.remove(_trainer_finder)
        if self._trainer is not None:
            self._trainer.train = self._train
            self._trainer = self._train = None


_originals = _Originals()


class _TrainerFinder(importlib.abc.MetaPathFinder):
    """Replaces ``Trainer.train`` where a script imports the Trainer while an interception is open."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return the module's ordinary spec, whose loader also replaces ``train``; None: of another module."""
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == _TRAINER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_replace(module: Any) -> None:
                execute(module)
                _originals.replace_train(module)

            spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


_trainer_finder = _TrainerFinder()


def _initialize(*args: Any, **kwargs: Any) -> Any:
    """``deepspeed.initialize`` while an interception is open."""
    original = _originals.initialize
    arguments = inspect.signature(original).bind(*args, **kwargs).arguments
    model = arguments.get("model")
    interception = find(model)
    config = arguments.get("config") or arguments.get("config_params")
    config = config or getattr(arguments.get("args"), "deepspeed_config", None)
    if _originals.is_making or interception is None or not config:
        return original(*args, **kwargs)
    config = hift_config.read(config)
    has_optimizer = arguments.get("optimizer") is not None or config.get("optimizer")
    if not has_optimizer or (model is not None and not any(p.requires_grad for p in model.parameters())):
        return original(*args, **kwargs)
    _originals.is_making = True
    try:
        return interception.make(dict(arguments), config)
    finally:
        _originals.is_making = False


def _refuse_other_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raise an error if an optimizer steps although no engine was made yet."""
    if _originals.is_making:
        return
    if any(interception.refuses_other_steps and not interception.made for interception in _open):
        raise RuntimeError(f"hift_ds.enabled: {type(optimizer).__name__} steps without a HiFT engine: {NO_ENGINE}")


def _with_reports(train: Any) -> Any:
    """Return ``Trainer.train`` as it is while an interception is open: the Trainer's logs show what HiFT does."""

    @functools.wraps(train)
    def train_with_reports(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        from hift_ds.integrations.reports import TrainerReports

        interception = find(trainer.model)
        if interception is None:
            return train(trainer, *args, **kwargs)
        if interception.is_for_one_model and trainer.model_init is not None:
            raise RuntimeError(f"HiFTCallback: {MODEL_INIT}")
        reports = TrainerReports(interception.engine_of, kept=getattr(trainer, "deepspeed", None))
        callbacks = trainer.callback_handler.callbacks
        # Other Trainers and callbacks may read weights after a step, as TRL does to send them to vLLM.
        classes = map(type, (trainer, *callbacks))
        interception.is_loop_known = all(one.__module__.startswith(("transformers.", "hift_ds.")) for one in classes)
        callbacks.insert(0, reports)  # before the callbacks that send the logs elsewhere
        try:
            return train(trainer, *args, **kwargs)
        finally:
            callbacks.remove(reports)
            interception.is_loop_known = False

    return train_with_reports
