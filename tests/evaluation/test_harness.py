"""lm-evaluation-harness on local files: its own tasks, and its figures against our likelihoods of its prompts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hift_ds.evaluation import harness
from hift_ds.evaluation.tasks.scoring import average_log_likelihoods
from hift_ds.launch.errors import UserError
from tests.evaluation.tasks.test_heads import HUB
from tests.evaluation.tasks.test_scoring import llama
from tests.support.data_fixtures import SHARED, bpe, needs_shared, write_jsonl

SUPERGLUE = {"rte": "RTE", "cb": "CB", "boolq": "BoolQ", "copa": "COPA", "multirc": "MultiRC",
             "wic": "WiC", "wsc": "WSC"}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed")
    return huggingface.HFLM(pretrained=llama(1), tokenizer=bpe(), batch_size=4, max_length=4096, device="cpu")


def shortened(folder: Path, n: int = 12) -> Path:
    """The first lines of the real files; where nothing is held out, the last lines of training are."""
    for name, published in {**{"gsm8k": "gsm8k"}, **{one: f"superglue/{SUPERGLUE[one]}" for one in SUPERGLUE}}.items():
        (folder / name).mkdir()
        lines = {file.stem: file.read_text(encoding="utf-8").splitlines(True)
                 for file in sorted((SHARED / published).glob("*.jsonl"))}  # fmt: skip
        held_out = next((part for part in ("val", "test") if part in lines), "val")
        for part, some in (("train", lines["train"][:n]), (held_out, lines.get(held_out, lines["train"][-n:])[:n])):
            (folder / name / f"{part}.jsonl").write_text("".join(some), encoding="utf-8")
    (folder / "sst2").mkdir()
    for part in ("train", "validation"):
        rows = (SHARED / "sst2" / f"{part}.tsv").read_text(encoding="utf-8").splitlines(True)
        (folder / "sst2" / f"{part}.tsv").write_text("".join(rows[: n + 1]), encoding="utf-8")
    for name in ("cola", "mnli", "mrpc", "qnli", "qqp"):
        (folder / name).mkdir()
        for part in ("train", "validation_matched" if name == "mnli" else "validation"):
            write_jsonl(folder / name / f"{part}.jsonl", [{**HUB[name][0], "label": i % 2} for i in range(n)])
    return folder


@needs_shared
def test_every_task_runs_on_local_files(model: Any, tmp_path: Path) -> None:
    report = harness.run(model, list(harness.HARNESS), shortened(tmp_path), limit=3, num_fewshot=1)
    assert list(report["tasks"]) == list(harness.HARNESS) and report["limit"] == 3
    for name, one in report["tasks"].items():
        assert one["examples"] == 3 and one["num_fewshot"] == 1 and len(one["files"]) == 2, name
        assert one["metrics"] and all(-1 <= value <= 1 for value in one["metrics"].values()), name
        assert ("unanswered" in one) is (name == "gsm8k")
    assert report["tasks"]["gsm8k"]["unanswered"] == 3  # by a random model
    assert report["tasks"]["rte"]["task"] == "sglue_rte" and report["tasks"]["boolq"]["version"] == 2.0


# The harness's prompts, typed from its definitions for rows in the publisher's columns, and its choices.
def prompt(name: str, row: dict[str, Any]) -> str:
    if name == "rte":
        return f"{row['premise']}\nQuestion: {row['hypothesis']} True or False?\nAnswer:"
    if name == "cb":
        return f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?\nAnswer:"
    if name == "boolq":
        return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return row["premise"].strip()[:-1] + {"cause": " because", "effect": " therefore"}[row["question"]]


def choices(name: str, row: dict[str, Any]) -> list[str]:
    if name == "copa":
        return [row[key][0].lower() + row[key][1:] for key in ("choice1", "choice2")]
    return {"rte": ["True", "False"], "cb": ["True", "False", "Neither"], "boolq": ["no", "yes"]}[name]


LABELS = {"rte": ["entailment", "not_entailment"], "cb": ["entailment", "contradiction", "neutral"],
          "boolq": [False, True], "copa": [0, 1]}  # fmt: skip


@needs_shared
@pytest.mark.parametrize("name", LABELS)
def test_figures_are_those_of_our_likelihoods(name: str, model: Any, tmp_path: Path) -> None:
    folder = shortened(tmp_path, 20)
    report = harness.run(model, [name], folder)
    rows = [json.loads(line) for line in (folder / name / "val.jsonl").read_text(encoding="utf-8").splitlines()]
    assert report["tasks"][name]["examples"] == len(rows) == 20
    right = 0
    for row in rows:
        pairs = [(prompt(name, row), one) for one in choices(name, row)]
        means, _ = average_log_likelihoods(llama(1), bpe(), pairs, 4)
        lengths = [len(bpe()(" " + one, add_special_tokens=False).input_ids) for _, one in pairs]
        sums = [mean * length for mean, length in zip(means, lengths, strict=True)]  # the harness's accuracy is of sums
        right += sums.index(max(sums)) == LABELS[name].index(row["label"])
    assert report["tasks"][name]["metrics"]["acc"] == right / 20


@needs_shared
def test_wrapped_and_missing_weights(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both were scored as random weights."""
    (tmp_path / "data").mkdir()
    data = shortened(tmp_path / "data")
    folder = tmp_path / "model"
    llama(1).save_pretrained(folder)
    bpe().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    save_file(wrapped, folder / "model.safetensors", metadata={"format": "pt"})
    expected = harness.run(model, ["rte", "gsm8k"], data, limit=2, num_fewshot=0)
    assert harness.run(folder, ["rte", "gsm8k"], data, limit=2, num_fewshot=0) == expected
    assert "a wrapper has changed the names" in capsys.readouterr().err
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"would be random: 1 of \d+ weights, model.norm.weight"):
        harness.run(folder, ["rte"], data, limit=2)


def test_quantized_weights_are_loaded_by_the_harness(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama(1).save_pretrained(folder)
    bpe().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    given = harness._load(lambda **options: options, folder, 4)
    assert given["pretrained"] == str(folder) and given["batch_size"] == 4


@needs_shared
def test_command(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    llama(1).save_pretrained(folder)
    bpe().save_pretrained(folder)
    data, output = tmp_path / "data", tmp_path / "figures.json"
    data.mkdir()
    (shortened(data) / "superglue").mkdir()
    shutil.move(data / "rte", data / "superglue" / "RTE")
    start = ["--model", str(folder), "--data", str(data), "--output", str(output)]
    assert harness.main([*start, "--tasks", "RTE,cb", "--limit", "5", "--num-fewshot", "2"]) == 0
    report = json.loads(output.read_text())
    again = harness.run(model, ["rte", "cb"], data, limit=5, num_fewshot=2)
    assert report == {"model": str(folder), **again}
    assert f"rte: acc {again['tasks']['rte']['metrics']['acc']:.4f} (5 examples, 2 shots)" in capsys.readouterr().out
    for change, message in (
        (["--tasks", "rtr"], "unknown task 'rtr'; expected"),
        (["--tasks", "rte", "--model", str(tmp_path)], "is not a folder with a config.json"),
        (["--tasks", "rte", "--data", str(folder)], "has no folder 'rte'"),
        (["--tasks", "rte", "--data", str(tmp_path / "nothing")], "is not a folder"),
    ):
        assert harness.main([*start, *change]) == 2
        assert message in capsys.readouterr().err


@needs_shared
def test_what_the_data_lacks(model: Any, tmp_path: Path) -> None:
    folder = shortened(tmp_path)
    (folder / "boolq" / "val.jsonl").unlink()
    with pytest.raises(UserError, match="boolq: .* has no held-out file"):
        harness.run(model, ["boolq"], folder)
    rows = [{key: value for key, value in HUB["qqp"][0].items() if key != "question2"}] * 3
    write_jsonl(folder / "qqp" / "validation.jsonl", rows)
    with pytest.raises(UserError, match="validation.jsonl:1: expected the columns .*; question2 missing"):
        harness.run(model, ["qqp"], folder)


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm-evaluation-harness is not installed .*pip install 'hift_ds\[harness\]'"):
        harness.run(None, ["rte"], tmp_path)
