"""How an engine saves and loads: DeepSpeed writes the files, and :mod:`hift_ds.checkpoint.store` commits them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.utils import logger

from hift_ds.checkpoint import store
from hift_ds.checkpoint.files import FileEngine, Files
from hift_ds.checkpoint.generators import generator_states, restore_generator_states

_SETTINGS = {
    "world_size": "number of ranks",
    "zero_stage": "zero_optimization.stage",
    "dtype": "dtype of the weights",
}


class SavingEngine(DeepSpeedEngine):
    """DeepSpeed's engine with atomic, verified checkpoints that are safe to read.

    Attributes:
        checkpoint_engine: writes and reads the files.
    """

    checkpoint_engine: FileEngine

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """DeepSpeed's ``save_checkpoint``, with the states of the random generators. All ranks call it.

        Args:
            save_dir: folder of checkpoints.
            tag: the checkpoint's name; None: ``global_step`` and the number of the step.
            client_state: the caller's own values: tensors, numbers, strings, and lists and dicts of them.
            save_latest: let the file ``latest`` name this checkpoint.
            exclude_frozen_parameters: do not save frozen weights.

        Returns:
            True.

        Raises:
            hift_ds.checkpoint.files.CheckpointError: (a ValueError) on every rank, if it cannot be written on any rank.
                Earlier checkpoints are unchanged.
        """
        if not save_dir:
            raise ValueError(f"save_dir={save_dir!r}: expected the path of a folder")

        def write(folder: str, name: str) -> Files:
            state = {**(client_state or {}), **self.position()}
            with self.saving_into(folder):
                super(SavingEngine, self).save_checkpoint(folder, name, state, False, exclude_frozen_parameters)
            self.checkpoint_engine.save(generator_states(), os.path.join(folder, name, self._generators_file()))
            return self.checkpoint_engine.finish()

        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        store.save(save_dir, name, write, self.about(), save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | store.Checkpoint | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """DeepSpeed's ``load_checkpoint``, after the files were verified. All ranks call it.

        Args:
            load_dir: folder of checkpoints.
            tag: the checkpoint's name; None: the newest intact one. What ``hift_ds.checkpoint.store.find`` returned is
                not verified again.
            load_module_strict: raise an error if the weights' names differ.
            load_optimizer_states: False: load only the weights.
            load_lr_scheduler_states: load the learning-rate schedule.
            load_module_only: load only the weights.
            custom_load_fn: loads the weights instead of ``load_state_dict``.

        Returns:
            The checkpoint's path and its client state; (None, None): there is no checkpoint.

        Raises:
            hift_ds.checkpoint.files.CheckpointError: (a ValueError) it is damaged, or none is intact.
            ValueError: another number of ranks, ZeRO stage or dtype saved it.
        """
        found = tag if isinstance(tag, store.Checkpoint) else store.find(load_dir, tag)
        if found is None:
            logger.warning(f"there is no checkpoint in {load_dir!r}")
            return None, None
        folder, continues = found.path.parent, load_optimizer_states and not load_module_only
        if continues:
            self.check_continues(found)
        else:
            self.check_loads_weights(found)
        path, client_state = super().load_checkpoint(
            str(folder),
            found.path.name,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        if path is not None and client_state is not None and continues:
            self.restore_position(str(load_dir), client_state)
            if (file := found.path / self._generators_file()).exists():
                restore_generator_states(self.checkpoint_engine.load(str(file), map_location="cpu"))
        return path, client_state

    def about(self) -> dict[str, Any]:
        """Return the description of this run for the manifest."""
        return {
            "step": self.global_steps,
            "world_size": dist.get_world_size(),
            "zero_stage": int(self.zero_optimization_stage()),
            "dtype": str(self.get_data_types()[0]).removeprefix("torch."),
            "versions": {"deepspeed": deepspeed.__version__, "torch": torch.__version__},
            "config": self.config,
            **self.place(),
        }

    def check_loads_weights(self, found: store.Checkpoint) -> None:
        """Check that the weights alone can be loaded from a checkpoint.

        Raises:
            ValueError: at ZeRO 3, DeepSpeed reads them from the checkpoint that ``latest`` names, not from this one.
        """
        folder = found.path.parent
        if self.zero_optimization_partition_weights() and store.pointed(folder) != found.path.name:
            raise ValueError(
                f"at ZeRO stage 3, weights can be loaded without the rest only from the checkpoint that "
                f"{str(folder / 'latest')!r} names"
            )

    def place(self) -> dict[str, Any]:
        """Return the position of the run for the manifest; here none."""
        return {}

    @contextmanager
    def saving_into(self, folder: str) -> Iterator[None]:
        """While inside, DeepSpeed saves a checkpoint in this folder; here nothing depends on it."""
        yield

    def position(self) -> dict[str, Any]:
        """Return entries for the client state in addition to the caller's; here none."""
        return {}

    def restore_position(self, where: str, client_state: dict[str, Any]) -> None:
        """Remove the entries of :meth:`position` from a loaded client state, and continue there."""

    def check_continues(self, found: store.Checkpoint) -> None:
        """Check that this run can continue from a checkpoint, before it is read.

        Raises:
            ValueError: another number of ranks, ZeRO stage or dtype saved it.
        """
        self.check_settings(found, ("world_size", "zero_stage", "dtype"))

    def check_settings(self, found: store.Checkpoint, settings: Sequence[str]) -> None:
        """Check that settings of this run are those of the run that saved a checkpoint.

        Args:
            found: the checkpoint.
            settings: keys of :meth:`about`.

        Raises:
            ValueError: some differ.
        """
        now = self.about()
        differing = [
            f"{_SETTINGS[key]}: {now[key]} now, {found.about[key]} in the checkpoint"
            for key in settings
            if key in found.about and found.about[key] != now[key]
        ]
        if differing:
            raise ValueError(
                f"another kind of run saved {str(found.path)!r}: {'; '.join(differing)}; resume with the same "
                "settings, or load only its weights with load_module_only=True"
            )

    def _generators_file(self) -> str:
        return f"generators_rank_{dist.get_rank()}.pt"
