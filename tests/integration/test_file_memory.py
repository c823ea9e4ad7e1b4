"""Anonymous memory of a process whose state is in files: what the ledger counts, also while a checkpoint is saved."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hift_ds.engine
from hift_ds.checkpoint.files import FileEngine
from hift_ds.state import direct_io
from hift_ds.state.allocator import scratch
from tests.support import tiny
from tests.support.pairwise import others_slow
from tests.support.ranks import free_port, run_on_ranks
from tests.support.tiny import Case

STAGES = (0, 1, 2, 3)


def grown(stage: int, folder: str) -> dict[str, int]:
    """In a process of its own: anonymous memory of an engine, its peak in a cycle and in a save, and counted bytes."""
    import hift_ds
    from hift_ds.evaluation.cost.process_memory import anonymous, peak_memory

    config = tiny.ds_config(Case(stage=stage, dtype="bf16", layers_per_block=1, place="nvme"))
    config["hift"]["offload"] |= {"nvme_path": folder, "buffer_size": 2**20}
    ids = torch.randint(512, (1, 8))
    found = {}
    for layers in (1, 6):  # the first is for the memory of libraries
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=512,
                hidden_size=768,
                intermediate_size=1536,
                num_hidden_layers=layers,
                num_attention_heads=4,
                use_cache=False,
            )
        ).bfloat16()
        gc.collect()
        before = anonymous()
        with peak_memory() as training:
            engine = hift_ds.initialize(model=model, config=config)[0]
            for _ in engine.blocks:
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
        engine.settle()
        with peak_memory() as saving, tempfile.TemporaryDirectory(dir=folder) as checkpoints:
            engine.save_checkpoint(checkpoints)
        ledger = engine.memory_ledger(peak=True)
        found = {
            "training": training.highest - before,
            "saving": saving.above,
            "counted": sum(ledger["host"].values()) + sum(ledger["device"].values()) - ledger["device"]["parameters"],
            "state": sum(ledger["nvme"].values()),
            "decoded": 2 * ledger["device"]["parameters"],  # fp32 masters of bf16 weights
        }
        engine.destroy()
        del engine, model
        gc.collect()
    return found


@pytest.mark.parametrize("stage", others_slow(STAGES, [2]))
def test_neither_training_nor_saving_takes_the_memory_of_the_state(stage: int, tmp_path: Path) -> None:
    if direct_io.library()[0] is None:
        pytest.skip(direct_io.library()[1])
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    result = subprocess.run(
        [sys.executable, "-m", __name__, str(stage), str(tmp_path)],
        env=os.environ | ranks,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(found)
    assert found["training"] <= found["counted"] + 96 * 2**20 < found["state"]
    assert found["saving"] <= 64 * 2**20 < found["decoded"] / 2  # pieces of a master are decoded one after the other


def test_a_scratch_tensor_is_saved_without_memory(tmp_path: Path) -> None:
    from hift_ds.evaluation.cost.process_memory import anonymous, peak_memory

    engine = FileEngine(mmap=True)
    with peak_memory() as peak:
        values = scratch((4, 2**22), torch.float32, str(tmp_path))
        assert not list(tmp_path.iterdir())
        values.view(-1)[::1000] = 1.0
        engine.create(None)
        engine.save({"masters": [values]}, str(tmp_path / "state.pt"))
        engine.finish()
    assert peak.above < 8 * 2**20 < values.nbytes / 4
    before = anonymous()
    (loaded,) = engine.load(str(tmp_path / "state.pt"), "cpu")["masters"]
    assert torch.equal(loaded, values) and anonymous() - before < 8 * 2**20


if __name__ == "__main__":
    print(json.dumps(grown(int(sys.argv[1]), sys.argv[2])))


def folders_while_saving(free: int, folder: str) -> list[str | None]:
    """In a rank: the folders for decoded masters while a checkpoint is saved to a drive with so much free space."""
    engine = tiny.initialize(Case(stage=2, dtype="bf16"))
    seen, state_dict = [], engine.block_optimizers.state_dict

    def watched() -> Any:
        seen.append(engine.block_optimizers.scratch_folder)
        return state_dict()

    usage = mock.Mock(return_value=mock.Mock(free=free))
    with mock.patch.object(hift_ds.engine.shutil, "disk_usage", usage):
        with mock.patch.object(engine.block_optimizers, "state_dict", watched):
            engine.save_checkpoint(folder)
    seen.append(engine.block_optimizers.scratch_folder)
    engine.destroy()
    return seen


def test_masters_are_decoded_in_memory_if_the_drive_has_no_room_beside_the_checkpoint(tmp_path: Path) -> None:
    ((inside, after),) = run_on_ranks(1, folders_while_saving, 2**40, str(tmp_path))
    assert inside is not None and Path(inside).is_relative_to(tmp_path) and after is None
    assert run_on_ranks(1, folders_while_saving, 2**18, str(tmp_path)) == [[None, None]]
