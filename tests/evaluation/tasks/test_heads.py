"""Tasks for models with a classification head: what they read, their targets, training them, predictions, scores."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from hift_ds.evaluation.tasks.catalog import TASKS, TaskExample, find_task
from hift_ds.evaluation.tasks.loading import TaskData, classification_rows, load_task, training_rows
from hift_ds.evaluation.tasks.scoring import classify, predict
from hift_ds.launch.data.batches import collate, trained_tokens
from hift_ds.launch.data.encoding import encode
from hift_ds.launch.errors import UserError
from hift_ds.model.loss import classification_loss
from tests.support.data_fixtures import SHARED, bpe, needs_shared, write_jsonl

# The columns of the Hub's copies, and what a classifier reads of them, typed by hand.
HUB: dict[str, tuple[dict[str, Any], str, str | None, int | float]] = {
    "cola": ({"sentence": "They drank the pub. ", "label": 0, "idx": 0}, "They drank the pub.", None, 0),
    "mrpc": ({"sentence1": "A b", "sentence2": "B a", "label": 1, "idx": 0}, "A b", "B a", 1),
    "qnli": ({"question": "Who?", "sentence": "It rains.", "label": 1, "idx": 0}, "Who?", "It rains.", 1),
    "qqp": ({"question1": "Why?", "question2": "Why not?", "label": 0, "idx": 0}, "Why?", "Why not?", 0),
    "wnli": ({"sentence1": "A b", "sentence2": "B a", "label": 1, "idx": 0}, "A b", "B a", 1),
    "stsb": ({"sentence1": "A b", "sentence2": "B a", "label": 3.8, "idx": 0}, "A b", "B a", 3.8),
    "sst5": ({"text": "a fine film ", "label": 3}, "a fine film", None, 3),
    "snli": ({"premise": "It rains", "hypothesis": "It is wet.", "label": 0}, "It rains", "It is wet.", 0),
    "mnli": ({"premise": "It rains", "hypothesis": "It is dry.", "label": 2}, "It rains", "It is dry.", 2),
    "trec": ({"text": "Who ran ?", "coarse_label": 3}, "Who ran ?", None, 3),
}
ONLY_HEADS = ("cola", "mrpc", "wnli", "qnli", "qqp", "stsb")
CLASSIFIED = [name for name, task in TASKS.items() if task.labels]


def files(name: str, folder: Path, n: int = 40, **more: Any) -> Path:
    """n rows to train on and 10 to test."""
    task = find_task(name)
    row = {**HUB[name][0], **more}
    column = next(key for key in row if isinstance(row[key], str))
    label = "coarse_label" if name == "trec" else "label"
    labels = [i % 6 * 0.9 for i in range(6)] if task.regression else range(len(task.labels))
    for part, numbers in (("train", range(n)), (task.test_split or "validation", range(n, n + 10))):
        rows = [{**row, column: f"{row[column]} {i}", label: labels[i % len(labels)]} for i in numbers]
        write_jsonl(folder / f"{part}.jsonl", rows)
    return folder


def load(name: str, folder: Path, **options: Any) -> TaskData:
    return load_task(find_task(name), str(folder), **{"seed": 0, "train_examples": 30, "dev_examples": 5, **options})


# What they read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB)
def test_texts_and_targets_in_the_columns_of_the_hub(name: str, tmp_path: Path) -> None:
    row, text, pair, target = HUB[name]
    files(name, tmp_path)
    write_jsonl(tmp_path / f"{find_task(name).test_split or 'validation'}.jsonl", [row])
    (example,) = load(name, tmp_path).test
    assert (example.text, example.text_pair, example.target) == (text, pair, target)
    task = find_task(name)
    assert task.prompted == (name not in ONLY_HEADS) == bool(example.prompt or example.candidates)
    if not task.regression:
        assert len(task.labels) > target and len(set(task.labels)) == len(task.labels)
        assert f"{target} {task.labels[int(target)]}" in task.columns


@needs_shared
@pytest.mark.parametrize(
    ("name", "line", "text", "pair", "target"),
    [
        ("rte", "RTE/train.jsonl:1", "No Weapons of Mass Destruction Found in Iraq Yet.",
         "Weapons of Mass Destruction Found in Iraq.", "not_entailment"),
        ("cb", "CB/train.jsonl:2", "``That's good.'' Ruth stood", "Emma would have been all", "entailment"),
        ("boolq", "BoolQ/train.jsonl:1", "Ghost in the Shell --", "is ghost in the shell based on", "false"),
        ("wsc", "WSC/train.jsonl:2", "The city councilmen refused", "they refers to The demonstrators", "true"),
        ("wic", "WiC/train.jsonl:1", "feel: You make me feel naked.", "She felt small and", "true"),
    ],
)  # fmt: skip
def test_texts_and_targets_of_superglue(name: str, line: str, text: str, pair: str, target: str) -> None:
    data = load(name, SHARED / "superglue", train_examples=10**6, dev_examples=0, test_examples=10)
    (example,) = (one for one in [*data.train, *data.test] if one.where.endswith(line))
    assert example.text.startswith(text) and (example.text_pair or "").startswith(pair)
    assert find_task(name).labels[int(example.target or 0)] == target


def test_the_parts_of_a_task_for_heads(tmp_path: Path) -> None:
    """Texts in the held-out split, also in other letters and spaces, are not trained; the same text twice is once."""
    files("mrpc", tmp_path)
    row = HUB["mrpc"][0]
    with (tmp_path / "train.jsonl").open("a") as file:
        write_jsonl(tmp_path / "more.jsonl", [{**row, "sentence1": " a  B 41"}, {**row, "sentence1": "A b 3"}])
        file.write((tmp_path / "more.jsonl").read_text())
    data = load("mrpc", tmp_path, train_examples=1000)
    assert data.report["in_test"] == 1 and data.report["duplicates"] == 1 and len(data.train) == 35
    tested = {one.fingerprint for one in data.test}
    assert len(tested) == 10 and not tested & {one.fingerprint for one in [*data.train, *data.dev]}
    swapped = dataclasses.replace(data.test[0], text=data.test[0].text_pair or "", text_pair=data.test[0].text)
    other_pair = dataclasses.replace(data.test[0], text_pair="Something else")
    assert not {swapped.fingerprint, other_pair.fingerprint} & tested
    again, other = load("mrpc", tmp_path, train_examples=20), load("mrpc", tmp_path, train_examples=20, seed=1)
    assert again.report["train"]["sha256"] != other.report["train"]["sha256"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cola", {"label": 2}, r"train.jsonl:1: label 2 in column 'label'; expected a number from 0 to 1"),
        ("qqp", {"label": "no"}, r"train.jsonl:1: label 'no' in column 'label'"),
        ("qnli", {"sentence": None}, r"train.jsonl:1: expected a text in column 'sentence'"),
        ("stsb", {"label": 5.2}, r"train.jsonl:1: score 5.2 in column 'label'; expected a number from 0 to 5"),
        ("stsb", {"label": "5.2"}, r"train.jsonl:1: score '5.2'"),
    ],
)
def test_wrong_rows_are_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{**HUB[name][0], **change}])
    with pytest.raises(UserError, match=message):
        load(name, tmp_path)


def test_test_parts_without_labels_are_left_out(tmp_path: Path) -> None:
    for name in ("stsb", "cola"):
        files(name, tmp_path)
        write_jsonl(tmp_path / "validation.jsonl", [{**HUB[name][0], "label": -1}] * 3)
        data = load(name, tmp_path)
        assert data.report["unlabeled"] == 3 and data.report["test_from"] == "training split"


def test_forms_that_a_task_lacks(tmp_path: Path) -> None:
    data = load("cola", files("cola", tmp_path))
    with pytest.raises(UserError, match="its task has no prompt"):
        training_rows(data.train)
    with pytest.raises(UserError, match="cola has no prompt; use a model"):
        predict(find_task("cola"), bert(2), tokenizer(), data.test)
    written = TaskExample("rows:1", "2 + 2?", "4", references=("4",))
    with pytest.raises(UserError, match="rows:1: its task has no classes"):
        classification_rows([written])
    with pytest.raises(ValueError, match="gsm8k: classified=True"):
        find_task("gsm8k").score(["4"], [written], classified=True)
    with pytest.raises(ValueError, match="cola: classified=False"):
        find_task("cola").score([0], data.test[:1], classified=False)


# Models ----------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE that sets separators as BERT's does."""
    found = bpe(cls_token="<|im_start|>", sep_token="<|im_end|>")
    found._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )  # fmt: skip
    found.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return found


def bert(outputs: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=600, initializer_range=0.3, pad_token_id=0, num_labels=outputs,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2(outputs: int) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=600, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
                        pad_token_id=0, bos_token_id=2, eos_token_id=2, num_labels=outputs)  # fmt: skip
    return GPT2ForSequenceClassification(config)


def encoded(name: str, examples: list[TaskExample], max_length: int = 600) -> list[Any]:
    labels = list(find_task(name).labels)
    rows = classification_rows(examples)
    return encode(rows, tokenizer(), labels=labels, template=False, question=False, max_length=max_length)[0]


def texts(name: str, n: int = 14) -> list[TaskExample]:
    """Of very different lengths."""
    classes = len(find_task(name).labels)
    one = TaskExample("", "", "")
    return [
        dataclasses.replace(one, where=f"rows:{i}", text="good answer " * (i % 5 + 1) + str(i),
                            text_pair="yes it was 12 " * (i % 3) + str(i * 7) if i % 2 else None, target=i % classes)
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["cb", "trec", "stsb"])
@pytest.mark.parametrize("make", [bert, gpt2])
@torch.no_grad()
def test_predictions_are_those_of_one_text_at_a_time(name: str, make: Any) -> None:
    task, examples = find_task(name), texts(name)
    model = make(len(task.labels)).train()
    expected, losses = [], []
    for one in examples:
        inputs = tokenizer()(one.text, one.text_pair, return_tensors="pt")
        logits = model.eval()(**inputs).logits[0].double()
        expected.append(logits.item() if task.regression else max(range(len(logits)), key=lambda i: logits[i]))
        losses.append((logits.logsumexp(0) - logits[one.target]).item() if not task.regression else None)
    for batch_size in (1, 4, 64):
        model.train()
        found = classify(task, model, tokenizer(), examples, batch_size=batch_size)
        assert model.training and found.truncated == 0
        if task.regression:
            assert found.values == pytest.approx(expected, abs=1e-5) and len(set(found.values)) == len(examples)
            assert found.losses == []
        else:
            assert found.values == expected and len(set(expected)) > 1
            assert found.losses == pytest.approx(losses, abs=1e-5)


def test_of_equal_logits_the_first_class_is_chosen() -> None:
    model = bert(3)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    examples = texts("cb")
    assert classify(find_task("cb"), model, tokenizer(), examples, batch_size=4).values == [0] * len(examples)
    model.classifier.bias.data[0] = -1
    assert classify(find_task("cb"), model, tokenizer(), examples, batch_size=4).values == [1] * len(examples)


def test_long_texts_are_cut_as_in_training() -> None:
    task, model = find_task("stsb"), bert(1)
    examples = texts("stsb")
    cut = classify(task, model, tokenizer(), examples, max_length=12)
    some = [one for one in encoded("stsb", examples, 12) if len(one.input_ids) == 12]
    assert len(some) <= cut.truncated == sum(len(one.input_ids) > 12 for one in encoded("stsb", examples)) > 3
    batch = collate([encoded("stsb", examples, 12)[4]], 0)
    del batch["labels"]
    with torch.no_grad():
        assert cut.values[4] == pytest.approx(model.eval()(**batch).logits.item(), abs=1e-6)


def test_heads_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match="cb has 3 classes, but the model's head has 2 outputs"):
        classify(find_task("cb"), bert(2), tokenizer(), texts("cb"))
    with pytest.raises(UserError, match="gsm8k has no classes"):
        classify(find_task("gsm8k"), bert(2), tokenizer(), texts("cb"))


def test_numbers_train_by_their_squared_error() -> None:
    examples = [dataclasses.replace(one, target=float(i)) for i, one in enumerate(texts("stsb", 4))]
    rows = encoded("stsb", examples)
    batch = collate(rows, 0)
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert trained_tokens(batch) == 4 and rows[2].reference == "2.0"
    labels = batch.pop("labels")
    model = bert(1).eval()
    loss = classification_loss(model, batch, labels)
    logits = model(**batch).logits
    assert logits.shape == (4, 1)
    assert loss.item() == pytest.approx(sum((logits[i, 0].item() - i) ** 2 for i in range(4)), rel=1e-5)
    for model, name in ((bert(2).eval(), "rte"), (bert(3).eval(), "cb")):
        batch = collate(encoded(name, texts(name, 4)), 0)
        labels = batch.pop("labels")
        chances = model(**batch).logits.double().log_softmax(-1)
        expected = -sum(chances[i, label].item() for i, label in enumerate(labels.tolist()))
        assert classification_loss(model, batch, labels).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["stsb", "mrpc"])
def test_heads_learn_a_task(name: str, tmp_path: Path) -> None:
    """Whole path: files, rows, tokens, loss, predictions, scores on what was trained."""
    task = find_task(name)
    data = load(name, files(name, tmp_path), train_examples=12)
    model = bert(len(task.labels)).train()
    rows = encoded(name, data.train)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        batch = collate(rows, 0)
        labels = batch.pop("labels")
        classification_loss(model.eval(), batch, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = task.score(classify(task, model, tokenizer(), data.train).values, data.train)
    assert tuple(scores) == task.metrics and min(scores.values()) > 0.9


@needs_shared
@pytest.mark.parametrize("name", [name for name in CLASSIFIED if name not in HUB and not TASKS[name].built_in])
def test_scores_of_heads(name: str) -> None:
    """Also where the classes' order is not the candidates'."""
    task = find_task(name)
    data = load(name, SHARED / ("superglue" if name != "sst2" else name), test_examples=50)
    right = [one.target for one in data.test]
    assert set(right) <= set(range(len(task.labels)))
    shuffled = [dataclasses.replace(one, candidates=one.candidates[::-1], label=len(one.candidates) - 1 - one.label)
                for one in data.test]  # fmt: skip
    scores = task.score(right, shuffled, classified=True)
    assert tuple(scores) == task.metrics and set(scores.values()) == {1.0}
    assert task.score(right, data.test) == scores and task.score(right, shuffled)[task.metrics[-1]] < 1


@pytest.mark.parametrize("name", ONLY_HEADS)
def test_scores_of_tasks_for_heads_only(name: str, tmp_path: Path) -> None:
    task = find_task(name)
    data = load(name, files(name, tmp_path))
    scores = task.score([one.target for one in data.test], data.test)
    assert tuple(scores) == task.metrics and list(scores.values()) == pytest.approx([1.0] * len(scores))
