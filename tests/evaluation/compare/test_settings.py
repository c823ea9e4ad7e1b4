"""The comparison's settings: all that is wrong is said, before anything is loaded; those in configs/ hold together."""

from __future__ import annotations

from pathlib import Path

import pytest

from hift_ds.evaluation.compare.settings import dry, load_comparison
from hift_ds.launch.errors import UserError
from tests.support.paths import REPOSITORY

TINY = str(REPOSITORY / "configs" / "compare_tiny.yaml")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Where the publishers' folders are; nothing is read from them."""
    for name in ("gsm8k", "sst2", "superglue"):
        (tmp_path / name).mkdir()
    return tmp_path


def problems(data: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_comparison(TINY, [f"data.path={data}", "tasks=[sst2, rte]", *overrides])
    return str(error.value)


def test_everything_wrong_is_said_at_once(data: Path) -> None:
    text = problems(
        data,
        "methods=[ful, {name: hift, lable: x}, full, full, {name: zero-shot, learning_rates: [1]}, 3]",
        "tasks=[gsm8, rte, rte, {name: boolq, path: nowhere}]",
        "seeds=[0.5]",
        "budgets=[{samples: 0}, {minutes: 3}]",
        "training.max_steps=3",
        "output.dir=null",
        "titel=x",
        "data.dev_example=3",
    )
    for expected in (
        "methods: unknown method 'ful'", "did you mean 'full'?",
        "methods: hift: unknown key 'lable'", "did you mean 'label'?",
        "the label 'full' is used twice",
        "learning_rates, but zero-shot trains nothing",
        "methods: got 3; expected a method's name",
        "tasks: unknown task 'gsm8'", "did you mean 'gsm8k'?",
        "tasks: rte is listed twice",
        "boolq: its folder 'nowhere' does not exist",
        "seeds: got [0.5]; expected a list of distinct integers",
        "budgets: got {'samples': 0}", "budgets: got {'minutes': 3}",
        "training.max_steps: the comparison sets it",
        "output.dir: not set",
        "titel: unknown section", "did you mean 'title'?",
        "data.dev_example: unknown key",
    ):  # fmt: skip
        assert expected in text, f"{expected}\n--- in ---\n{text}"


WRONG: dict[str, tuple[list[str], str]] = {
    "half a sample": (["budgets=[{samples: 1.5}]"], "budgets: got {'samples': 1.5}"),
    "endless": (["budgets=[{seconds: .inf}]"], "budgets: got {'seconds': inf}"),
    "budget twice": (["budgets=[{samples: 8}, {samples: 8}]"], "budgets: 8 samples is listed twice"),
    "seed twice": (["seeds=[1, 1]"], "seeds: got [1, 1]"),
    "no seed": (["seeds=[]"], "seeds: got []"),
    "no rate": (["learning_rates=[0]"], "learning_rates: got [0]"),
    "infinite rate": (["learning_rates=[.inf]"], "learning_rates: got [inf]"),
    "grids": (
        ["methods=[full, {name: lora, learning_rates: [1e-3, 1e-4]}]"],
        "every method must choose among the same number of rates; these have full 1, lora 2",
    ),
    "nothing to choose by": (
        ["learning_rates=[1e-3, 1e-4]", "methods=[full]", "data.dev_examples=0"],
        "dev_examples: 0",
    ),
    "epochs": (["training.epochs=2"], "training.epochs: the comparison sets it"),
    "evaluations in training": (["training.eval_every=2"], "training.eval_every: the comparison sets it"),
    "no batch size": (["training.batch_size=null"], "training.batch_size: got None, expected a whole number"),
    "row's steps": (
        ["methods=[{name: full, training: {max_steps: 3}}]"],
        "methods: full: training.max_steps: the comparison sets it",
    ),
    "row's method": (["methods=[{name: full, method: {name: hift}}]"], "methods: full: method.name"),
    "row's section": (["methods=[{name: full, training: 3}]"], "methods: full: training: got 3"),
    "row's file": (
        ["methods=[{name: full, deepspeed: configs/deepspeed/zero0.json}]"],
        "methods: full: deepspeed: got 'configs/deepspeed/zero0.json'",
    ),
    "row's option": (["methods=[{name: full, method: {lora_rank: 3}}]"], "full: method.lora_rank: got 3"),
    "row's training key": (
        ["methods=[{name: full, training: {bach_size: 3}}]"],
        "full: training.bach_size: unknown key",
    ),
    "k-shot": (["tasks=[gsm8k, rte]", "data.k_shot=16"], "data.k_shot: 16, but gsm8k has no classes"),
    "shots": (["methods=[{name: icl, shots: two}]"], "methods: icl: shots: got 'two'"),
    "no shots": (["methods=[{name: icl, shots: 0}]"], "methods: icl: shots: got 0"),
    "shots of all": (["methods=[icl]", "evaluation.shots=many"], "evaluation.shots: got 'many'"),
    "batch size": (["training.batch_size=eight"], "training.batch_size: got 'eight'"),
    "no batch": (["training.batch_size=0"], "training.batch_size: got 0"),
    "path": (["tasks=[{name: rte, path: 3}]"], "tasks: got {'name': 'rte', 'path': 3}"),
    "task's size": (
        ["tasks=[{name: rte, test_examples: 0}, {name: sst2, dev_examples: some}]"],
        "tasks: rte.test_examples: got 0",
    ),
    "task's size of shots": (
        ["tasks=[{name: rte, train_examples: 8}]", "data.k_shot=4"],
        "is not used with data.k_shot",
    ),
    "nothing to choose by on one task": (
        ["learning_rates=[1e-3, 1e-4]", "methods=[full]", "tasks=[sst2, {name: rte, dev_examples: 0}]"],
        "data.dev_examples: 0 (rte), but these examples decide",
    ),
    "optional": (["tasks=[{name: rte, optional: perhaps}]"], "tasks: got {'name': 'rte', 'optional': 'perhaps'}"),
    "built in and optional": (["tasks=[{name: yes-no, optional: true}]"], "optional: True is not used"),
    "built in": (
        ["tasks=[{name: yes-no, path: x}]"],
        "tasks: yes-no: path: 'x' is not used, because this task is built",
    ),
    "no folder": (["tasks=[copa, boolq]", "data.path=nowhere"], "arithmetic and yes-no are built in and need no data"),
    "unknown task": (["tasks=[sst3]"], "unknown task 'sst3'; expected arithmetic, yes-no, sst2"),
    "revision": (["tasks=[{name: rte, revision: main}]"], "tasks: rte: revision: 'main' is for sets from the Hub"),
    "fp16": (["deepspeed.fp16=true"], "deepspeed.fp16: got True"),
    "no methods": (["methods=full"], "methods: got 'full'; expected a list"),
    "model": (["model.config.hiden_size=3"], "hiden_size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str, data: Path) -> None:
    overrides, expected = WRONG[case]
    assert expected in problems(data, *overrides)


SHIPPED = [path for kind in ("compare", "gpu") for path in sorted((REPOSITORY / "configs").glob(f"{kind}_*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_settings_hold_together(path: Path, data: Path) -> None:
    given = [f"data.path={data}"]
    if path.stem == "gpu_1b":  # the user's model
        given += ["model.name_or_path=null", "model.config={model_type: llama}", "model.tokenizer=byte"]
    comparison = load_comparison(str(path), given)
    assert comparison.rows and comparison.tasks and comparison.budgets
    for row in comparison.rows:
        for budget in comparison.budgets if row.trained else ():
            for rate in row.learning_rates:
                steps = budget.steps(row.batch_size, round)
                settings = comparison.run_settings(row, steps, comparison.seeds[-1], rate, 1)
                assert settings.training.learning_rate == rate and settings.method.name == row.method


GPU = [path for path in SHIPPED if path.stem.startswith("gpu")]


@pytest.mark.parametrize("path", GPU, ids=lambda path: path.stem)
def test_a_gpu_s_settings_name_their_command_and_that_they_were_not_run(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("\ntitle:")[0]
    assert "make gpu-compare " in header and f"evaluation.compare --config configs/{path.name}" in header
    assert "Not run" in header


def test_a_task_may_be_optional(data: Path) -> None:
    """BoolQ has no held-out file here, WiC no folder, and RTE both files."""
    for name, files in (("BoolQ", ["train.jsonl"]), ("RTE", ["train.jsonl", "val.jsonl"])):
        (data / "superglue" / name).mkdir()
        for file in files:
            (data / "superglue" / name / file).write_text("{}\n")
    optional = "[sst2, {name: boolq, optional: true}, {name: wic, optional: true}, {name: rte, optional: true}]"
    comparison = load_comparison(TINY, [f"data.path={data}", f"tasks={optional}"])
    assert [one.task.name for one in comparison.tasks] == ["sst2", "rte"]
    boolq, wic = comparison.notes
    assert boolq.startswith(f"boolq is left out, because {data}/superglue/BoolQ has train.jsonl, but no ")
    assert "val.jsonl" in boolq and "test.jsonl" not in boolq  # SuperGLUE's test rows have no labels
    assert wic.startswith("wic is left out, because ") and "no file train" in wic
    assert comparison.as_dict()["notes"] == comparison.notes


def test_a_publisher_s_held_out_file_is_named_as_it_is_published(data: Path) -> None:
    (data / "snli").mkdir()
    (data / "snli" / "snli_1.0_train.jsonl").write_text("{}\n")
    (note,) = load_comparison(TINY, [f"data.path={data}", "tasks=[sst2, {name: snli, optional: true}]"]).notes
    assert note.endswith("has snli_1.0_train.jsonl, but no snli_1.0_dev.jsonl or snli_1.0_test.jsonl")


def test_some_task_must_have_data(data: Path) -> None:
    text = problems(data, "tasks=[{name: wic, optional: true}]")
    assert "tasks: no task is left: wic is left out" in text and "arithmetic and yes-no are built in" in text


def test_a_task_has_its_own_sizes(data: Path) -> None:
    tasks = "[sst2, {name: gsm8k, test_examples: 24, dev_examples: 0}]"
    comparison = load_comparison(TINY, [f"data.path={data}", f"tasks={tasks}"])
    sst2, gsm8k = map(comparison.sizes, comparison.tasks)
    assert sst2 == {"train_examples": 16, "dev_examples": 8, "test_examples": 8, "k_shot": None}
    assert gsm8k == sst2 | {"test_examples": 24, "dev_examples": 0}


def test_built_in_tasks_need_no_path() -> None:
    comparison = load_comparison(TINY)
    assert [(one.task.name, one.path) for one in comparison.tasks] == [("arithmetic", None), ("yes-no", None)]


def test_a_home_folder_is_found(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data.parent))
    (data / "glue").mkdir()
    given = [f"data.path=~/{data.name}", "tasks=[cola, sst2]"]
    assert [one.path for one in load_comparison(TINY, given).tasks] == [str(data / "glue"), str(data / "sst2")]


def test_only_some_rows_with_all_that_is_theirs(data: Path) -> None:
    given = [f"data.path={data}"]
    every = load_comparison(TINY, given).rows
    some = load_comparison(TINY, given, only=["lora", "hift, random", "adapter"]).rows
    assert [row.label for row in some] == ["hift, random", "lora", "adapter"]
    methods = "methods=[full, {name: hift, label: a}, {name: hift, label: b}]"
    assert [row.label for row in load_comparison(TINY, [*given, methods], only=["hift"]).rows] == ["a", "b"]
    assert all(row in every for row in some)
    with pytest.raises(UserError, match=r"--only: 'lorra' is neither the label .* did you mean 'lora'\?"):
        load_comparison(TINY, given, only=["lorra", "full"])


def test_a_dry_run_has_the_first_steps_of_every_cell(data: Path, tmp_path: Path) -> None:
    """Rows with batches of 8 and 2: each takes two steps, with either budget."""
    given = [
        f"data.path={data}",
        "tasks=[sst2, {name: gsm8k, test_examples: 50, train_examples: 30}]",
        "methods=[zero-shot, full, {name: hift, training: {batch_size: 2}}]",
        "learning_rates=[1e-3, 1e-4]",
        "seeds=[7, 8]",
        "budgets=[{samples: 64}, {seconds: 60}]",
        "data.dev_examples=500",
        "logging.wandb=offline",
    ]
    whole = load_comparison(TINY, given)
    small = dry(whole, tmp_path / "aside")
    assert [str(one) for one in small.budgets] == ["64 samples", "60 s"] and small.seeds == [7]
    assert [row.learning_rates for row in small.rows] == [(0.0, 0.0), (1e-3, 1e-3), (1e-3, 1e-3)]
    for row in small.rows[1:]:
        for budget in small.budgets:
            settings = small.run_settings(row, budget.steps(row.batch_size, round), 7, 1e-3, 1)
            assert settings.training.max_steps == 2 and settings.logging.wandb == "off"
            assert settings.output.dir == str(tmp_path / "aside")
    assert [small.sizes(one)["test_examples"] for one in small.tasks] == [4, 4]
    assert [small.sizes(one)["dev_examples"] for one in small.tasks] == [4, 4]
    assert [small.sizes(one)["train_examples"] for one in small.tasks] == [16, 30]
    assert small.logging.wandb == "off" and whole.logging.wandb == "offline" and small.folder == tmp_path / "aside"


def test_a_small_budget_stays_small_in_a_dry_run(data: Path, tmp_path: Path) -> None:
    small = dry(load_comparison(TINY, [f"data.path={data}", "budgets=[{samples: 8}]"]), tmp_path)
    assert small.budgets[0].steps(8, round) == 1
