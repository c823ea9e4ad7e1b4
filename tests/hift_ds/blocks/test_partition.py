"""Blocks: found in every architecture as an expert would cut it, sized as in the paper, and nothing ever lost."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hift_ds.blocks.block import Block
from hift_ds.blocks.partition import check_each_in_one_block, frozen_parameter_names, partition_model
from tests.support.architectures import ARCHITECTURES, Architecture


def build(model_type: str, task: str = "CausalLM", **config: Any) -> nn.Module:
    auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
    with torch.device("meta"):
        return auto.from_config(transformers.AutoConfig.for_model(model_type, **config))


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def below(path: str, names: list[str]) -> list[str]:
    return [name for name in names if name == path or name.startswith(path + ".")]


def names_of(blocks: list[Block]) -> list[str]:
    return [block.name for block in blocks]


def assert_each_once(model: nn.Module, blocks: list[Block]) -> None:
    """Every trainable parameter in exactly one block, in model order, and counted right."""
    expected = trainable(model)
    found = [name for block in blocks for name in block.parameter_names]
    assert sorted(found) == sorted(expected)
    parameters = dict(model.named_parameters())
    for block in blocks:
        assert block.parameter_names and list(block.parameter_names) == below_order(expected, block)
        assert block.numel == sum(parameters[name].numel() for name in block.parameter_names)
        assert dict(block.slices) == {}


def below_order(model_order: list[str], block: Block) -> list[str]:
    members = set(block.parameter_names)
    return [name for name in model_order if name in members]


# --- any architecture ---------------------------------------------------------------------------------------


def test_architectures_are_many_and_distinct() -> None:
    assert len({a.model_type for a in ARCHITECTURES}) >= 100
    assert len({str(a) for a in ARCHITECTURES}) == len(ARCHITECTURES) - 1  # llama twice, once tied


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_architecture(architecture: Architecture) -> None:
    model = build(architecture.model_type, architecture.task, **architecture.config)
    blocks = partition_model(model)
    names = trainable(model)
    assert_each_once(model, blocks)

    ends = {"embeddings": architecture.embeddings.split(), "head": architecture.head.split()}
    hidden = [block for block in blocks if block.name not in ends]
    assert len(hidden) == architecture.hidden, names_of(blocks)
    assert names_of(blocks) == [
        *(["embeddings"] if ends["embeddings"] else []),
        *(block.name for block in hidden),
        *(["head"] if ends["head"] else []),
    ]
    for end, paths in ends.items():
        expected = set()
        for path in paths:
            assert below(path, names), f"the table's {path} has no trainable parameter"
            expected |= set(below(path, names))
        assert {name for b in blocks if b.name == end for name in b.parameter_names} == expected, end

    # Each hidden block is one module of a list, in the order of the model, with nothing of another layer.
    modules = list(dict(model.named_modules()))
    positions = [modules.index(block.name) for block in hidden]
    assert positions == sorted(set(positions))
    for block in hidden:
        assert block.name.rpartition(".")[2].isdigit()
        for other in hidden:
            assert other is block or not below(other.name, list(block.parameter_names))
    for path, layer in architecture.attached.items():
        moved = below(path, names)
        assert moved and set(moved) <= {n for b in hidden if b.name == layer for n in b.parameter_names}

    # Token, position and type embeddings that are no part of a layer are in the first block.
    inside = tuple(block.name + "." for block in hidden)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not f"{path}.".startswith(inside) and f"{path}.weight" in names:
            assert f"{path}.weight" in blocks[0].parameter_names


# --- the paper's numbers ------------------------------------------------------------------------------------

# Tables 3 and 6 to 9: parameters in M (all, and the most that one step trains) and MiB of fp32 gradients of a step.
PAPER: dict[str, tuple[Any, ...]] = {
    "roberta-base": (
        ("roberta", "SequenceClassification"),
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        14, 124.65, 39.00, 148.77, "embeddings",
    ),
    "roberta-large": (
        ("roberta", "SequenceClassification"),
        {
            "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "hidden_size": 1024,
            "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        },
        26, 355.36, 52.00, 198.38, "embeddings",
    ),
    "gpt2-large": (
        ("gpt2", "CausalLM"), {"n_embd": 1280, "n_layer": 36, "n_head": 20}, 38, 774.03, 65.64, 250.40, "embeddings",
    ),
    "gpt-neo-2.7b": (
        ("gpt_neo", "CausalLM"),
        {"hidden_size": 2560, "num_layers": 32, "num_heads": 20, "attention_types": [[["global", "local"], 16]]},
        34, 2651.31, 133.90, 510.79, "embeddings",
    ),
    "llama-7b": (
        ("llama", "CausalLM"),
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        34, 6738.42, 202.38, 772.03, "model.layers.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_largest_block_is_the_papers(name: str) -> None:
    (model_type, task), config, n, total, largest, gradients, where = PAPER[name]
    blocks = partition_model(build(model_type, task, **config))
    assert len(blocks) == n
    assert round(sum(block.numel for block in blocks) / 1e6, 2) == total
    biggest = max(blocks, key=lambda block: block.numel)
    assert biggest.name == where
    assert round(biggest.numel / 1e6, 2) == largest
    assert round(biggest.numel * 4 / 2**20, 2) == pytest.approx(gradients, abs=0.01)


# --- the cut ------------------------------------------------------------------------------------------------


@cache
def llama(layers: int = 5, tied: bool = False) -> nn.Module:
    """n = 7 layers. Shared by tests, which copy it before they change it."""
    return build("llama", num_hidden_layers=layers, hidden_size=32, vocab_size=64, tie_word_embeddings=tied)


@pytest.mark.parametrize(
    ("m", "names"),
    [
        (1, ["embeddings", *(f"model.layers.{i}" for i in range(5)), "head"]),
        (2, ["embeddings + model.layers.0", "model.layers.1-2", "model.layers.3-4", "head"]),
        (3, ["embeddings + model.layers.0-1", "model.layers.2-4", "head"]),
        (4, ["embeddings + model.layers.0-2", "model.layers.3-4 + head"]),
        (7, ["embeddings + model.layers.0-4 + head"]),
    ],
)
def test_m_consecutive_layers_are_a_block(m: int, names: list[str]) -> None:
    blocks = partition_model(llama(), layers_per_block=m)
    assert names_of(blocks) == names
    assert len(blocks) == -(-7 // m)
    assert_each_once(llama(), blocks)
    single = partition_model(llama())
    for index, block in enumerate(blocks):
        members = {name for one in single[index * m : index * m + m] for name in one.parameter_names}
        assert set(block.parameter_names) == members


def test_names_across_stacks_and_gaps() -> None:
    t5 = build("t5", "Seq2SeqLM", num_layers=3, num_decoder_layers=2)
    assert names_of(partition_model(t5, 3)) == [
        "embeddings + encoder.block.0-1",
        "encoder.block.2 + decoder.block.0-1",
        "head",
    ]
    frozen = partition_model(llama(), 3, freeze=["model.layers.1.*"])
    assert names_of(frozen) == ["embeddings + model.layers.0 + model.layers.2", "model.layers.3-4 + head"]


@pytest.mark.parametrize("m", [0, -1, 8, True, False, 1.0, 2.5, "2", None])
def test_layers_per_block_out_of_range(m: Any) -> None:
    with pytest.raises(ValueError, match=r"layers_per_block=.*from 1 to 7") as error:
        partition_model(llama(), layers_per_block=m)
    assert repr(m) in str(error.value)


# --- what is not trained ------------------------------------------------------------------------------------


def test_freeze() -> None:
    model = llama()
    blocks = partition_model(model, freeze=["model.embed_tokens.weight", "*norm.weight"])
    assert names_of(blocks) == [*(f"model.layers.{i}" for i in range(5)), "head"]
    assert blocks[-1].parameter_names == ("lm_head.weight",)
    frozen = frozen_parameter_names(model, blocks)
    assert len(frozen) == 1 + 2 * 5 + 1 and all("norm" in name or "embed" in name for name in frozen)
    in_blocks = {name for block in blocks for name in block.parameter_names}
    assert sorted(frozen + list(in_blocks)) == sorted(name for name, _ in model.named_parameters())
    assert frozen_parameter_names(model, partition_model(model)) == []


def test_layers_without_anything_to_train_are_dropped_before_the_cut() -> None:
    freeze = ["model.embed*", "model.layers.0.*", "model.layers.1.*"]
    assert names_of(partition_model(llama(), 2, freeze)) == ["model.layers.2-3", "model.layers.4 + head"]
    with pytest.raises(ValueError, match="from 1 to 4"):
        partition_model(llama(), 5, freeze)


def test_freeze_that_matches_nothing() -> None:
    with pytest.raises(ValueError) as error:
        partition_model(llama(), freeze=["model.embed_token.weight", "*.bias", "lm_head.weight"])
    message = str(error.value)
    assert "'model.embed_token.weight'" in message and "model.embed_tokens.weight" in message
    assert "'*.bias'" in message and "'lm_head.weight'" not in message


def test_freeze_of_a_tied_name_says_which_parameter_it_is() -> None:
    with pytest.raises(ValueError, match=r"'lm_head\.\*' .*model\.embed_tokens\.weight"):
        partition_model(llama(tied=True), freeze=["lm_head.*"])


@pytest.mark.parametrize("freeze", ["lm_head.*", [1], None])
def test_freeze_that_is_no_list_of_patterns(freeze: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of patterns"):
        partition_model(llama(), freeze=freeze)


def test_nothing_left_to_train() -> None:
    with pytest.raises(ValueError, match="nothing is left to train"):
        partition_model(llama(), freeze=["*"])


def test_parameters_frozen_by_the_user() -> None:
    model = copy.deepcopy(llama())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name or name == "lm_head.weight")
    blocks = partition_model(model)
    assert names_of(blocks) == ["model.layers.2", "head"]
    assert_each_once(model, blocks)
    assert len(frozen_parameter_names(model, blocks)) == 1 + 4 * 9 + 1


# --- wrapped, tied, shared, partitioned ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_lora() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("roberta", "SequenceClassification", num_hidden_layers=3, hidden_size=32, num_attention_heads=4)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    with torch.device("meta"):
        wrapped = get_peft_model(model, config)
    blocks = partition_model(wrapped)
    prefix = "base_model.model.roberta.encoder.layer"
    assert names_of(blocks) == [f"{prefix}.0", f"{prefix}.1", f"{prefix}.2", "head"]
    assert all("lora_" in name for block in blocks[:-1] for name in block.parameter_names)
    assert all("modules_to_save" in name for name in blocks[-1].parameter_names)
    assert_each_once(wrapped, blocks)

    for parameter in wrapped.parameters():
        parameter.requires_grad_(True)
    assert names_of(partition_model(wrapped)) == ["embeddings", *names_of(blocks)]


def test_any_prefix() -> None:
    class Wrapper(nn.Module):  # as DistributedDataParallel names it
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain = partition_model(llama(), 3)
    wrapped = partition_model(Wrapper(Wrapper(llama())), 3)
    prefix = "module.module."
    assert names_of(wrapped) == [f"embeddings + {prefix}model.layers.0-1", f"{prefix}model.layers.2-4", "head"]
    for one, other in zip(plain, wrapped, strict=True):
        assert tuple(prefix + name for name in one.parameter_names) == other.parameter_names


def test_tied_weight_is_in_the_embeddings_once() -> None:
    blocks = partition_model(llama(tied=True))
    assert blocks[0].parameter_names == ("model.embed_tokens.weight",)
    assert blocks[-1].parameter_names == ("model.norm.weight",)
    # XLM-RoBERTa registers its head first, so that the shared weight bears the head's name.
    blocks = partition_model(build("xlm-roberta", "CausalLM", num_hidden_layers=2))
    assert "lm_head.decoder.weight" in blocks[0].parameter_names
    assert "lm_head.dense.weight" in blocks[-1].parameter_names


def test_parameters_partitioned_by_zero_3() -> None:
    model = build("qwen3_moe", num_hidden_layers=2)
    whole = partition_model(model)
    for parameter in model.parameters():
        vars(parameter).update(ds_shape=parameter.shape, ds_numel=parameter.numel())
        parameter.data = torch.empty(0, device="meta")
    assert partition_model(model) == whole


def test_model_is_left_as_it_was() -> None:
    model = build("gpt2", n_layer=2, n_embd=32, n_head=2)
    before = [(name, id(p), p.requires_grad, p.device.type) for name, p in model.named_parameters()]
    assert partition_model(model, 2, ["*.bias"]) == partition_model(model, 2, ["*.bias"])
    assert [(name, id(p), p.requires_grad, p.device.type) for name, p in model.named_parameters()] == before


def test_block_is_a_value() -> None:
    block = Block("head", ("lm_head.weight",), 4)
    assert block == Block("head", ("lm_head.weight",), 4) and len({block, copy.deepcopy(block)}) == 1
    with pytest.raises(AttributeError):
        block.numel = 5  # type: ignore[misc]


# --- models that are not from transformers -------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.feed = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()


class Stack(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(4, 9)  # registered first on purpose
        self.embed = nn.Embedding(9, 4)
        self.layers = layers
        self.ln_f = nn.LayerNorm(4)


def split(model: nn.Module) -> dict[str, set[str]]:
    blocks = partition_model(model)
    assert_each_once(model, blocks)
    return {block.name: {name.rpartition(".")[0] or name for name in block.parameter_names} for block in blocks}


def test_plain_stack() -> None:
    cut = split(Stack(nn.ModuleList(Layer() for _ in range(2))))
    assert list(cut) == ["embeddings", "layers.0", "layers.1", "head"]
    assert cut["embeddings"] == {"embed"} and cut["head"] == {"head", "ln_f"}


def test_layers_without_norms() -> None:
    assert list(split(Stack(nn.ModuleList([Layer(norm=False)] * 1 + [Layer(norm=False)])))) == [
        "embeddings", "layers.0", "layers.1", "head",
    ]  # fmt: skip


def test_sequential_model() -> None:
    cut = split(nn.Sequential(nn.Embedding(9, 4), Layer(), Layer(), nn.LayerNorm(4), nn.Linear(4, 9)))
    assert cut == {
        "embeddings": {"0"}, "1": {"1.mix", "1.feed", "1.norm"}, "2": {"2.mix", "2.feed", "2.norm"}, "head": {"3", "4"},
    }  # fmt: skip
    blocks = partition_model(nn.Sequential(nn.Embedding(9, 4), Layer(), Layer()), 2)
    assert names_of(blocks) == ["embeddings + 1", "2"]


def test_model_inside_a_sequential() -> None:
    """As sentence-transformers nests it: the encoder is the first step of a pipeline, not a layer."""
    encoder = build("bert", "", num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    with torch.device("meta"):
        cut = split(nn.Sequential(nn.ModuleDict({"auto_model": encoder}), nn.Linear(32, 4)))
    assert list(cut) == ["embeddings", "0.auto_model.encoder.layer.0", "0.auto_model.encoder.layer.1", "head"]
    assert cut["head"] == {"0.auto_model.pooler.dense", "1"}


def test_one_layer_used_many_times_and_under_two_paths() -> None:
    layer = Layer()
    model = Stack(nn.ModuleList([layer, layer, Layer()]))
    model.helper = nn.ModuleDict({"alias": model.layers})
    cut = split(model)
    assert list(cut) == ["embeddings", "layers.0", "layers.2", "head"]
    assert cut["head"] == {"head", "ln_f"}


def test_class_decides_before_name_and_order() -> None:
    model = Stack(nn.ModuleList(Layer() for _ in range(2)))
    model.lookup = nn.Embedding(9, 4)
    model.final = nn.ModuleDict({"lookup": nn.Embedding(9, 4), "linear": nn.Linear(4, 4)})
    cut = split(model)
    assert cut["embeddings"] == {"embed", "lookup", "final.lookup"}
    assert cut["head"] == {"head", "ln_f", "final.linear"}


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)


def test_layers_inside_layers_stay_whole() -> None:
    layers = nn.ModuleList(Layer() for _ in range(2))
    for layer in layers:
        layer.attention = nn.Linear(4, 4)
        layer.extras = nn.ModuleList(Part() for _ in range(3))
    assert list(split(Stack(layers))) == ["embeddings", "layers.0", "layers.1", "head"]


def test_layers_of_stages_are_the_layers() -> None:
    stages = nn.ModuleList(
        nn.ModuleDict({"down": nn.Linear(4, 4), "blocks": nn.ModuleList([Part()])}) for _ in range(2)
    )
    cut = split(Stack(stages))
    assert list(cut) == ["embeddings", "layers.0.blocks.0", "layers.1.blocks.0", "head"]
    assert "layers.0.down" in cut["embeddings"] and "layers.1.down" in cut["layers.1.blocks.0"]


def test_weight_norm_makes_no_layer() -> None:
    def convolutions() -> nn.Module:
        weight_norm = nn.utils.parametrizations.weight_norm
        return nn.Sequential(*(nn.ModuleDict({"a": weight_norm(nn.Conv1d(4, 4, 1))}) for _ in range(2)))

    model = Stack(nn.ModuleList(Layer() for _ in range(2)))
    model.vocoder = convolutions()
    assert list(split(model)) == ["embeddings", "layers.0", "layers.1", "head"]


def no_list() -> nn.Module:
    model = nn.Module()
    model.embed, model.attention, model.norm = nn.Embedding(9, 4), nn.MultiheadAttention(4, 1), nn.LayerNorm(4)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 4), nn.LayerNorm(4), nn.Linear(4, 9)),
        no_list,
        nn.Identity,
    ],
)
def test_no_layers_to_be_found(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"no hidden layers found in \w+: expected, .* nn\.ModuleList"):
        partition_model(make())


# --- nothing is lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("prefix_tokens", "embeddings"),
        ("mask_emb", "embeddings"),
        ("anything", "embeddings"),
        ("logit_scale", "head"),
        ("output_bias", "head"),
        ("temperature", "head"),
    ],
)
def test_orphan_parameter_of_the_root(name: str, end: str) -> None:
    model = copy.deepcopy(llama())
    model.register_parameter(name, nn.Parameter(torch.empty(3, device="meta")))
    blocks = partition_model(model)
    assert_each_once(model, blocks)
    assert [block.name for block in blocks if name in block.parameter_names] == [end]


@pytest.mark.parametrize("seed", range(40))
def test_every_parameter_has_one_block_wherever_it_is(seed: int) -> None:
    """Random orphans and random frozen parameters anywhere in random architectures."""
    rng = random.Random(seed)
    architecture = rng.choice(ARCHITECTURES)
    model = build(architecture.model_type, architecture.task, **architecture.config)
    model.requires_grad_(True)
    hidden = set(names_of(partition_model(model))) - {"embeddings", "head"}
    # Not on a bare element of a list (a linear of a head's Sequential): with a norm and matrices it is a layer.
    hosts = [
        module
        for path, module in model.named_modules()
        if next(module.children(), None) is not None
        and not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
        and (path.startswith(tuple(hidden)) or not any(part.isdigit() for part in path.split(".")))
    ]
    words = ["norm", "embed", "head", "proj", "final", "out", "pos", "pre", "x", "projector", "tower", "token"]
    for index in range(12):
        host, name = rng.choice(hosts), "_".join(rng.sample(words, rng.randint(1, 2))) + str(index)
        with torch.device("meta"):
            kinds: list[Callable[[], Any]] = [
                lambda: nn.Parameter(torch.empty(2)),
                lambda: nn.Linear(2, 2),
                lambda: nn.LayerNorm(2),
                lambda: nn.Embedding(2, 2),
                lambda: nn.ModuleList([nn.Linear(2, 2), nn.RMSNorm(2)]),
            ]
            setattr(host, name, rng.choice(kinds)())
    for parameter in model.parameters():
        if rng.random() < 0.2:
            parameter.requires_grad_(False)
    layers = partition_model(model)
    assert_each_once(model, layers)
    m = rng.randint(1, min(4, len(layers)))
    blocks = partition_model(model, layers_per_block=m)
    assert_each_once(model, blocks)
    assert len(blocks) == -(-len(layers) // m)
    found = set(names_of(layers)) - {"embeddings", "head"}
    assert found <= hidden  # an orphan never makes a layer


def test_a_parameter_in_no_block_or_in_two_is_an_error() -> None:
    one = Block("head", ("a", "b"), 2)
    with pytest.raises(ValueError, match="not in exactly one block: c$"):
        check_each_in_one_block(["a", "b", "c"], [one])
    with pytest.raises(ValueError, match="not in exactly one block: b$"):
        check_each_in_one_block(["a", "b"], [one, Block("x", ("b",), 1)])
