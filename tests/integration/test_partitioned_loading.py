"""At ZeRO 3, the launcher loads each rank's part of a model, with the same results as if each rank had all of it."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import large, tiny
from tests.support.device_memory import skip_on_a_device
from tests.support.pairwise import others_slow
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def load(folder: str, dtype: str, partitioned: Any, say: Any = lambda _: None, **settings: Any) -> Any:
    """The model of a folder, as the launcher loads it at ZeRO 3, or whole."""
    from hift_ds.launch.model import loading
    from hift_ds.launch.model.settings import ModelSettings
    from hift_ds.launch.model.tokenizer import byte_tokenizer

    chosen = ModelSettings(name_or_path=folder, tokenizer="byte", **settings)
    config = loading.load_config(chosen, byte_tokenizer(), say=lambda _: None)
    torch.manual_seed(0)
    return loading.load_model(chosen, config, DTYPES[dtype], say, partitioned=partitioned)


def new_loading(dtype: str, waiting: str = "device") -> Any:
    from hift_ds.launch.model.partitioned import PartitionedLoading

    return PartitionedLoading(tiny.ds_config(Case(3, dtype=dtype, waiting=waiting), stock=True))


# --- memory -----------------------------------------------------------------------------------------


def loading_memory(folder: str, dtype: str) -> tuple[int, int]:
    """In a rank: by how much anonymous memory grows at most while the model is loaded, and in the end."""
    from hift_ds.evaluation.cost.process_memory import anonymous, peak_memory

    load(folder, dtype, new_loading(dtype))  # the memory of libraries, which another model does not need
    with peak_memory() as peak:
        before = anonymous()
        model = load(folder, dtype, new_loading(dtype))
        with peak_memory():  # returns what is freed
            after = anonymous()
    del model
    return peak.above, after - before


@pytest.mark.parametrize(
    ("saved", "dtype"), others_slow([(s, d) for s in DTYPES for d in DTYPES], [("fp32", "bf16")]), ids=str
)
def test_the_ranks_of_a_node_have_the_model_once(saved: str, dtype: str, tmp_path: Path) -> None:
    skip_on_a_device()
    numel = large.save(tmp_path / "model", 768, 20, getattr(torch, DTYPES[saved]), shards="40MB")
    size = numel * getattr(torch, DTYPES[dtype]).itemsize
    found = run_on_ranks(2, loading_memory, str(tmp_path / "model"), dtype)
    print(size, found)
    assert sum(peak for peak, _ in found) <= 1.1 * size
    assert 0.98 * size <= sum(after for _, after in found) <= 1.02 * size


def device_peaks(case: Case, folder: str) -> dict[str, float]:
    """In a rank: the most that is on the device while the model is loaded and trained, and exported; 1 is the model."""
    from deepspeed.runtime.zero.partition_parameters import Init
    from transformers import core_model_loading

    import hift_ds
    from hift_ds.launch.model.partitioned import PartitionedLoading
    from hift_ds.launch.model.tokenizer import byte_tokenizer
    from hift_ds.launch.runtime import export
    from hift_ds.zero.gathering import Gathering
    from tests.support.device_memory import DeviceMemory

    config = tiny.ds_config(case)
    section = config.pop("hift")
    if case.waiting == "device":  # DeepSpeed's own limits are above the size of this model
        limits = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        config["zero_optimization"] |= {f"stage3_{name}": 50_000 for name in limits}
    memory, found = DeviceMemory(), {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory)
        stack.enter_context(memory.placed_on_host(core_model_loading, "_materialize_copy"))
        stack.enter_context(memory.placed_on_host(export, "scratch"))
        stack.enter_context(memory.labels("gathered", Gathering, "start"))
        if case.waiting == "cpu":
            stack.enter_context(memory.placed_on_host(Init, "_partition_param"))
        llama = load(folder, case.dtype, PartitionedLoading(config)).train()
        size = sum(parameter.ds_numel * parameter.element_size() for parameter in llama.parameters())
        found["loading"] = memory.peak["total"] / size
        engine = hift_ds.initialize(model=llama, config={**config, "hift": section})[0]
        stack.callback(engine.destroy)
        found["engine"] = memory.peak["total"] / size
        for step in range(2 * tiny.ACCUMULATION):
            with memory.labelled("activations"):
                engine.backward(engine(**tiny.micro_batch(step, 0)).loss)
            engine.step()
        found["training"] = (memory.peak["total"] - memory.peak["activations"]) / size
        engine.empty_partition_cache()
        memory.reset()
        export.export_model(engine, byte_tokenizer(), Path(folder) / "trained", None, max_shard_size="300KB")
        found["export"] = memory.peak["total"] / size
    return found


@pytest.mark.parametrize("waiting", ["device", pytest.param("cpu", marks=pytest.mark.slow)])
def test_no_device_has_the_model(waiting: str, tmp_path: Path) -> None:
    large.save(tmp_path / "model", 64, 40, torch.float32, shards="1MB")
    case = Case(3, ranks=2, dtype="bf16", waiting=waiting)
    for found in run_on_ranks(2, device_peaks, case, str(tmp_path / "model")):
        print(found)
        own = 0.5 if waiting == "device" else 0.0
        assert found["loading"] <= own + 0.05
        assert found["engine"] <= own + 0.25 and found["training"] <= own + 0.4
        assert found["export"] <= own + 0.1


# --- the same model ---------------------------------------------------------------------------------


def llama(folder: Path, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def tied_llama(folder: Path) -> None:
    llama(folder, tied=True)


def mixtral(folder: Path) -> None:
    """Files have the experts one by one, the model has them in one tensor."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    MixtralForCausalLM(config).save_pretrained(folder)


def gpt2(folder: Path) -> None:
    """Tied, saved by torch with both names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def untied_by_its_files(folder: Path) -> None:
    """The configuration ties the head, but the files have another one."""
    llama(folder, tied=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def bert(folder: Path) -> None:
    """Without a classification head."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    BertModel(config).save_pretrained(folder)


def other_classes(folder: Path) -> None:
    """With a head for another number of classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=5, **sizes)).save_pretrained(folder)


def wrapped(folder: Path) -> None:
    """With names of a compiled model, and a value that is not finite."""
    from safetensors.torch import save_file

    model = llama(folder)
    for path in folder.glob("model*"):
        path.unlink()
    state = {f"_orig_mod.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    state["_orig_mod.model.norm.weight"][3] = torch.inf
    save_file(state, folder / "model.safetensors", {"format": "pt"})


CLASSES = {"task": "sequence-classification", "num_labels": 3}
MODELS: dict[Any, dict[str, Any]] = {
    llama: {},
    tied_llama: {},
    mixtral: {},
    gpt2: {},
    untied_by_its_files: {},
    bert: CLASSES,
    other_classes: CLASSES,
    wrapped: {},
}


def both_ways(folder: str, dtype: str, waiting: str, settings: dict[str, Any]) -> list[str]:
    """In a rank: what differs between the model that was loaded in parts and the whole one."""
    import deepspeed

    notes: list[list[str]] = [[], []]
    drawn = []
    ours = load(folder, dtype, loading := new_loading(dtype, waiting), notes[0].append, **settings)
    drawn.append(torch.rand(1).item())
    whole = load(folder, dtype, None, notes[1].append, **settings)
    drawn.append(torch.rand(1).item())
    found = [] if notes[0] == notes[1] else [f"said {notes[0]} instead of {notes[1]}"]
    if drawn[0] != drawn[1]:
        found.append("the generator of random numbers is elsewhere")
    parts, wanted = dict(ours.named_parameters()), dict(whole.named_parameters())
    if list(parts) != list(wanted) or list(loading.checksums) != list(wanted):
        return [*found, f"names {sorted(parts.keys() ^ wanted.keys())}"]
    for name, part in parts.items():
        if part.numel() or part.ds_tensor.numel() != -(-wanted[name].numel() // 2):
            found.append(f"{name} is not partitioned")
        with deepspeed.zero.GatheredParameters([part]):
            same = part.shape == wanted[name].shape and torch.equal(part, wanted[name].to(part.dtype))
            if not same or part.dtype != tiny.DTYPES[dtype] or part.requires_grad != wanted[name].requires_grad:
                found.append(name)
    tied = [list(dict(model.named_parameters(remove_duplicate=False))) for model in (ours, whole)]
    found += ["tied weights"] if tied[0] != tied[1] else []
    buffers = dict(ours.named_buffers())
    found += [name for name, buffer in whole.named_buffers() if not torch.equal(buffers[name], buffer)]
    for attribute in ("config", "generation_config", "all_tied_weights_keys", "training"):
        if str(getattr(ours, attribute, None)) != str(getattr(whole, attribute, None)):
            found.append(attribute)
    if str(getattr(ours, "_weight_conversions", None)) != str(getattr(whole, "_weight_conversions", None)):
        found.append("conversions of weights")
    return found


@pytest.mark.parametrize(
    ("make", "dtype"),
    others_slow([(make, dtype) for make in MODELS for dtype in DTYPES], [(make, "bf16") for make in MODELS]),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_model_in_parts_is_the_whole_one(make: Any, dtype: str, tmp_path: Path) -> None:
    tmp_path.joinpath("model").mkdir()
    make(tmp_path / "model")
    waiting = "cpu" if dtype == "fp32" else "device"
    for found in run_on_ranks(2, both_ways, str(tmp_path / "model"), dtype, waiting, MODELS[make]):
        assert found == []


def reached(folder: str) -> list[str]:
    """In a rank: what differs in a forward pass of the model in parts, one of whose layers is not used."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from hift_ds.model.reach import unreached_by_example
    from hift_ds.zero.partitioning import gathered_in_turn

    results = []
    for partitioned in (new_loading("bf16"), None):
        model = load(folder, "bf16", partitioned)
        model.unused = model.model.layers[1]
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
        batch = {"input_ids": torch.arange(12).view(1, 12)}
        with gathered_in_turn(model):
            results.append((unreached_by_example(model, batch), model.eval()(**batch).logits.detach()))
        left = [p for p in model.parameters() if getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE]
        assert not left
    (names, logits), (true_names, true_logits) = results
    found = [] if torch.equal(logits, true_logits) else ["logits"]
    return found + ([] if names == true_names and len(names) == 9 else [f"unreached: {names}, not {true_names}"])


def test_modules_gather_their_weights_in_turn(tmp_path: Path) -> None:
    tmp_path.joinpath("model").mkdir()
    tied_llama(tmp_path / "model")
    assert run_on_ranks(2, reached, str(tmp_path / "model")) == [[], []]


def test_other_files_on_a_rank_are_noticed(tmp_path: Path) -> None:
    folders = []
    for name, change in (("ours", 0.0), ("theirs", 1e-3)):
        tmp_path.joinpath(name).mkdir()
        model = llama(tmp_path / name)
        with torch.no_grad():
            model.model.norm.weight[0] += change
        model.save_pretrained(tmp_path / name)
        folders.append(str(tmp_path / name))
    first, second = run_on_ranks(2, own_checksums, folders)
    assert [name for name in first if first[name] != second[name]] == ["model.norm.weight"]


def own_checksums(folders: list[str]) -> dict[str, int]:
    """In a rank: the checksums of what it has read."""
    from deepspeed import comm as dist

    loading = new_loading("fp32")
    load(folders[dist.get_rank()], "fp32", loading)
    return loading.checksums
