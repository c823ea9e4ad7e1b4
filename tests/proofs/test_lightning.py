"""Lightning in every combination of the settings below. tests/integration/test_lightning.py has a sample."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from tests.integration.test_lightning import (
    CLIP,
    CYCLE,
    STEPS,
    Case,
    Loader,
    check,
    config,
    expected_rates,
    lightning_module,
    make_adamw,
    rows,
    script_schedule,
    trainer,
)
from tests.support import integrations, tiny
from tests.support.parity import STAGES, cases
from tests.support.ranks import run_on_ranks

OWNERS = (("script", "script"), ("script", "config"), ("config", "config"))  # Lightning asks a script for both or none


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage, ranks, *owners) for stage in STAGES for ranks in (1, 2) for owners in OWNERS],
        [Case(stage, interval="epoch") for stage in STAGES],
        [Case(stage, dtype="bf16") for stage in STAGES],
    ),
    ids=str,
)
def test_fit(case: Case, tmp_path: Path) -> None:
    check(case, integrations.model_folder(tmp_path / "tiny"), tmp_path)


def train_and_read_back(stage: int, folder: Path, out: Path) -> tuple[float | None, float, float]:
    """In a rank: how far the weights of Lightning's consolidated file are from those of the model, and the losses of
    the last validation and of a test that reads the checkpoint."""
    import hift_ds

    case = Case(stage)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    held_out = DataLoader(rows(case)[:8], batch_size=2)
    with integrations.lightning_on_cpu():
        module, runs = (
            lightning_module(case, model),
            trainer(case, out, strategy=DeepSpeedStrategy(config=config(case))),
        )
        with hift_ds.enabled():
            runs.fit(module, Loader(rows(case), batch_size=2), held_out)
            runs.save_checkpoint(out / "end.ckpt")
        weights, distance = integrations.all_weights(model), None
        if stage:
            state = convert_zero_checkpoint_to_fp32_state_dict(out / "end.ckpt", str(out / "end.pt"))["state_dict"]
            whole = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            distance = tiny.largest_difference(whole, weights)
        for parameter in model.parameters():
            parameter.data.zero_()
        with pytest.raises(AttributeError, match="_restore_from_bit16_weights") if stage == 3 else nullcontext():
            tested = runs.test(module, held_out, ckpt_path=out / "end.ckpt", verbose=False)
            return distance, module.evaluated[-1], tested[0]["held_out"]
        return distance, module.evaluated[-1], module.evaluated[-1]  # DeepSpeed cannot do it, without HiFT either


@pytest.mark.parametrize("stage", STAGES)
def test_what_lightning_saves_is_read_elsewhere(stage: int, tmp_path: Path) -> None:
    folder = integrations.model_folder(tmp_path / "tiny")
    [(distance, validated, tested)] = run_on_ranks(1, train_and_read_back, stage, folder, tmp_path)
    assert not distance and tested == validated


def train_with_fabric(stage: int, folder: Path) -> tuple[list[Any], list[set[float]], dict[str, Tensor]]:
    """In a rank: a loop on Lightning's Fabric, with the script's optimizer and schedule."""
    from lightning import Fabric
    from lightning.fabric.accelerators import CPUAccelerator
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.strategies import DeepSpeedStrategy as FabricStrategy

    import hift_ds

    case = Case(stage)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    devices = staticmethod(lambda count: [torch.device("cpu", rank) for rank in range(int(count))])
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(FabricStrategy, "setup_environment", DDPStrategy.setup_environment),
        mock.patch.object(CPUAccelerator, "get_parallel_devices", devices),
        integrations.Recording(model) as seen,
    ):
        settings = {**config(case), "gradient_clipping": CLIP}
        fabric = Fabric(accelerator="cpu", devices=1, strategy=FabricStrategy(config=settings), precision="32-true")
        fabric.launch()
        with hift_ds.enabled():
            optimizer = make_adamw(model.named_parameters())
            schedule = script_schedule(case, optimizer)
            wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
            for batch in DataLoader((rows(case) * 2)[: 2 * STEPS], batch_size=2):
                fabric.backward(wrapped(**batch).loss)
                with pytest.raises(RuntimeError, match=r"fabric.strategy.model.step\(\)"):
                    wrapped_optimizer.step()
                fabric.strategy.model.step()
                schedule.step()
                wrapped_optimizer.zero_grad()
        weights = integrations.all_weights(model)
        fabric.strategy._deepspeed_engine.destroy()
        return seen.steps(), seen.rates, weights


@pytest.mark.parametrize("stage", STAGES)
def test_fabric(stage: int, tmp_path: Path) -> None:
    folder = integrations.model_folder(tmp_path / "tiny")
    [(steps, seen, weights)] = run_on_ranks(1, train_with_fabric, stage, folder)
    rates = integrations.held(expected_rates(Case(stage)), CYCLE)
    assert len(steps) == STEPS and [sorted(of_step) for of_step in seen] == [[rate] for rate in rates]
    end = integrations.replay(
        integrations.load(folder, Case(stage).dtype), steps, rates, make_adamw, clip=CLIP, stage=stage
    )
    assert tiny.largest_difference(weights, end) <= integrations.bound(stage, 1)
