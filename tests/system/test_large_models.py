"""A model that is larger than what a rank may have, through the real launcher: anonymous memory of the processes.

``tests/integration/test_partitioned_loading.py`` measures the same on ranks that live through the session.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.support import large
from tests.support.jobs import launch
from tests.support.training import arguments

MEASURED = """
import json, os, sys
sys.path.insert(0, os.getcwd())
from hift_ds.evaluation.cost.process_memory import peak_memory
from hift_ds.launch import run, train
seen = {}
def measured(name, call):
    def wrapper(*args, **kwargs):
        with peak_memory() as peak:
            result = call(*args, **kwargs)
        seen[name] = peak.above
        if name == "engine":
            seen["ledger"] = result.memory_ledger()
        return result
    return wrapper
run.Run.load_model = measured("loading", run.Run.load_model)
run.make_engine = measured("engine", run.make_engine)
run.export_model = measured("export", run.export_model)
code = train.main(sys.argv[1:])
with open(f"{os.path.dirname(__file__)}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump(seen, file)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "saved"), [(512, "bfloat16"), (1024, "float32")])
def test_no_process_has_the_model(hidden: int, saved: str, tmp_path: Path) -> None:
    numel = large.save(tmp_path / "model", hidden, 20, getattr(torch, saved))
    size = 2 * numel  # bf16
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    overrides = [
        "model.config=null",
        "model.tokenizer=null",
        f"model.name_or_path={tmp_path / 'model'}",
        "deepspeed=configs/deepspeed/zero3.json",
        "deepspeed.bf16.enabled=true",
        f"output.max_shard_size={size // 5}",
        "data.max_length=128",
        "data.eval_examples=0",
        "training.max_steps=1",
    ]
    done = launch(2, arguments(tmp_path / "run", *overrides), script=str(script))
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    print(size, seen)
    small = 2**22  # of a process: what libraries allocate when they are used first
    assert sum(one["loading"] for one in seen) <= 1.1 * size + 2 * small
    for one in seen:
        state = sum(one["ledger"]["host"].values()) + sum(one["ledger"]["device"].values())
        assert one["engine"] <= state + size / 10 + small
        assert one["export"] <= size / 20 + 2**26  # modules for writing are imported
    from safetensors.torch import load_file

    shards = sorted((tmp_path / "run" / "model").glob("*.safetensors"))
    assert len(shards) > 4
    exported = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert sum(tensor.numel() for tensor in exported.values()) == numel
