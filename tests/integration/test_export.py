"""The exported folder is the trained model, bit for bit, after each block's update; it is there whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ENVIRONMENT
from tests.support.data_fixtures import CHATML_WITHOUT_MARKERS, write_jsonl
from tests.support.paths import REPOSITORY
from tests.support.ranks import run_on_ranks
from tests.support.training import SHORT, run_tiny

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> AutoModelFor..., model_type, config
    "llama, tied": ("CausalLM", "llama", {**SIZE, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "bert, tied head": ("MaskedLM", "bert", {**SIZE, "max_position_embeddings": 64}),
    "gpt2, tied": ("CausalLM", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "t5, tied": ("Seq2SeqLM", "t5", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2,
                               "decoder_start_token_id": 0}),
    # Statistics of batch norms: buffers that training changes.
    "resnet": ("ImageClassification", "resnet", {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1],
                                                 "layer_type": "basic", "num_labels": 5}),
}  # fmt: skip
DEFAULT = (("llama, tied", 3, 2), ("bert, tied head", 0, 1), ("gpt2, tied", 3, 1), ("t5, tied", 0, 1), ("resnet", 0, 1))
CASES = [
    pytest.param(name, stage, ranks, marks=() if (name, stage, ranks) in DEFAULT else pytest.mark.slow)
    for name in MODELS
    for stage in (0, 3)
    for ranks in (1, 2)
]


def make_model(name: str) -> tuple[Any, Any]:
    """The model of random weights, and its class for loading."""
    import transformers

    from hift_ds.launch.model.tokenizer import byte_tokenizer

    task, kind, options = MODELS[name]
    vocabulary = {} if kind == "resnet" else {"vocab_size": len(byte_tokenizer())}
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{task}")
    return auto.from_config(transformers.AutoConfig.for_model(kind, **options, **vocabulary)), auto


def make_batch(name: str, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    if name == "resnet":
        pixels = torch.randn(2, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(5, (2,), generator=generator)}
    ids = torch.randint(6, 200, (2, 12), generator=generator)
    return {"input_ids": ids, "labels": ids}


def make_engine(name: str, stage: int, weights: str = "none") -> tuple[Any, Any]:
    import hift_ds

    model, auto = make_model(name)
    zero: dict[str, Any] = {"stage": stage} | ({"stage3_param_persistence_threshold": 100} if stage == 3 else {})
    zero["offload_param"] = {"device": weights}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "hift": {},
    }
    return hift_ds.initialize(model=model, config=config)[0], auto


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names, those that are not in the state dict too."""
    import deepspeed

    module = engine.module
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    found = {}
    for name, tensor in named:
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            found[name] = tensor.detach().cpu().clone()
    return found


def export_after_each_block(
    name: str, stage: int, folder: Path, weights: str = "none", **options: Any
) -> dict[str, Any]:
    """What is wrong with each export, on rank 0; and how many parameters each step changed."""
    from deepspeed import comm as dist

    from hift_ds.launch.model.tokenizer import byte_tokenizer
    from hift_ds.launch.runtime.export import export_model

    engine, auto = make_engine(name, stage, weights)
    wrong: list[str] = []
    changed = []
    umask = os.umask(0o027)  # others of the group may read
    before = whole_state(engine)
    for _ in engine.blocks:
        block = engine.active_block
        engine.backward(engine(**make_batch(name, dist.get_rank())).loss)
        engine.step()
        export_model(engine, byte_tokenizer(), folder, None, **options)
        expected = whole_state(engine)
        changed.append(sum(not torch.equal(before[key], value) for key, value in expected.items()))
        before = expected
        if dist.get_rank() == 0:
            loaded, info = auto.from_pretrained(folder, output_loading_info=True)
            wrong += [f"block {block}: {kind}: {keys}" for kind, keys in info.items() if keys]
            found = {**dict(loaded.named_parameters(remove_duplicate=False)), **dict(loaded.named_buffers())}
            if found.keys() != expected.keys():
                wrong.append(f"block {block}: names differ: {sorted(found.keys() ^ expected.keys())}")
                continue
            wrong += [
                f"block {block}: {key} differs"
                for key, value in expected.items()
                if found[key].dtype != value.dtype or not torch.equal(found[key], value)
            ]
            modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
            wrong += [f"block {block}: {path} has mode {mode}" for path, mode in modes.items() if mode != "0o640"]
            if [p for p in folder.parent.iterdir() if p != folder]:
                wrong.append(f"block {block}: something is left beside the folder")
        dist.barrier()
    engine.destroy()
    os.umask(umask)
    return {"wrong": wrong, "changed": changed, "blocks": len(changed)}


@pytest.mark.parametrize(("name", "stage", "ranks"), CASES)
def test_after_each_blocks_update(name: str, stage: int, ranks: int, tmp_path: Path) -> None:
    result = run_on_ranks(ranks, export_after_each_block, name, stage, tmp_path / "model")[0]
    assert result["wrong"] == []
    assert result["blocks"] >= 4 and all(result["changed"])  # each export is of other weights than the one before


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "t5, tied" else name for name in MODELS]
)
def test_after_each_blocks_update_of_weights_on_the_host(name: str, tmp_path: Path) -> None:
    result = run_on_ranks(2, export_after_each_block, name, 3, tmp_path / "model", "cpu")[0]
    assert result["wrong"] == []
    assert result["blocks"] >= 4 and all(result["changed"])


def files_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("name", "stage", "ranks"),
    [
        pytest.param(name, stage, ranks, marks=() if (name, stage) in chosen else pytest.mark.slow)
        for chosen in [(("llama, tied", 3), ("gpt2, tied", 0))]
        for name in MODELS
        for stage, ranks in ((0, 1), (2, 2), (3, 2))
    ],
)
def test_in_shards(name: str, stage: int, ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    result = run_on_ranks(ranks, export_after_each_block, name, stage, folder, max_shard_size="10KB")[0]
    assert result["wrong"] == []
    model, _ = make_model(name)
    widest = max(tensor.nbytes for tensor in model.state_dict().values())
    shards = files_of(folder)
    header = 2000  # bytes, of a file with few tensors
    assert len(shards) > 2 and max(shards.values()) <= max(widest, 10_000) + header
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards.keys()
    assert index["metadata"]["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from hift_ds.launch.runtime.process import world_of_one
world_of_one()
from tests.integration.test_export import make_engine
from hift_ds.launch.runtime import export
from hift_ds.launch.model.tokenizer import byte_tokenizer
engine, _ = make_engine("llama, tied", 0)
folder, moment = Path(sys.argv[1]), sys.argv[2]
tokenizer = byte_tokenizer()
export.export_model(engine, tokenizer, folder, None)
(folder / "first").touch()
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "weights":      # some of the files are written
    write = export._write
    export._write = lambda *args: (write(*args), die())
else:                        # all of them, and the old folder is out of the way
    replace = os.replace
    os.replace = lambda a, b: die() if str(a).endswith(".new") else replace(a, b)
export.export_model(engine, tokenizer, folder, None)
"""


@pytest.mark.parametrize("moment", ["weights", pytest.param("rename", marks=pytest.mark.slow)])
def test_a_killed_export_leaves_no_half_folder(moment: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), moment]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if moment == "weights":
        assert (folder / "first").exists()  # still the earlier one, whole
        AutoModelForCausalLM.from_pretrained(folder)
    else:
        assert not folder.exists()
    assert run_on_ranks(1, export_after_each_block, "llama, tied", 0, folder)[0]["wrong"] == []  # leftovers are gone


def export_to_a_full_disk(folder: Path) -> str:
    """With a limit on the size of files, as from a full disk in the middle of the weights; the message."""
    import resource

    from hift_ds.launch.errors import UserError
    from hift_ds.launch.model.tokenizer import byte_tokenizer
    from hift_ds.launch.runtime.export import export_model

    engine, _ = make_engine("llama, tied", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        export_model(engine, byte_tokenizer(), folder, None)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        engine.destroy()
    return "nothing was said"


def test_full_disk(tmp_path: Path) -> None:
    message = run_on_ranks(1, export_to_a_full_disk, tmp_path / "model")[0]
    assert f"{tmp_path / 'model'}: cannot be written" in message and "too large" in message.lower()
    assert not (tmp_path / "model").exists()


def test_the_exported_model_stops_where_the_chat_template_ends_turns(tmp_path: Path) -> None:
    """Its turns end with <|im_end|>, and the base model only knows the tokenizer's own end-of-sequence token."""
    from transformers import GenerationConfig

    from hift_ds.launch.model.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML_WITHOUT_MARKERS
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}]} for i in range(4)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = [*SHORT, f"model.tokenizer={tmp_path / 'tokenizer'}", "data.name=jsonl", f"data.path={data}"]
    result = run_tiny(1, tmp_path / "run", *settings, "data.train_examples=null")
    assert result["code"] == 0, result["printed"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    exported = GenerationConfig.from_pretrained(tmp_path / "run" / "model")
    assert exported.eos_token_id == [tokenizer.eos_token_id, end]
    assert "answers in the training data end with '<|im_end|>'; generation stops there too" in result["printed"]


def test_weights_that_were_prefetched_for_no_forward_pass_are_exported(tmp_path: Path) -> None:
    """At ZeRO 3, generation ends while weights of the next forward pass are under way."""
    small = ("stage3_prefetch_bucket_size=auto", "stage3_param_persistence_threshold=auto")
    overrides = ["deepspeed=configs/deepspeed/zero3.json", *(f"deepspeed.zero_optimization.{one}" for one in small)]
    result = run_tiny(1, tmp_path / "run", *overrides)
    assert result["code"] == 0, result["printed"]
    assert result["same_names"] and result["different"] == []
