"""The training settings: every shipped config holds together, every mistake is named with its remedy, all at once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from hift_ds.launch import train
from hift_ds.launch.config.library_checks import check_with_libraries
from hift_ds.launch.config.settings import Settings, load_settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.lr_schedules import schedule_factor
from hift_ds.launch.methods.table import METHODS, TRAINED
from hift_ds.launch.model import loading
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests.support.paths import REPOSITORY

CONFIGS = REPOSITORY / "configs"
TINY = str(CONFIGS / "tiny.yaml")


def load(*overrides: str, world_size: int = 1, path: str = TINY) -> Settings:
    settings = load_settings(path, overrides, world_size)
    check_with_libraries(settings, path)
    return settings


def problems(*overrides: str, world_size: int = 1, path: str = TINY) -> str:
    with pytest.raises(UserError) as raised:
        load(*overrides, world_size=world_size, path=path)
    return str(raised.value)


# ---- shipped configs ---------------------------------------------------------------------------------------------


def needs(name: str, folder: Path) -> list[str]:
    """What a user has to give beside the config, as its header says."""
    if name == "quickstart.yaml":
        (folder / "model.gguf").touch()
        return [f"model.name_or_path={folder / 'model.gguf'}"]
    if name == "gsm8k.yaml":
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text('{"question": "1 + 1?", "answer": "2\\n#### 2"}\n')
        return [f"data.path={folder}"]
    return []


# Configs of comparisons are of `hift_ds.evaluation.compare.command`, which has its own tests.
RUNS = sorted(p.name for p in CONFIGS.glob("*.yaml") if not p.name.startswith(("compare_", "gpu_")))


@pytest.mark.parametrize("path", RUNS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_shipped_config_is_valid(path: str, ranks: int, tmp_path: Path) -> None:
    settings = load(*needs(path, tmp_path), world_size=ranks, path=str(CONFIGS / path))
    assert settings.micro_batch_size * settings.accumulation * ranks == settings.training.batch_size
    header = (CONFIGS / path).read_text().split("\nmodel:")[0]
    assert f"launch/train.py --config configs/{path}" in header


@pytest.mark.parametrize("path", sorted(p.name for p in (CONFIGS / "deepspeed").glob("*.json")))
@pytest.mark.parametrize("method", TRAINED)
def test_shipped_deepspeed_config_is_valid(path: str, method: str) -> None:
    settings = load(f"deepspeed=configs/deepspeed/{path}", f"method.name={method}")
    assert settings.zero_stage == int(path[len("zero")])
    assert settings.deepspeed["hift"]["enabled"] is (method == "hift")


def test_7b_recipe_has_the_papers_blocks() -> None:
    """Llama-2-7B has LLaMA-7B's shape: 34 blocks, the largest of 202.38M parameters (table 9 of the paper)."""
    from hift_ds import partition_model

    section = {"model_type": "llama", "max_position_embeddings": 4096}  # transformers' default Llama is the 7B one
    settings = load(f"model.config={json.dumps(section)}").model
    blocks = partition_model(loading.skeleton(settings, loading.load_config(settings, byte_tokenizer(), None)))
    assert len(blocks) == 34
    config = yaml.safe_load((CONFIGS / "llama7b_24gb.yaml").read_text())
    assert config["training"]["max_steps"] == 50 * 34  # the header says 50 cycles
    assert "This run was not tested as a whole" in (CONFIGS / "llama7b_24gb.yaml").read_text()


# ---- what is filled in -------------------------------------------------------------------------------------------


def test_overrides_reach_into_a_deepspeed_file() -> None:
    settings = load("deepspeed=configs/deepspeed/zero3.json", "deepspeed.hift.layers_per_block=2")
    assert settings.zero_stage == 3
    assert settings.deepspeed["hift"] == {"layers_per_block": 2, "enabled": True}


def test_override_values_are_yaml() -> None:
    settings = load(
        "training.learning_rate=1e-4",  # YAML 1.1 would read text
        "logging.wandb=off",  # and this one as false
        "training.save_every=null",
        'deepspeed={"zero_optimization": {"stage": 1}}',
    )
    assert settings.deepspeed["optimizer"]["params"]["lr"] == 1e-4
    assert settings.logging.wandb == "off"
    assert settings.training.save_every is None
    assert settings.zero_stage == 1


@pytest.mark.parametrize(
    ("ranks", "most", "micro", "accumulation"),
    [(1, 4, 4, 3), (2, 4, 3, 2), (3, 4, 4, 1), (4, 4, 3, 1), (6, 4, 2, 1), (12, 4, 1, 1), (1, None, 12, 1)],
)
def test_one_yaml_runs_on_any_number_of_ranks_that_divides_the_batch(
    ranks: int, most: int | None, micro: int, accumulation: int
) -> None:
    size = "null" if most is None else most
    settings = load("training.batch_size=12", f"training.micro_batch_size={size}", world_size=ranks)
    assert (settings.micro_batch_size, settings.accumulation) == (micro, accumulation)
    assert micro * accumulation * ranks == settings.deepspeed["train_batch_size"] == 12
    said = [note for note in settings.notes if note.startswith("training.micro_batch_size")]
    assert bool(said) == (most not in (None, micro))


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, 1, 8), (1, 8, 1), (2, 2, 2), (4, 1, 2)])
def test_accumulation_follows_from_batch_sizes(ranks: int, micro: int, accumulation: int) -> None:
    settings = load("training.batch_size=8", f"training.micro_batch_size={micro}", world_size=ranks)
    assert settings.deepspeed["train_batch_size"] == 8
    assert settings.deepspeed["train_micro_batch_size_per_gpu"] == micro
    assert settings.deepspeed["gradient_accumulation_steps"] == accumulation


def test_every_training_setting_reaches_the_deepspeed_section() -> None:
    settings = load(
        "training.batch_size=12",
        "training.micro_batch_size=2",
        "training.learning_rate=2e-4",
        "training.weight_decay=0.03",
        "training.max_grad_norm=0.7",
        "training.optimizer=SGD",
        "deepspeed={}",
        world_size=2,
    )
    assert settings.deepspeed == {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.7,
        "optimizer": {"type": "SGD", "params": {"lr": 2e-4, "weight_decay": 0.03}},
        "hift": {"enabled": True},
    }


def test_deepspeed_section_may_agree_or_say_auto() -> None:
    section = {
        "train_batch_size": 4,
        "gradient_clipping": "auto",
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
    }
    settings = load(f"deepspeed={json.dumps(section)}", "training.max_grad_norm=0.5")
    assert settings.deepspeed["gradient_clipping"] == 0.5
    assert settings.deepspeed["optimizer"] == {
        "type": "SGD",
        "params": {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.0},
    }


def test_deepspeed_section_decides_where_training_says_nothing() -> None:
    params = {"lr": 5e-4, "weight_decay": 0.1}
    section = {"optimizer": {"type": "AdamW", "params": params}, "gradient_clipping": 2.0}
    settings = load(f"deepspeed={json.dumps(section)}", "training.learning_rate=null")
    assert settings.deepspeed["optimizer"]["params"] == params
    assert settings.deepspeed["gradient_clipping"] == 2.0


def test_deepspeeds_monitor_passes_through() -> None:
    monitor = {"enabled": True, "output_path": "somewhere", "job_name": "run"}
    assert load(f"deepspeed.tensorboard={json.dumps(monitor)}").deepspeed["tensorboard"] == monitor


def test_the_dtype_of_the_weights() -> None:
    assert load().dtype == "float32"
    assert load("deepspeed.bf16.enabled=true").dtype == "bfloat16"
    assert load("deepspeed.fp16.enabled=true").dtype == "float16"
    assert load("deepspeed.bf16.enabled=false").dtype == "float32"


# ---- mistakes ----------------------------------------------------------------------------------------------------

AUTO = ("training.learning_rate=auto", "training.full_learning_rate=2e-5")

MISTAKES: dict[str, tuple[list[str], list[str]]] = {  # name: (overrides, what the message must hold)
    "unknown section": (["modell.x=1"], ["modell", "did you mean 'model'?"]),
    "unknown key": (["training.max_stepz=3"], ["training.max_stepz", "did you mean 'max_steps'?"]),
    "unknown data key": (["data.colums={}"], ["data.colums", "did you mean 'columns'?"]),
    "unknown method key": (["method.rank=8"], ["method.rank", "name"]),
    "unknown deepspeed key": (["deepspeed.zero_optimisation={}"], ["did you mean 'zero_optimization'?"]),
    "unknown zero key": (
        ["deepspeed.zero_optimization.stagee=1"],
        ["deepspeed.zero_optimization.stagee", "did you mean 'stage'?"],
    ),
    "unknown bf16 key": (["deepspeed.bf16.enable=true"], ["deepspeed.bf16.enable", "did you mean 'enabled'?"]),
    "unknown hift key": (["deepspeed.hift.layers_per_blok=1"], ["deepspeed.hift.layers_per_blok", "layers_per_block"]),
    "text for a number": (["training.max_steps=many"], ["training.max_steps", "'many'", "a whole number"]),
    "fraction for a count": (["training.max_steps=1.5"], ["1.5", "a whole number"]),
    "truth for a number": (["training.seed=true"], ["training.seed", "True", "a whole number"]),
    "number for truth": (["output.overwrite=1"], ["output.overwrite", "true or false"]),
    "negative skips": (["training.max_skipped_steps=-1"], ["training.max_skipped_steps", "-1", "at least 0"]),
    "negative chunk": (["training.loss_chunk=-1"], ["training.loss_chunk", "-1", "at least 0"]),
    "text for a chunk": (["training.loss_chunk=auto"], ["training.loss_chunk", "'auto'", "a whole number or null"]),
    "chunk of a classifier": (
        ["training.loss_chunk=64", "model.task=sequence-classification"],
        ["training.loss_chunk: got 64", "sequence-classification", "Remove it"],
    ),
    "checkpoints elsewhere": (
        ["model.gradient_checkpointing=disk"],
        ["model.gradient_checkpointing: got 'disk'", 'true, false or "cpu"'],
    ),
    "shards of no size": (["output.max_shard_size=0"], ["output.max_shard_size: got 0", "KB, MB, GB or TB"]),
    "shards in GiB": (["output.max_shard_size=5GiB"], ["output.max_shard_size: got '5GiB'", "such as 50GB"]),
    "shards below a KB": (["output.max_shard_size=0.5KB"], ["output.max_shard_size: got '0.5KB'", "at least 1"]),
    "text for a mapping": (["data.columns=question"], ["data.columns", "a mapping"]),
    "text for a section": (["training=fast"], ["training", "'fast'", "a mapping"]),
    "list for deepspeed": (["deepspeed=[1]"], ["deepspeed", "[1]", "path of a JSON file"]),
    "zero steps": (["training.max_steps=0"], ["training.max_steps", "at least 1"]),
    "negative rate": (["training.learning_rate=-1e-3"], ["training.learning_rate", "-0.001", "more than 0"]),
    "HiFT's rate for LoRA": (
        [*AUTO, "method.name=lora"],
        ["training.learning_rate: got 'auto'", "method.name is 'lora'", "method.name=hift"],
    ),
    "no rate of full fine-tuning": (
        ["training.learning_rate=auto"],
        ["training.full_learning_rate: not set", "training.full_learning_rate=2e-5"],
    ),
    "two kinds of rates": (
        ["training.full_learning_rate=2e-5"],
        ["training.full_learning_rate: got 2e-05", "training.learning_rate is 0.003", "training.learning_rate=auto"],
    ),
    "a rate for SGD": ([*AUTO, "training.optimizer=SGD"], ["'auto'", "the optimizer is SGD", "AdamW"]),
    "a rate for SGD of the section": ([*AUTO, "deepspeed.optimizer.type=SGD"], ["'auto'", "the optimizer is SGD"]),
    "a scheduler with rates": (
        [*AUTO, "deepspeed.scheduler={type: WarmupLR, params: {warmup_max_lr: 1e-4}}"],
        ["'auto'", "deepspeed.scheduler=null"],
    ),
    "auto and a number": (
        [*AUTO, "deepspeed.optimizer.params.lr=1e-5"],
        ["deepspeed.optimizer.params.lr: got 1e-05", "training.learning_rate is 'auto'"],
    ),
    "automatic": (["training.learning_rate=automatic"], ["'automatic'", "a number or 'auto'"]),
    "warm-up above 1": (["training.warmup_ratio=1.5"], ["training.warmup_ratio", "at most 1"]),
    "unknown choice": (
        ["training.lr_schedule=cosin"],
        ["'cosin'", "constant, linear, cosine", "did you mean 'cosine'?"],
    ),
    "unknown method": (["method.name=hfit"], ["'hfit'", "hift, full", "did you mean 'hift'?"]),
    "unknown strategy": (["deepspeed.hift.strategy=bottomup"], ["'bottomup'", "bottom2up", "top2down", "random"]),
    "block of size 0": (["deepspeed.hift.layers_per_block=0"], ["deepspeed.hift.layers_per_block=0", "1"]),
    "fp16 at stage 0": (
        ["deepspeed.fp16.enabled=true", "deepspeed.zero_optimization.stage=0"],
        ["fp16", "zero_optimization.stage=0", "stage 1, 2 or 3"],
    ),
    "fp16 at stage 0, full": (
        ["method.name=full", "deepspeed.fp16.enabled=true", "deepspeed.zero_optimization.stage=0"],
        ["fp16", "stage 1, 2 or 3"],
    ),
    "offload at stage 0": (
        ["deepspeed.zero_optimization={stage: 0, offload_optimizer: {device: cpu}}"],
        ["offload_optimizer", "stage=0"],
    ),
    "no such stage": (["deepspeed.zero_optimization.stage=7"], ["stage", "7"]),
    "fp16 and bf16": (["deepspeed.fp16.enabled=true", "deepspeed.bf16.enabled=true"], ["bfloat16 and fp16"]),
    "missing deepspeed file": (
        ["deepspeed=configs/deepspeed/zero4.json"],
        ["zero4.json", "cannot be read", "configs/deepspeed/zero3.json"],
    ),
    "missing deepspeed file, reached into": (["deepspeed=nowhere.json", "deepspeed.hift.seed=1"], ["nowhere.json"]),
    "missing model": (["model.config=null", "model.name_or_path=./nowhere"], ["'./nowhere'", "does not exist"]),
    "missing gguf": (["model.config=null", "model.name_or_path=x.gguf"], ["'x.gguf'", "does not exist"]),
    "folder without a model": (["model.config=null", "model.name_or_path=./configs"], ["no config.json"]),
    "file that is no model": (["model.config=null", "model.name_or_path=./README.md"], ["not a .gguf file"]),
    "no model": (["model.config=null"], ["name_or_path is None", "exactly one"]),
    "two models": (["model.name_or_path=gpt2"], ["'gpt2'", "exactly one"]),
    "missing tokenizer": (["model.tokenizer=./nowhere"], ["model.tokenizer", "does not exist"]),
    "no tokenizer": (["model.tokenizer=null"], ["model.tokenizer", "byte"]),
    "unknown architecture": (["model.config.model_type=lama"], ["'lama'", "did you mean"]),
    "unknown config key": (["model.config.hiden_size=64"], ["hiden_size", "did you mean 'hidden_size'?"]),
    "wrong config type": (["model.config.hidden_size=wide"], ["hidden_size", "wide"]),
    "impossible config": (["model.config.hidden_size=63"], ["63", "not a multiple"]),
    "labels without a task": (["model.num_labels=3"], ["model.num_labels", "sequence-classification"]),
    "unknown data": (["data.name=arithmetik"], ["'arithmetik'", "arithmetic"]),
    "missing data": (["data.name=jsonl", "data.path=nowhere.jsonl"], ["data.path", "nowhere.jsonl", "does not exist"]),
    "no output": (["output.dir=null"], ["output.dir", "not set"]),
    "two batch sizes": (
        ["deepspeed.train_batch_size=32"],
        ["deepspeed.train_batch_size", "32", "training.batch_size is 4"],
    ),
    "two micro-batch sizes": (["deepspeed.train_micro_batch_size_per_gpu=4"], ["training.micro_batch_size is 2"]),
    "two accumulations": (["deepspeed.gradient_accumulation_steps=7"], ["gradient_accumulation_steps", "7"]),
    "two rates": (["deepspeed.optimizer.params.lr=1e-5"], ["1e-05", "training.learning_rate is 0.003"]),
    "two decays": (
        ["deepspeed.optimizer.params.weight_decay=0.1", "training.weight_decay=0.2"],
        ["deepspeed.optimizer.params.weight_decay", "0.1", "training.weight_decay is 0.2"],
    ),
    "two optimizers": (["deepspeed.optimizer.type=SGD", "training.optimizer=Lion"], ["'SGD'", "training.optimizer"]),
    "two clippings": (["deepspeed.gradient_clipping=3.0", "training.max_grad_norm=1"], ["3.0", "max_grad_norm is 1.0"]),
    "two schedules": (
        ["deepspeed.scheduler={type: WarmupLR}", "training.lr_schedule=linear"],
        ["deepspeed.scheduler", "training.lr_schedule"],
    ),
    "method against hift.enabled": (["deepspeed.hift.enabled=false"], ["deepspeed.hift.enabled", "method.name"]),
    "no value": (["training.max_steps"], ["--set training.max_steps", "KEY=VALUE"]),
    "no key": (["=3"], ["KEY=VALUE"]),
    "broken value": (["training.max_steps=[1"], ["--set training.max_steps=[1", "not valid YAML"]),
    "below a value": (["training.seed.x=1"], ["training.seed is 0", "not a section"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    overrides, expected = MISTAKES[name]
    message = problems(*overrides)
    for text in expected:
        assert text in message
    assert "1 problem in" in message or name in ("two models", "unknown hift key"), message


def test_all_mistakes_of_an_automatic_rate_are_named_at_once() -> None:
    overrides = ["training.learning_rate=auto", "method.name=full", "training.optimizer=SGD"]
    message = problems(*overrides, "deepspeed.scheduler={type: WarmupLR}", "deepspeed.optimizer.params.lr=1e-5")
    assert "5 problems in" in message, message
    for text in ("method.name is 'full'", "full_learning_rate: not set", "is SGD", "deepspeed.scheduler", "lr: got"):
        assert text in message


def test_what_trains_nothing_is_told_apart_from_a_typo() -> None:
    for method in METHODS.keys() - TRAINED.keys():
        message = problems(f"method.name={method}")
        assert f"'{method}' trains nothing" in message and "evaluation.compare" in message


def test_options_of_another_method_are_refused() -> None:
    message = problems("method.name=mezo", "method.lora_rank=4", "method.badam_order=random")  # the second is a default
    assert "method.lora_rank: got 4, but method.name is 'mezo'" in message and "badam" not in message
    assert load("method.name=mezo-lora", "method.lora_rank=4").method.lora_rank == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method.lora_rank=0", "method.lora_rank: got 0. Expected at least 1."),
        ("method.lora_alpha=0", "method.lora_alpha: got 0.0. Expected more than 0"),
        ("method.lora_dropout=-0.1", "method.lora_dropout: got -0.1. Expected at least 0 and less than 1"),
        ("method.lora_dropout=1.5", "method.lora_dropout: got 1.5. Expected at least 0 and less than 1"),
    ],
)
def test_numbers_of_a_method(override: str, expected: str) -> None:
    assert expected in problems("method.name=lora", override)


def test_what_a_method_without_deepspeed_cannot_do() -> None:
    assert "training.save_every: got 2" in problems("method.name=badam", "training.save_every=2")
    assert load("method.name=mezo", "training.save_every=2").training.save_every == 2
    assert "deepspeed.fp16.enabled" in problems("method.name=lomo", "deepspeed.fp16.enabled=true")


def test_uneven_ranks() -> None:
    message = problems("training.batch_size=10", "training.micro_batch_size=null", world_size=3)
    assert "training.batch_size: got 10, which 3 ranks cannot divide" in message
    assert "Start 1 or 2 or 5 or 10 ranks" in message and "training.batch_size=12" in message
    for ranks in (1, 2, 5, 10):  # the remedies work
        assert load("training.batch_size=10", "training.micro_batch_size=null", world_size=ranks)
    assert load("training.batch_size=12", "training.micro_batch_size=null", world_size=3)


def test_all_problems_at_once() -> None:
    chosen = [MISTAKES[name] for name in ("unknown key", "text for a number", "unknown strategy", "unknown data")]
    message = problems(*(override for overrides, _ in chosen for override in overrides))
    assert message.startswith("4 problems in ")
    for _, expected in chosen:
        for text in expected:
            assert text in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: [", "not valid YAML"),
        ("- 1", "expected a mapping with the sections"),
        ("training:\n  seed: 1\n  seed: 2\n", "'seed' is given twice"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_broken_yaml(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert expected in problems(path=str(path))


def test_broken_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": }')
    assert "not valid JSON" in problems(f"deepspeed={path}")


# ---- mistakes that need the tokenizer, the data or the model's shape, but no weight -------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `launch/train.py` with the tiny config up to its first mistake; gives the message."""
    out = tmp_path / "out"

    def run(*overrides: str, resume: str | None = None) -> str:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.setenv(key, "1" if key == "WORLD_SIZE" else "0")

        def too_late(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("weights were loaded before the mistake was found")

        monkeypatch.setattr(loading, "load_model", too_late)
        monkeypatch.setattr("hift_ds.launch.run.join", lambda rank_timeout: None)  # one rank needs no process group
        arguments = ["--config", TINY, "--set", f"output.dir={out}"]
        arguments += [part for override in overrides for part in ("--set", override)]
        arguments += {None: [], "yes": ["--resume"], "auto": ["--resume", "auto"]}[resume]
        assert train.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert "Traceback" not in captured.err
        return captured.err

    run.out = out  # type: ignore[attr-defined]
    return run


def test_more_layers_in_a_block_than_the_model_has(command: Any) -> None:
    message = command("deepspeed.hift.layers_per_block=7")
    assert "layers_per_block=7" in message and "from 1 to 6" in message
    assert not command.out.exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("output.dir={tmp}/" + "n" * 300, "output.dir: the name 'nnn"),
        ("data={{name: jsonl, path: ~nobody-of-this-name/x}}", "data.path: '~nobody-of-this-name/x': there is no user"),
        ("deepspeed.optimizer.params.eps='1e-08'", "deepspeed.optimizer.params.eps: got '1e-08', expected a number."),
        ("deepspeed.zero_optimization.sub_group_size='1e9'", "deepspeed.zero_optimization.sub_group_size: got '1e9'"),
    ],
)
def test_wrong_paths_and_numbers_in_text(command: Any, override: str, expected: str, tmp_path: Path) -> None:
    assert expected in command(override.format(tmp=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_make_no_model(command: Any) -> None:
    assert "model.config: no llama can be made of these sizes" in command("model.config.intermediate_size=-1")
    assert not command.out.exists()


def test_model_without_layers(command: Any) -> None:
    assert "no hidden layers" in command("model.config.num_hidden_layers=0")
    assert not command.out.exists()


def test_freeze_that_matches_nothing(command: Any) -> None:
    assert "*.biass" in command("deepspeed.hift.freeze=['*.biass']")


def test_vocabulary_smaller_than_the_tokenizer(command: Any) -> None:
    message = command("model.config.vocab_size=100")
    assert "model.config.vocab_size" in message and "262" in message


def test_architecture_without_the_task(command: Any) -> None:
    assert "cannot be loaded" in command("model.config={model_type: vit}", "data.eval_examples=0")


def test_empty_data(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    message = command("data.name=jsonl", f"data.path={path}", "data.train_examples=null", "data.eval_examples=null")
    assert str(path) in message
    assert not command.out.exists()


def test_chat_data_without_a_chat_template(command: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    message = command(
        "data.name=jsonl",
        f"data.path={data}",
        "data.train_examples=null",
        "data.eval_examples=null",
        f"model.tokenizer={tmp_path / 'tokenizer'}",
    )
    assert "chat template" in message
    assert not command.out.exists()


@pytest.mark.parametrize("left", ["summary.json", "metrics.jsonl", "checkpoints/latest", "model/config.json"])
def test_used_output_folder_is_left_alone(command: Any, left: str) -> None:
    path = command.out / left
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    message = command()
    assert left.split("/")[0] in message and "--resume" in message and "output.overwrite=true" in message
    assert path.read_text() == "precious"
    assert [p for p in command.out.rglob("*") if p.is_file()] == [path]


def test_output_folder_that_is_a_file(command: Any) -> None:
    command.out.write_text("precious")
    assert "is a file" in command()
    assert command.out.read_text() == "precious"


def test_resume_without_a_checkpoint(command: Any) -> None:
    message = command(resume="yes")
    assert "no checkpoint" in message and "--resume auto" in message
    (command.out / "checkpoints").mkdir(parents=True)
    (command.out / "checkpoints" / "latest").write_text("step4")  # but the folder is not there
    assert "'step4'" in command(resume="yes")


def test_resume_and_overwrite(command: Any) -> None:
    assert "output.overwrite" in command("output.overwrite=true", resume="auto")


def test_resume_with_other_settings(command: Any) -> None:
    (command.out / "checkpoints" / "step4").mkdir(parents=True)
    (command.out / "checkpoints" / "latest").write_text("step4")
    assert "run.json" in command(resume="yes")  # what the run was is not known
    (command.out / "run.json").write_text('{"identity": {"training.seed": 7}}')
    assert "an earlier version of hift_ds" in command(resume="auto")
    (command.out / "run.json").write_text('{"identity": {"training.seed": 7}, "cuts": []}')
    message = command(resume="auto")
    assert "training.seed: the run has 7, these settings have 0" in message
    assert "training.batch_size: the run has nothing, these settings have 4" in message


@pytest.mark.parametrize(
    "arguments", [[], ["--config", TINY, "--sett", "a=b"], ["--conf", TINY], ["--resume", "later"]]
)
def test_command_line_mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    environment = dict(os.environ)
    try:
        os.environ["RANK"] = "0"
        assert train.main(arguments) == 2
    finally:
        os.environ.clear()
        os.environ.update(environment)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "see --help" in error


def test_unreachable_hub_is_told(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", unreachable)
    message = command("model.config=null", "model.tokenizer=null", "model.name_or_path=some-org/some-model")
    assert "some-org/some-model" in message and "couldn't connect" in message


# ---- the learning-rate schedule ------------------------------------------------------------------------------------


def test_schedule_factors() -> None:
    linear = [schedule_factor("linear", 0.25, 8, tick) for tick in range(8)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = [schedule_factor("cosine", 0, 4, tick) for tick in range(5)]
    assert cosine == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    assert [schedule_factor("constant", 0, 4, tick) for tick in range(9)] == [1] * 9
    assert all(schedule_factor("linear", ratio, 1, 0) > 0 for ratio in (0, 0.5, 1))


def test_shipped_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an installed wheel there is no configs/ in the working folder; a file of that name there comes first."""
    monkeypatch.chdir(tmp_path)
    assert load_settings("configs/tiny.yaml").training.max_steps == 12
    (tmp_path / "configs").mkdir()
    own = Path(TINY).read_text().replace("max_steps: 12", "max_steps: 13")
    (tmp_path / "configs" / "tiny.yaml").write_text(own)
    assert load_settings("configs/tiny.yaml").training.max_steps == 13
