"""Models that are made inside ``deepspeed.zero.Init`` train as whole models do, bit for bit."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from hift_ds.blocks.partition import partition_model
from tests.support import tiny
from tests.support.pairwise import others_slow
from tests.support.parity import FINER
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


def partitioned(case: Case) -> Any:
    """In a rank: the model of a case, made inside ``zero.Init``; no rank has it whole."""
    import deepspeed
    from transformers import LlamaForCausalLM

    whole = tiny.model(case.dtype, case.tied)
    with deepspeed.zero.Init(config_dict_or_path=tiny.ds_config(case, stock=True)):
        llama = LlamaForCausalLM(whole.config)
    values = dict(whole.named_parameters())
    for name, parameter in llama.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(values[name])
    for (path, buffer), (_, true) in zip(llama.named_buffers(), whole.named_buffers(), strict=True):
        module, _, name = path.rpartition(".")  # the context rounds the frequencies of positions to 16 bits
        llama.get_submodule(module).register_buffer(name, true.to(buffer.device), persistent=False)
    return llama.train()


def from_files(case: Case, folder: str) -> Any:
    """In a rank: the model of a case, loaded as transformers loads models at ZeRO 3, such as for its Trainer."""
    from deepspeed import comm as dist
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    if dist.get_rank() == 0:
        tiny.model(case.dtype, case.tied).save_pretrained(folder)
    dist.barrier()
    config = HfDeepSpeedConfig(tiny.ds_config(case, stock=True))  # transformers has a weak reference to it
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=tiny.DTYPES[case.dtype])
    del config
    assert all(hasattr(parameter, "ds_id") for parameter in llama.parameters())
    return llama.train()


def run(case: Case, how: str, folder: str) -> dict[str, Any]:
    """In a rank: training, a checkpoint that is loaded again, training, and the export."""
    from transformers import LlamaForCausalLM

    from hift_ds.launch.model.tokenizer import byte_tokenizer
    from hift_ds.launch.runtime.export import export_model

    llama: Any = tiny.model(case.dtype, case.tied)
    if how != "whole":
        llama = partitioned(case) if how == "zero.Init" else from_files(case, folder + "/start")
    blocks = [vars(block) for block in partition_model(llama, case.layers_per_block, (), case.max_block_numel)]
    frozen = [llama.model.layers[1].mlp.up_proj.weight, llama.model.norm.weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with contextlib.ExitStack() as stack:
        engine = tiny.initialize(case, llama=llama)
        stack.callback(engine.destroy)
        losses = [loss for step in range(case.steps) for loss in tiny.optimizer_step(engine, step)]
        engine.save_checkpoint(folder, tag="middle")
        for step in range(2):
            tiny.optimizer_step(engine, step)
        engine.load_checkpoint(folder, tag="middle")
        losses += [loss for step in range(2) for loss in tiny.optimizer_step(engine, step)]
        export_model(engine, byte_tokenizer(), Path(folder) / "model", None)
        exported = LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype="auto").state_dict()
        return {
            "blocks": blocks,
            "losses": losses,
            "weights": tiny.weights(engine),
            "states": tiny.block_states(engine),
            "ledger": {peak: engine.memory_ledger(peak) for peak in (False, True)},
            "exported": tiny.copies(exported),
        }


def differences(case: Case, how: str, folder: str) -> list[str]:
    """In a rank: what differs between the model that no rank has whole and the whole one."""
    ours, truth = run(case, how, folder + "/ours"), run(case, "whole", folder + "/truth")
    found = [key for key in ("blocks", "losses", "ledger") if ours[key] != truth[key]]
    found += [key for key in ("weights", "exported") if not tiny.identical(ours[key], truth[key])]
    pairs = zip(ours["states"], truth["states"], strict=True)
    return found + [f"state of block {n}" for n, pair in enumerate(pairs) if not tiny.identical(*pair)]


CASES = [
    (Case(3, ranks=ranks, dtype=dtype, waiting=waiting, cycles=1, **options), how)
    for ranks in (1, 2)
    for dtype in ("fp32", "bf16", "fp16")
    for waiting in ("device", "cpu")
    for options in ({}, {"tied": True, "layers_per_block": 2}, {"max_block_numel": FINER})
    for how in ("zero.Init", "from_pretrained")
]
SAMPLE = [(Case(3, cycles=1), "zero.Init")] + [
    (Case(3, ranks=2, dtype="bf16", waiting="cpu", cycles=1, tied=True, layers_per_block=2), "from_pretrained")
]


@pytest.mark.parametrize(("case", "how"), others_slow(CASES, SAMPLE), ids=str)
def test_a_model_that_no_rank_has_whole_trains_as_a_whole_one(case: Case, how: str, tmp_path: Path) -> None:
    for found in run_on_ranks(case.ranks, differences, case, how, str(tmp_path)):
        assert found == []


def refusal(made: Case, trained: Case) -> str:
    """In a rank: what the engine says about a model that was made with another config."""
    with pytest.raises(ValueError) as caught:
        tiny.initialize(trained, llama=partitioned(made))
    return str(caught.value)


def test_a_model_that_was_made_with_another_config_is_refused() -> None:
    (stage,) = run_on_ranks(1, refusal, Case(3), Case(2))
    assert "zero_optimization.stage=2" in stage and "set stage=3" in stage
    (dtype,) = run_on_ranks(1, refusal, Case(3, dtype="bf16"), Case(3))
    assert "39 parameters, such as model.embed_tokens.weight, in bfloat16" in dtype and "trains in float32" in dtype


def other_placement(made: Case, trained: Case) -> bool:
    """In a rank: whether the weights may wait elsewhere than where the context has put them."""
    ends = []
    for llama in (partitioned(made), tiny.model(trained.dtype)):
        engine = tiny.initialize(trained, llama=llama)
        losses = [tiny.optimizer_step(engine, step) for step in range(3)]
        ends.append((losses, tiny.weights(engine), engine.memory_ledger()))
        engine.destroy()
    (losses, weights, ledger), (true_losses, true_weights, true_ledger) = ends
    return losses == true_losses and tiny.identical(weights, true_weights) and ledger == true_ledger


@pytest.mark.parametrize("waiting", ["device", pytest.param("cpu", marks=pytest.mark.slow)])
def test_the_engine_moves_weights_to_where_its_config_says(waiting: str) -> None:
    other = {"device": "cpu", "cpu": "device"}[waiting]
    made, trained = (Case(3, ranks=2, dtype="bf16", waiting=place) for place in (other, waiting))
    assert all(run_on_ranks(2, other_placement, made, trained))
