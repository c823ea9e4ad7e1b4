"""The search for what fits on a device and in host memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from hift_ds.config import ConfigError
from hift_ds.planner.api import plan_memory
from hift_ds.planner.command import main
from hift_ds.planner.picture import table
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request
from hift_ds.planner.search import Fit, _weights_elsewhere, default_host_reserve
from tests.hift_ds.planner.test_plan import SMALL

GIB = 2**30
MODEL = {**SMALL, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 8192}
RUN: dict[str, Any] = {"seq_len": 256, "buffer_size": 2**20}
PLANNER = Planner(Request(MODEL, **RUN))


def needs(**options: Any) -> tuple[int, int]:
    """Bytes on the device and in host memory."""
    plan = PLANNER.plan(replace(PLANNER.request, **options))
    return sum(plan.device.values()), sum(plan.host.values())


def fit(device: int, host: int, **options: Any) -> Any:
    """The plan on a device and a machine with these bytes, and what stays free on top."""
    room = {"gpu_memory": device, "reserve": "0", "host_memory": host + default_host_reserve(options.get("ranks", 1))}
    return plan_memory(MODEL, **RUN, **room, **options)


def test_exact_state_in_host_memory_comes_first_then_8_bits_then_files(tmp_path: Any) -> None:
    device, exact = needs()
    _, coded = needs(moments="8bit")
    plan = fit(device, exact)
    assert plan.fit["fits"] and plan.fit["change"] is None
    plan = fit(device, exact - 1, nvme_path=str(tmp_path))
    assert plan.fit["change"] == "8-bit moments" and plan.fitting.nvme_path is None
    plan = fit(device, coded - 1, nvme_path=str(tmp_path))
    assert plan.fit["change"].endswith("in files") and plan.fitting.nvme_path == str(tmp_path)
    assert plan.fit["nvme_total"] > 0 and plan.fit["host_total"] < coded
    assert plan.fitting.deepspeed_config()["hift"]["offload"]["device"] == "nvme"


def test_weights_leave_the_device_where_nothing_cheaper_fits() -> None:
    recomputed, exact = needs(activation_checkpointing=True)
    room, with_weights = needs(weights="cpu")
    assert room < recomputed
    plan = fit(recomputed, exact)
    assert plan.fit["change"] == "activation checkpointing"
    plan = fit(room, with_weights)
    assert plan.fit["change"] == "weights in host memory" and plan.fitting.weights == "cpu"
    assert plan.fit["device_total"] == room and plan.fit["host_total"] == with_weights
    plan = fit(room, exact)  # which has no room for the weights
    assert plan.fit["change"] == "8-bit moments and weights in host memory"
    assert plan.fit["host_total"] <= exact


def test_on_several_gpus_zero_3_shares_weights_before_they_leave_the_device() -> None:
    request = replace(PLANNER.request, ranks=4)
    (shared, sharded), (one_copy, waiting), (elsewhere, offloaded) = _weights_elsewhere(request)
    assert shared == ["ZeRO-3 on 4 ranks"] and (sharded.stage, sharded.offload_param) == (3, "none")
    assert one_copy == ["weights in host memory"] and (waiting.stage, waiting.weights) == (2, "cpu")
    assert elsewhere == ["ZeRO-3 on 4 ranks with weights in host memory"]
    assert offloaded.deepspeed_config()["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert [changed for _, changed in _weights_elsewhere(sharded)] == [offloaded]


def test_ranks_share_one_copy_of_the_weights() -> None:
    request = replace(PLANNER.request, weights="cpu", zero_stage=2)
    of_ranks = {}
    for ranks in (1, 4):
        planner = Planner(replace(request, ranks=ranks))
        of_ranks[ranks] = planner.off_device(planner.request, "host")
        state = sum(size for name, size in of_ranks[ranks].items() if name != "parameters")
        total = Fit(planner, 8 * GIB, 0, None)._host_total(planner.request)
        assert total == ranks * state + of_ranks[1]["parameters"]
        assert planner.layer_bytes(planner.request) == Planner(request).layer_bytes(request)
    assert of_ranks[4]["parameters"] == of_ranks[1]["parameters"]


def test_with_a_card_the_fastest_change_is_taken() -> None:
    device, _ = needs(weights="cpu")
    plan = fit(device, 4 * GIB, gpu="4090")
    assert plan.fit["change"] == "weights in host memory"  # also fits with checkpointing, and is faster without
    assert plan.fit["seconds"] > plan.time["seconds"] and plan.fit["hidden_from"] >= 1
    shown = table(plan)
    assert "times the" in shown and "GiB of host memory. A step then takes" in shown
    assert f"{plan.fit['hidden_from']} x 256 = {256 * plan.fit['hidden_from']:,} tokens on" in shown


def test_what_is_missing_and_what_would_help_is_named() -> None:
    device, _ = needs()
    plan = fit(device, 2**20)
    assert not plan.fit["fits"] and plan.fit["missing"]["device"] == 0 < plan.fit["missing"]["host"]
    assert plan.fit["closest"] == "8-bit moments"
    assert "GiB of host memory are missing" in table(plan) and "--nvme-path" in table(plan)
    plan = fit(2**20, 4 * GIB)
    assert plan.fit["missing"]["device"] > 0 == plan.fit["missing"]["host"]
    assert "max-block-numel" in plan.fit["helps"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_memory": "64GiB"}, "no effect without --gpu-memory"),
        ({"gpu_memory": "8GiB", "host_memory": "4GiB"}, "expected more than the 4 GiB that stay free"),
        ({"gpu_memory": "8GiB", "host_memory": "some"}, "--host-memory='some': expected a size"),
        ({"weights": "cpu", "zero_stage": 3}, "^--weights=cpu with --zero-stage=3: .* use --offload-param cpu"),
        ({"offload_param": "cpu"}, "^--offload-param=cpu with ZeRO-2: .* on one GPU use --weights cpu"),
        ({"weights": "cpu", "method": "lora"}, "^--weights=cpu with --method=lora: "),
        ({"weights": "cpu", "offload_device": "none"}, "^--weights=cpu with --offload-device=none: "),
        ({"balance": True, "method": "full"}, "^--balance=True with --method=full: "),
        ({"buffer_size": 2**20, "offload_step": "block"}, "^--buffer-size=1048576: only the streamed step has slots"),
        ({"pin_memory": False, "offload_device": "none"}, "^--no-pin-memory: state and weights stay on the device"),
        ({"nvme": "moments", "offload_device": "nvme", "optimizer": "sgd"}, "--optimizer=sgd, which has no state"),
        ({"moments": "8bit", "optimizer": "adagrad"}, "adamw, lion, sgdm"),
        ({"moments": "8bit", "offload_device": "none"}, "leave it out"),
        ({"master": "split", "precision": "fp32"}, "it is the remainder of a bf16 weight"),
        ({"nvme": "moments"}, "only --offload-device nvme uses files"),
        ({"drive_read": 0}, "--drive-read=0: expected bytes a second"),
    ],
)
def test_wrong_combinations_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_memory(MODEL, seq_len=64, **options)


def test_the_command_writes_the_config_of_the_cheapest_combination(tmp_path: Any, capsys: Any) -> None:
    model, file = tmp_path / "config.json", tmp_path / "fits.json"
    model.write_text(json.dumps(MODEL))
    device, _ = needs(weights="cpu")
    command = [
        "--model",
        str(model),
        "--seq-len",
        "256",
        "--buffer-size",
        str(2**20),
        "--reserve",
        "0",
        "--gpu-memory",
        str(device),
    ]
    assert main([*command, "--host-memory", "8GiB", "--write-config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("The run does not fit on") and "It fits with weights in host memory" in shown
    assert json.loads(file.read_text())["hift"]["offload"]["weights"] == "cpu"
    _, _, sizes = shown.partition("With weights in host memory:")  # not those of the plan that does not fit
    ((total, unit),) = (line.split()[1:3] for line in sizes.splitlines() if line.startswith("total"))
    shown_bytes = float(total) * {"GiB": GIB, "MiB": 2**20}[unit]
    assert abs(shown_bytes - device) < 0.006 * GIB < needs()[0] - shown_bytes


def test_free_space_of_the_drive_is_a_limit(tmp_path: Any) -> None:
    device, coded = needs(moments="8bit")
    run = {**RUN, "gpu_memory": device, "reserve": "0", "nvme_path": str(tmp_path)}
    run["host_memory"] = coded - 1 + default_host_reserve(1)

    def planned(free: int) -> Any:
        with mock.patch.object(shutil, "disk_usage", lambda _: mock.Mock(free=free)):
            return plan_memory(MODEL, **run)

    needed = planned(64 * GIB).fit["nvme_total"]
    assert planned(needed).fitting.offload_device == "nvme"
    plan = planned(2**20)
    assert plan.fitting is None and "more host memory, or more free space on the drive" in table(plan)
    with mock.patch.object(shutil, "disk_usage", lambda _: mock.Mock(free=2**20)):
        plan = plan_memory(MODEL, **RUN, offload_device="nvme", nvme_path=str(tmp_path))
    assert any(
        "0.0 GiB are free, and files take" in note and "choose a folder on a larger drive" in note
        for note in plan.notes
    )
    plan = plan_memory(MODEL, **RUN, offload_device="nvme", nvme_path=str(tmp_path / "elsewhere"))
    assert any("is not on this machine" in note for note in plan.notes)
