"""A real limit of locked memory: what an engine says before it makes its optimizers, and that it trains."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ENVIRONMENT
from tests.support.limited_memory import hard_limit, limit_locked_memory
from tests.support.paths import REPOSITORY

MIB = 2**20
MOST = 64 * MIB if hard_limit() < 0 else min(64 * MIB, hard_limit())  # a process without privileges cannot set more

SCRIPT = """
import json, sys
from unittest import mock
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import hift_ds
from hift_ds.state import placement
from tests.support.limited_memory import locked_bytes, page_locking_by_mlock

big, small = json.loads(sys.argv[1])
found = {}

def train(name, vocabulary, **offload):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, **sizes)).bfloat16()
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "hift": {"offload": offload}}
    told, before = found.setdefault(name, {}), locked_bytes()
    with mock.patch.object(placement, "logger") as logger, mock.patch.object(placement, "rank", lambda: 0):
        try:
            engine = hift_ds.initialize(model=model, config=config)[0]
        except ValueError as error:
            told |= {"error": str(error), "locked": locked_bytes() - before}
            assert all(parameter.requires_grad for parameter in model.parameters())
            return
        told |= {"warnings": [call.args[0] for call in logger.warning.call_args_list]}
    told["locked"] = locked_bytes() - before
    ids = torch.arange(8).view(1, 8)
    for _ in engine.blocks:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    told["weights"] = sum(float(p.double().sum()) for p in engine.module.parameters())
    told["direct"] = placement.library()[0] is not None and engine.block_optimizers.host.direct is not None
    engine.destroy()

with page_locking_by_mlock():
    train("default", big)
    train("demanded", big, pin_memory=True)
    train("without", big, pin_memory=False)
    train("small", small)
if len(sys.argv) > 2:
    train("files", big, device="nvme", nvme_path=sys.argv[2])
    train("demanded, files", big, device="nvme", nvme_path=sys.argv[2], pin_memory=True)
print("FOUND " + json.dumps(found))
"""


def run(limit: int, *more: str) -> dict[str, Any]:
    """In a process under the limit. State takes one and a half times as much, at 10.125 bytes an element, or little."""
    big = max(limit, MIB) * 3 // 2 // (10 * 128)
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in unset}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([big, 64]), *more],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=functools.partial(limit_locked_memory, limit),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))[6:])


@pytest.mark.parametrize("limit", [pytest.param(0, marks=pytest.mark.slow), MOST], ids=["none", "some"])
def test_a_limit_of_locked_memory(limit: int, tmp_path: Path) -> None:
    """State in host memory, then in files, whose transfers go through memory that libaio's allocator locks."""
    found = run(limit, str(tmp_path))
    allowed = f"the system allows {limit / MIB:.3g} MiB (ulimit -l: {limit / MIB:.3g} MiB)"
    default, demanded, without = found["default"], found["demanded"], found["without"]
    (warning,) = default["warnings"]
    assert warning.startswith("The run continues, slower. Masters and optimizer state need ") and allowed in warning
    assert default["locked"] <= limit
    assert demanded["error"].startswith("hift.offload.pin_memory=true: masters and optimizer state need ")
    assert allowed in demanded["error"] and demanded["locked"] == 0
    assert not without["warnings"] and without["locked"] == 0 and without["weights"] == default["weights"]
    if limit:
        assert not found["small"]["warnings"] and 0 < found["small"]["locked"] <= limit
    else:
        assert allowed in found["small"]["warnings"][0]
    files = found["files"]
    assert files["direct"] is False and files["weights"] == default["weights"]
    assert files["warnings"][0].startswith("The run continues, slower. Transfers of state in files need ")
    assert f"(ulimit -l: {limit / MIB:.3g} MiB)" in files["warnings"][0]  # earlier engines may still hold some
    assert "instead of direct I/O" in files["warnings"][0]
    assert "transfers of state in files need" in found["demanded, files"]["error"]
