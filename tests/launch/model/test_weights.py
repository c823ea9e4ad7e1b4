"""Weights that are not the model's are refused by name; wrappers' names are taken off; a new head is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hift_ds.launch.errors import UserError
from hift_ds.launch.model import loading
from hift_ds.launch.model.settings import ModelSettings
from hift_ds.launch.model.tokenizer import byte_tokenizer

Weights = dict[str, torch.Tensor]
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 262}
MODELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, "llama", SIZE),
    "tied": (AutoModelForCausalLM, "llama", {**SIZE, "tie_word_embeddings": True}),
    "mixtral": (AutoModelForCausalLM, "mixtral", {**SIZE, "num_key_value_heads": 2, "num_local_experts": 2}),
    "masked": (AutoModelForMaskedLM, "bert", SIZE),
    "three": (AutoModelForSequenceClassification, "bert", {**SIZE, "num_labels": 3}),
}
CLASSIFY = "sequence-classification"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, (auto, kind, keys) in MODELS.items():
        torch.manual_seed(1)
        auto.from_config(AutoConfig.for_model(kind, pad_token_id=0, **keys)).save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies a model, after `change` of its tensors and `config` keys."""

    def make(name: str, change: Callable[[Weights], Weights] = dict, binary: bool = False, **config: Any) -> Path:
        folder = shutil.copytree(originals[name], tmp_path / "model")
        path = folder / "model.safetensors"
        weights = change(load_file(path))
        path.unlink()
        if binary:
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            save_file(weights, path, metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | config))
        return folder

    return make


def load(folder: Path, task: str = "causal-lm", labels: int | None = None) -> tuple[Weights, list[str]]:
    """The loaded state dict, and what was said."""
    settings, said = ModelSettings(name_or_path=str(folder), task=task), []
    config = loading.load_config(settings, byte_tokenizer(), labels)
    model = loading.load_model(settings, config, "float32", said.append)
    return model.state_dict(), said


def refusal(folder: Path, task: str = "causal-lm", labels: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        load(folder, task, labels)
    text = str(error.value)
    assert text.startswith("model.name_or_path: ") and "\n" not in text
    return text


def renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def without(*ends: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if not name.endswith(ends)}


def with_tensor(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(shape)}


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        renamed("_orig_mod."),
        renamed("module."),
        renamed("module._orig_mod."),
        renamed("_orig_mod.module."),
        lambda weights: {name.replace("layers.1.", "layers.1._orig_mod."): one for name, one in weights.items()},
        lambda weights: {
            name.replace(".mlp.", "._checkpoint_wrapped_module.mlp._fsdp_wrapped_module."): one
            for name, one in weights.items()
        },
    ],
)
def test_wrappers_are_taken_off_and_said(
    change: Callable[[Weights], Weights], binary: bool, copy: Any, originals: dict[str, Path]
) -> None:
    loaded, said = load(copy("llama", change, binary))
    theirs = load_file(originals["llama"] / "model.safetensors")
    assert loaded.keys() == theirs.keys() and all(torch.equal(loaded[name], theirs[name]) for name in theirs)
    names = [name for name in change(theirs) if name not in theirs]
    assert len(said) == 1 and f"names of {len(names)} tensors" in said[0] and sorted(names)[0] in said[0]


def test_a_model_without_its_wrapper_is_saved_as_usual(copy: Any, originals: dict[str, Path], tmp_path: Path) -> None:
    settings = ModelSettings(name_or_path=str(copy("llama", renamed("module._orig_mod."))), attention="eager")
    config = loading.load_config(settings, byte_tokenizer(), None)
    model = loading.load_model(settings, config, "bfloat16", lambda note: None)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path / "saved")
    saved, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", originals["llama"]))
    assert saved.keys() == theirs.keys() and all(torch.equal(saved[name], theirs[name].bfloat16()) for name in theirs)


def test_wrappers_of_experts(copy: Any, originals: dict[str, Path]) -> None:
    """Experts are stacked after their names are mended."""
    expected, nothing = load(originals["mixtral"])
    loaded, said = load(copy("mixtral", renamed("_orig_mod.")))
    assert not nothing and len(said) == 1
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", dict),
        ("tied", dict),
        ("llama", lambda weights: {name.removeprefix("model."): one for name, one in weights.items()}),
        ("llama", with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),  # of early versions
    ],
)
def test_files_that_fit_need_no_word(name: str, change: Any, copy: Any, originals: dict[str, Path]) -> None:
    loaded, said = load(copy(name, change))
    assert not said
    theirs = load_file(originals[name] / "model.safetensors")
    assert all(torch.equal(loaded[one], tensor) for one, tensor in theirs.items())


LAYER = "model.layers.1.self_attn."


@pytest.mark.parametrize(
    ("name", "change", "config", "expected"),
    [
        ("llama", renamed("net."), {}, ["random: 21 of 21 w", "Not in the model: 21 tensors", "net.lm_head.weight"]),
        ("llama", without("1.self_attn.q_proj.weight"), {}, [f"random: 1 of 21 weights, {LAYER}q_proj.weight."]),
        ("llama", without("lm_head.weight"), {}, ["random: 1 of 21 weights, lm_head.weight."]),
        ("llama", dict, {"num_hidden_layers": 4}, ["random: 18 of 39 weights, e.g. model.layers.2."]),
        ("llama", dict, {"num_hidden_layers": 1}, [
            "Not in the model: 9 tensors of the files, e.g. model.layers.1.", ".from_pretrained(OLD).save_pretrained(",
        ]),
        ("llama", with_tensor(f"{LAYER}q_proj.bias", 16), {}, [f"model: 1 tensor of the files, {LAYER}q_proj.bias"]),
        ("llama", with_tensor("lm_head.bias", 262), {}, ["Not in the model: 1 tensor of the files, lm_head.bias"]),
        ("llama", with_tensor(f"{LAYER}q_proj.weight", 0), {}, [
            f"values: 1 tensor of the files, {LAYER}q_proj.weight: (0,) in the files, (16, 16) in the model.", "ZeRO-3",
        ]),
        ("llama", dict, {"vocab_size": 300}, [
            "Of another shape: 2 tensors", "lm_head.weight: (262, 16) in the files, (300, 16) in the model",
        ]),
        ("three", dict, {}, [
            "do not match BertLMHeadModel", "The files were saved from BertForSequenceClassification.",
        ]),
        ("mixtral", with_tensor("model.layers.0.block_sparse_moe.experts.0.w1.weight", 0), {}, [
            "without values: 1 tensor, model.layers.0.block_sparse_moe.experts.0.w1.weight.",
        ]),
        ("mixtral", without("0.block_sparse_moe.experts.0.w1.weight"), {}, ["logging.verbose=true"]),
    ],
)  # fmt: skip
def test_other_weights_are_refused(name: str, change: Any, config: Any, expected: list[str], copy: Any) -> None:
    text = refusal(copy(name, change, **config))
    assert not [part for part in expected if part not in text], text


@pytest.mark.parametrize("scale", ["weight_scale_inv", "SCB", "scales"])
def test_quantized_weights_without_a_word_in_the_configuration(scale: str, copy: Any) -> None:
    """Saved without their scales, they would be read as weights."""
    text = refusal(copy("llama", with_tensor(f"{LAYER}q_proj.{scale}", 16)))
    assert f"The weights are quantized, as {LAYER}q_proj.{scale} shows" in text and "save_pretrained" not in text


def test_scales_of_a_cache_are_no_quantized_weights(copy: Any) -> None:
    text = refusal(copy("llama", with_tensor(f"{LAYER}k_scale", 1)))
    assert "quantized" not in text and "If the model is right without these tensors" in text


def test_a_new_head_is_made_and_said(copy: Any, originals: dict[str, Path]) -> None:
    torch.manual_seed(0)
    loaded, said = load(originals["three"], CLASSIFY, 2)
    assert said == [
        "note: the classification head is new (classifier.bias: (3,) in the files, (2,) in the model; "
        "classifier.weight: (3, 16) in the files, (2, 16) in the model)"
    ]
    theirs = load_file(originals["three"] / "model.safetensors")
    assert all(torch.equal(loaded[name], theirs[name]) for name in theirs if not name.startswith("classifier"))
    assert loaded["classifier.weight"].shape == (2, 16) and loaded["classifier.weight"].std() > 0.005
    _, said = load(originals["three"], CLASSIFY, 3)
    assert not said


@pytest.mark.parametrize(
    ("name", "new", "unused"),
    [
        ("llama", ["score.weight"], ["lm_head.weight"]),
        ("masked", ["classifier.weight", "bert.pooler.dense.weight"], ["cls.predictions"]),
    ],
)
def test_heads_of_language_models(name: str, new: list[str], unused: list[str], originals: dict[str, Path]) -> None:
    _, (made, left) = load(originals[name], CLASSIFY, 2)
    assert all(f"{part}: not in the files" in made for part in new)
    assert "note: not used for sequence-classification: " in left and all(part in left for part in unused)


def test_a_head_is_no_excuse_for_the_body(copy: Any) -> None:
    folder = copy("three", without("layer.1.output.dense.weight"))
    assert "random: 1 of 41 weights, bert.encoder.layer.1.output.dense.weight." in refusal(folder, CLASSIFY, 2)


def test_heads_that_a_language_model_does_not_use(copy: Any) -> None:
    _, said = load(copy("llama", with_tensor("v_head.summary.weight", 1, 16)))
    assert said == ["note: not used for causal-lm: 1 tensor of the files, v_head.summary.weight"]


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_causal_masks_of_early_versions(prefix: str, tmp_path: Path) -> None:
    keys = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 262, "attention_types": [[["global"], 1]]}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neo", **keys)).save_pretrained(tmp_path)
    path, mask = tmp_path / "model.safetensors", torch.ones(1, 1, 8, 8, dtype=torch.bool)
    names = [f"{prefix}h.0.attn.attention.{last}" for last in ("bias", "masked_bias")]
    weights = {prefix + name.removeprefix("transformer."): one for name, one in load_file(path).items()}
    save_file(weights | {names[0]: mask, names[1]: torch.tensor(-1e9)}, path, metadata={"format": "pt"})
    assert load(tmp_path)[1] == [f"note: not used for causal-lm: 2 tensors of the files, e.g. {', '.join(names)}"]
    save_file(weights | {f"{prefix}h.0.attn.attention.q_proj.bias": torch.ones(16)}, path, metadata={"format": "pt"})
    assert "Not in the model: 1 tensor" in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, copy: Any) -> None:
    def spoil(weights: Weights) -> Weights:
        weights["model.norm.weight"][3] = value
        return weights

    _, said = load(copy("llama", spoil))
    assert said == ["warning: NaN or infinite values in 1 tensor of the model, model.norm.weight"]


def test_large_values_are_finite(copy: Any) -> None:
    """Their sum is not."""
    _, said = load(copy("llama", lambda weights: weights | {"model.norm.weight": torch.full((16,), 3e38)}))
    assert not said


def test_an_adapter_beside_the_model(copy: Any) -> None:
    peft = pytest.importorskip("peft")
    folder = copy("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    assert "holds a PEFT adapter besides the model" in refusal(folder)


# Damaged files --------------------------------------------------------------------------------------


def cut(folder: Path) -> str:
    path = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    path.write_bytes(path.read_bytes()[:-500])
    return f"{path} is damaged or cut off"


def shard(folder: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    return sorted(folder.glob("*.safetensors"))


def lose_a_shard(folder: Path) -> str:
    shards = shard(folder)
    shards[1].unlink()
    return (
        f"{shards[1]} does not exist, though the index of the weight files names it. Missing files: 1 of {len(shards)}"
    )


def break_the_index(folder: Path) -> str:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    return f"{folder}: the index of the weight files is damaged"


def leave_a_pointer(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 51\n")
    return f"{path} is a pointer of Git LFS, not the file itself. Run `git lfs pull`"


@pytest.mark.parametrize("binary", [False, True])
def test_a_file_that_is_cut_off(binary: bool, copy: Any) -> None:
    folder = copy("llama", binary=binary)
    expected = cut(folder)
    assert expected in refusal(folder)


@pytest.mark.parametrize("damage", [lose_a_shard, break_the_index, leave_a_pointer])
def test_damaged_files_are_named(damage: Callable[[Path], str], copy: Any) -> None:
    folder = copy("llama")
    expected = damage(folder)
    assert expected in refusal(folder)
