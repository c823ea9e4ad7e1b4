"""How an engine saves and loads: DeepSpeed's files, committed and verified by ``checkpoint.py``."""

import os
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.utils import logger

from hift_ds.checkpoint import store
from hift_ds.checkpoint.files import FileEngine, Files, generators, restore_generators


class SavingEngine(DeepSpeedEngine):
    """DeepSpeed's engine, whose checkpoints are whole or not there, and never run code (``checkpoint.py``)."""

    checkpoint_engine: FileEngine

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """DeepSpeed's ``save_checkpoint``, with the random generators. All ranks have it in the end, or none.

        Raises:
            hift_ds.checkpoint.store.CheckpointError: (a ValueError) on every rank, if it cannot be written; earlier
                checkpoints are as they were.
        """
        if not save_dir:
            raise ValueError(f"save_dir={save_dir!r}: expected a folder's path")

        def write(folder: str, name: str) -> Files:
            state = {**(client_state or {}), **self.position()}
            super(SavingEngine, self).save_checkpoint(folder, name, state, False, exclude_frozen_parameters)
            self.checkpoint_engine.save(generators(), os.path.join(folder, name, self._generators_file()))
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
        """DeepSpeed's ``load_checkpoint``, of files that are as they were written.

        Args:
            tag: None: the newest whole one. What ``hift_ds.checkpoint.store.find`` gave is not verified again.

        Returns:
            (None, None) where there is none.

        Raises:
            hift_ds.checkpoint.store.CheckpointError: (a ValueError) it is damaged, or there is no whole one.
            ValueError: it was made by another number of ranks, or another ZeRO stage.
        """
        found = tag if isinstance(tag, store.Checkpoint) else store.find(load_dir, tag)
        if found is None:
            logger.warning(f"there is no checkpoint in {load_dir!r}")
            return None, None
        folder, continues = found.path.parent, load_optimizer_states and not load_module_only
        if continues:
            self._check_same(found)
        elif self.zero_optimization_partition_weights() and store.pointed(folder) != found.path.name:
            raise ValueError(  # DeepSpeed reads the weights of stage 3 from where `latest` points
                f"weights alone can be loaded at stage 3 only from the checkpoint that {str(folder / 'latest')!r} names"
            )
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
                restore_generators(self.checkpoint_engine.load(str(file), map_location="cpu"))
        return path, client_state

    def about(self) -> dict[str, Any]:
        """What a manifest says of the run."""
        return {
            "step": self.global_steps,
            "world_size": dist.get_world_size(),
            "zero_stage": int(self.zero_optimization_stage()),
            "dtype": str(self.get_data_types()[0]).removeprefix("torch."),
            "versions": {"deepspeed": deepspeed.__version__, "torch": torch.__version__},
            "config": self.config,
            **self.place(),
        }

    def place(self) -> dict[str, Any]:
        """Where in its cycles a run is, for the manifest."""
        return {}

    def position(self) -> dict[str, Any]:
        """What goes into the client state beside the user's own."""
        return {}

    def restore_position(self, where: str, client_state: dict[str, Any]) -> None:
        """Take it out of the client state again."""

    def _check_same(self, found: store.Checkpoint) -> None:
        now = self.about()
        remedies = {"world_size": "ranks", "zero_stage": "zero_optimization.stage", "dtype": "dtype of the weights"}
        differing = [
            f"{name} is {now[key]}, the checkpoint's {found.about[key]}"
            for key, name in remedies.items()
            if key in found.about and found.about[key] != now[key]
        ]
        if differing:
            raise ValueError(
                f"{str(found.path)!r} was made by another kind of run: {'; '.join(differing)}; resume as it was made, "
                "or load its weights alone with load_module_only=True"
            )
        self.check_cut(str(found.path), found.about.get("blocks"))

    def check_cut(self, where: str, saved: list[list[Any]] | None) -> None:
        """Raise ValueError where the blocks that a checkpoint holds, if it says so, are not this run's."""
        ours = self.place().get("blocks")
        if saved is not None and ours is not None and saved != ours:
            raise ValueError(
                f"the checkpoint in {where!r} holds the blocks {_shortened(saved)}, this run has {_shortened(ours)}; "
                "resume with the layers_per_block, max_block_numel, balance and freeze it was saved with"
            )

    def _generators_file(self) -> str:
        return f"generators_rank_{dist.get_rank()}.pt"


def _shortened(cut: list[list[Any]]) -> str:
    shown = ", ".join(f"{name} ({numel})" for name, numel in cut[:3])
    return f"{shown}{' ...' if len(cut) > 3 else ''} ({len(cut)} in all)"
