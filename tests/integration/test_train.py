"""`launch/train.py` on the tiny config, end to end in this test's ranks: results, losses, checkpoints, logs."""

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.pairwise import others_slow
from tests.support.ranks import run_on_ranks
from tests.support.training import SHORT, TINY, arguments, records, run_tiny, summary, train_and_compare

STAGES = (0, 1, 2, 3)


def assert_complete(out: Path, result: dict[str, Any], method: str = "hift") -> None:
    """All files are there, they agree with each other, the loss fell, and the export is the trained model."""
    assert result["code"] == 0, result["printed"]
    assert result["same_names"] and result["different"] == []
    steps, final = records(out), summary(out)
    assert [record["step"] for record in steps] == list(range(1, final["steps"] + 1))
    assert final["loss_last_mean"] < final["loss_first_mean"] - 0.05
    assert (final["loss_first"], final["loss_last"]) == (steps[0]["loss"], steps[-1]["loss"])
    assert final["method"] == method and final["seed"] == 0 and final["dataset"] == "arithmetic"
    assert final["updates_per_block"] == ([2] * 6 if method == "hift" else [12])
    assert (final["blocks"], final["cycles"]) == ((6, 2) if method == "hift" else (1, 12))
    assert final["score_n"] == 8 and 0 <= final["score_before"] <= 1 and 0 <= final["score_after"] <= 1
    assert final["seconds"] > 0 and final["tokens_per_second"] > 0 and final["peak_memory"] > 2**20
    assert {"hift_ds", "torch", "deepspeed", "transformers", "python", "git"} <= set(final["versions"])
    assert not (out / "checkpoints").exists()  # training.save_every is null
    if method == "hift":
        assert [record["block"] for record in steps] == [0, 1, 2, 3, 4, 5] * 2
        assert [record["cycle"] for record in steps] == [0] * 6 + [1] * 6


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "stage"), others_slow([(r, s) for r in (1, 2) for s in STAGES], [(1, 0), (1, 2), (2, 1), (2, 3)])
)
def test_hift(ranks: int, stage: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert_complete(out, run_tiny(ranks, out, f"deepspeed.zero_optimization.stage={stage}"))


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [pytest.param(r, s, marks=() if (r, s) in ((1, 0), (2, 3)) else pytest.mark.slow) for r in (1, 2) for s in STAGES],
)
def test_full(ranks: int, stage: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run_tiny(ranks, out, "method.name=full", f"deepspeed.zero_optimization.stage={stage}")
    assert_complete(out, result, "full")


@pytest.mark.parametrize("stage", others_slow(STAGES, (0, 3)))
def test_bf16_with_an_untied_head(stage: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = ["deepspeed.bf16.enabled=true", "model.config.tie_word_embeddings=false"]
    result = run_tiny(1, out, *overrides, f"deepspeed.zero_optimization.stage={stage}")
    assert_complete(out, result)
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def train_until_ended(argv: Sequence[str]) -> dict[str, Any]:
    """Run the command line on this rank; a rank that sleeps is ended there, as the launcher ends it within a minute."""

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt(seconds)

    return train_and_compare(argv, sleep=sleep)


def test_a_mistake_is_printed_once_by_two_ranks(tmp_path: Path) -> None:
    """Rank 0 prints it and exits; rank 1 waits a minute before it prints, in which the launcher ends it."""
    seen = run_on_ranks(2, train_until_ended, arguments(tmp_path / "run", "training.max_stepz=3"))
    assert [one["code"] for one in seen] == [2, None]
    assert "training.max_stepz: unknown key" in seen[0]["printed"] and "Traceback" not in seen[0]["printed"]
    assert "training.max_stepz" not in seen[1]["printed"]
    assert not (tmp_path / "run").exists()


def test_both_methods_see_the_same_data(tmp_path: Path) -> None:
    """Before the first update the loss is the same; and so are the tokens of every step."""
    for method in ("hift", "full"):
        run_tiny(1, tmp_path / method, f"method.name={method}")
    hift, full = records(tmp_path / "hift"), records(tmp_path / "full")
    assert hift[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-6)
    assert [r["tokens"] for r in hift] == [r["tokens"] for r in full]
    assert [r["trained_tokens"] for r in hift] == [r["trained_tokens"] for r in full]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for flag in ("true", "false"):
        run_tiny(1, tmp_path / flag, f"model.gradient_checkpointing={flag}", "data.eval_examples=0")
    losses = [[r["loss"] for r in records(tmp_path / flag)] for flag in ("true", "false")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert "score_n" not in summary(tmp_path / "true")


def test_sequence_classification(tmp_path: Path) -> None:
    """Text and label from a CSV; the two classes can be told apart by one byte."""
    rows = ["text,label", *(f"{'yes' if i % 2 else 'no'} number {i},{'good' if i % 2 else 'bad'}" for i in range(64))]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "held_out.csv").write_text("\n".join([rows[0], *rows[-9:]]) + "\n")
    out = tmp_path / "run"
    overrides = ["model.task=sequence-classification", "data.name=csv", f"data.path={tmp_path / 'train.csv'}"]
    overrides += [f"data.eval_path={tmp_path / 'held_out.csv'}", "data.train_examples=null", "data.eval_examples=null"]
    result = run_tiny(2, out, *overrides, "training.max_steps=36", "training.eval_batch_size=2")
    assert result["code"] == 0 and result["same_names"] and result["different"] == []
    final = summary(out)
    assert final["score_n"] == 9 and final["score_metric"] == "accuracy"  # an odd number over two ranks: each once
    assert final["score_after"] == 1
    assert final["sample_after"]["answer"] == final["sample_after"]["expected"]

    # A checkpoint that numbers the same classes in another way keeps its numbers: it is right before training.
    config, weights = (out / "model" / name for name in ("config.json", "model.safetensors"))
    written = json.loads(config.read_text())
    assert written["id2label"] == {"0": "bad", "1": "good"} and written["label2id"] == {"bad": 0, "good": 1}
    tensors = load_file(weights)
    save_file(tensors | {"score.weight": tensors["score.weight"].flip(0)}, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(written | {"id2label": {"0": "GOOD", "1": "BAD"}, "label2id": {"GOOD": 0, "BAD": 1}}))
    overrides += ["model.config=null", "model.tokenizer=null", f"model.name_or_path={out / 'model'}"]
    result = run_tiny(1, tmp_path / "again", *overrides, "training.max_steps=2", "training.eval_batch_size=2")
    assert result["code"] == 0 and "0 good, 1 bad" in result["printed"] and "head is new" not in result["printed"]
    assert summary(tmp_path / "again")["score_before"] == 1
    again = json.loads((tmp_path / "again" / "model" / "config.json").read_text())
    assert again["id2label"] == {"0": "good", "1": "bad"}


def test_held_out_loss_of_own_data(tmp_path: Path) -> None:
    """Prompts and completions have no score: what is told is the held-out loss, as the exported model has it."""
    from transformers import AutoModelForCausalLM

    from hift_ds.launch.config.settings import load_settings
    from hift_ds.launch.data.batches import collate
    from hift_ds.launch.data.loading import load_data
    from hift_ds.launch.model import loading

    for name, count in (("train", 16), ("held_out", 9)):
        lines = [json.dumps({"prompt": f"{name} {i} is", "completion": "one more" * (i % 4 + 1)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    own = ["data.name=jsonl", f"data.path={tmp_path / 'train.jsonl'}", f"data.eval_path={tmp_path / 'held_out.jsonl'}"]
    own += ["data.train_examples=null", "data.eval_examples=null", "training.eval_batch_size=2"]
    result = run_tiny(2, out, *own, "deepspeed=configs/deepspeed/zero3.json", "training.loss_chunk=5")
    assert result["code"] == 0, result["printed"]
    final = summary(out)
    assert final["held_out_n"] == 9 and "score_after" not in final
    assert f"held-out after     loss {final['held_out_loss_after']:.4f} (9 examples)" in result["printed"]

    settings = load_settings(TINY, [*own, f"output.dir={out}"])
    tokenizer = loading.load_tokenizer(settings.model)
    data = load_data(settings.data, tokenizer, task="causal-lm", seed=0)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        expected = model(**collate(data.eval, tokenizer.pad_token_id)).loss.item()
    assert final["held_out_loss_after"] == pytest.approx(expected, rel=1e-5)  # sums in another order
    assert final["held_out_loss_after"] < final["held_out_loss_before"] - 0.1


# ---- the loss ----------------------------------------------------------------------------------------------------


def uneven(folder: Path) -> list[str]:
    """Completions of 1 to 40 tokens, the long ones together, so that a mean of means would be far off."""
    lengths = [1, 2, 40, 35, 3, 1, 28, 2, 5, 39, 1, 1]
    rows = [{"prompt": f"Write {n}:", "completion": "abcdefgh"[i % 8] * n} for i, n in enumerate(lengths)]
    (folder / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data.name=jsonl", f"data.path={folder / 'uneven.jsonl'}", "data.train_examples=null"]
    return [*overrides, "data.eval_examples=0", "training.batch_size=4", "training.max_steps=7"]


@pytest.mark.parametrize("method", ["hift", "full"])
def test_same_global_batch_has_the_same_loss(method: str, tmp_path: Path) -> None:
    losses = {}
    for ranks, micro in ((1, 4), (1, 1), (2, 1), (2, 2)):
        out = tmp_path / f"{ranks}x{micro}"
        settings = [f"training.micro_batch_size={micro}", f"method.name={method}", "training.learning_rate=1e-4"]
        assert run_tiny(ranks, out, *uneven(tmp_path), *settings)["code"] == 0
        losses[ranks, micro] = [record["loss"] for record in records(out)]
    for cut, other in losses.items():
        assert other == pytest.approx(losses[1, 4], rel=1e-6), cut


def test_learning_rate_is_constant_in_a_cycle_and_falls_at_its_end(tmp_path: Path) -> None:
    overrides = ["training.max_steps=15", "training.lr_schedule=linear", "data.eval_examples=0"]
    run_tiny(1, tmp_path / "hift", *overrides)
    rates = [record["learning_rate"] for record in records(tmp_path / "hift")]
    assert rates == pytest.approx([3e-3] * 6 + [2e-3] * 6 + [1e-3] * 3)  # 15 steps of 6 blocks: 3 ticks
    run_tiny(1, tmp_path / "full", *overrides, "method.name=full")
    rates = [record["learning_rate"] for record in records(tmp_path / "full")]
    assert rates == pytest.approx([3e-3 * (15 - t) / 15 for t in range(15)])
    run_tiny(1, tmp_path / "two", *overrides, "deepspeed.hift.steps_per_block=2")
    rates = [record["learning_rate"] for record in records(tmp_path / "two")]
    assert rates == pytest.approx([3e-3] * 12 + [1.5e-3] * 3)  # 15 steps of 6 blocks, two steps each: 2 ticks
    run_tiny(1, tmp_path / "step", *overrides, "deepspeed.hift.lr_ticks=step")
    rates = [record["learning_rate"] for record in records(tmp_path / "step")]
    assert rates == pytest.approx([3e-3] * 6 + [3e-3 * 9 / 15] * 6 + [3e-3 * 3 / 15] * 3)  # of the cycle's first step


def test_a_run_shorter_than_a_cycle_warns(tmp_path: Path) -> None:
    blocks = ("deepspeed.hift.layers_per_block=3", "deepspeed.hift.steps_per_block=2")  # 2 blocks, 4 steps a cycle
    result = run_tiny(1, tmp_path / "run", *SHORT, *blocks, "training.max_steps=3")
    assert "the run takes 3 steps, and a cycle over all blocks takes 4" in result["printed"], result["printed"]


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    """Before a weight is loaded, both problems at once, and nothing is written."""
    settings = ["model.config.max_position_embeddings=64", "training.max_new_tokens=60"]
    result = run_tiny(1, tmp_path / "run", *settings)
    assert result["code"] == 2
    assert "data.max_length: the longest example has" in result["printed"]
    assert "training.max_new_tokens: the longest held-out prompt" in result["printed"]
    assert "takes at most 64" in result["printed"] and not (tmp_path / "run").exists()
    result = run_tiny(1, tmp_path / "run", settings[0], "data.max_length=64", "data.eval_examples=0", *SHORT)
    assert result["code"] == 0, result["printed"]


def test_diverged_training_stops(tmp_path: Path) -> None:
    # At stages 1 to 3 DeepSpeed skips a step whose gradients are not finite; at stage 0 they reach the weights.
    settings = ["training.learning_rate=1e30", "method.name=full", "data.eval_examples=0", "training.max_grad_norm=0"]
    settings += ["deepspeed.zero_optimization.stage=0"]
    result = run_tiny(1, tmp_path / "run", *settings)
    assert result["code"] == 2 and "training has diverged" in result["printed"]
    assert not (tmp_path / "run" / "model").exists()


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "stage"), others_slow([(1, 2), (2, 3), (2, 1), (1, 0)], [(1, 2)]))
def test_resumed_run_equals_the_straight_one(ranks: int, stage: int, tmp_path: Path) -> None:
    """Stopped after step 10, the last checkpoint being of step 8, in the middle of the second cycle."""
    settings = ["training.save_every=4", f"deepspeed.zero_optimization.stage={stage}"]
    settings += ["model.config.attention_dropout=0.1", "training.lr_schedule=linear", "training.keep_last=3"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    expected = run_tiny(ranks, straight, *settings)
    if ranks == 1:
        assert run_tiny(ranks, stopped, *settings, stop_after=10)["code"] is None
        assert len(records(stopped)) == 10
    else:  # the other ranks would wait in a collective for ever: let them finish, then take back what came after
        run_tiny(ranks, stopped, *settings, "training.max_steps=12")
        shutil.rmtree(stopped / "checkpoints" / "step12")
        (stopped / "summary.json").unlink()
    resumed = run_tiny(ranks, stopped, *settings, resume="auto")
    assert resumed["code"] == 0, resumed["printed"]
    assert resumed["digest"] == expected["digest"]
    keys = ("step", "cycle", "block", "loss", "learning_rate", "grad_norm", "tokens", "skipped")
    assert [[r[key] for key in keys] for r in records(stopped)] == [[r[key] for key in keys] for r in records(straight)]
    assert summary(stopped)["updates_per_block"] == [2] * 6
    assert summary(stopped)["score_before"] == summary(straight)["score_before"]
    assert sorted(p.name for p in (stopped / "checkpoints").iterdir() if p.is_dir()) == ["step12", "step4", "step8"]

    # Finished: both forms of --resume leave everything as it is, and other settings are refused before that matters.
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    for resume in ("yes", "auto"):
        again = run_tiny(ranks, stopped, *settings, resume=resume)
        assert again["code"] == 0 and "nothing to do" in again["printed"]
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before

    # Longer: the finished run goes on.
    longer = run_tiny(ranks, stopped, *settings, "training.max_steps=14", resume="yes")
    assert longer["code"] == 0 and summary(stopped)["steps"] == 14
    assert "those of the shorter run until this one ends" in longer["printed"]


def test_resume_auto_starts_anew_without_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["training.max_steps=6", "data.eval_examples=0"]
    assert run_tiny(1, out, *settings, stop_after=3)["code"] is None
    assert len(records(out)) == 3
    assert run_tiny(1, out, *settings, resume="auto")["code"] == 0
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4, 5, 6]


def test_resume_as_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["training.max_steps=6", "training.save_every=4", "data.eval_examples=0"]
    run_tiny(1, out, *settings, stop_after=5)
    for changed in ("deepspeed.hift.steps_per_block=2", "deepspeed.hift.strategy=top2down", "training.seed=1"):
        result = run_tiny(1, out, *settings, changed, resume="yes")
        assert result["code"] == 2 and "--resume" in result["printed"], changed
    assert len(records(out)) == 5
    assert run_tiny(1, out, *settings, resume="yes")["code"] == 0


def test_overwrite_replaces_the_runs_own_files_only(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["training.max_steps=3", "data.eval_examples=0"]
    run_tiny(1, out, *settings, "training.save_every=2")
    (out / "notes.txt").write_text("mine")
    assert run_tiny(1, out, *settings, "output.overwrite=true")["code"] == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "checkpoints").exists() and len(records(out)) == 3


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_wandb_offline(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run_tiny(1, out, "logging.wandb=offline", "training.max_steps=3", "data.eval_examples=0")
    assert result["code"] == 0
    (run,) = (out / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))[0].stat().st_size > 0
    assert summary(out)["wandb_id"] in run.name


def test_wandb_without_a_login_is_a_warning(tmp_path: Path) -> None:
    result = run_on_ranks(1, _without_wandb_login, arguments(tmp_path / "run", "logging.wandb=online", *SHORT))[0]
    assert result["code"] == 0
    assert "warning: Weights & Biases cannot start" in result["printed"]
    assert (
        "warning: the run takes 2 steps, and a cycle over all blocks takes 6" in result["printed"]
    )  # less than a cycle


def _without_wandb_login(argv: Sequence[str]) -> dict[str, Any]:
    with mock.patch.dict(os.environ, {"HOME": "/nonexistent", "NETRC": "/nonexistent"}):
        os.environ.pop("WANDB_API_KEY", None)
        return train_and_compare(argv)


def test_wandb_that_fails_later_is_a_warning(tmp_path: Path) -> None:
    result = run_on_ranks(1, _with_failing_wandb, arguments(tmp_path / "run", "logging.wandb=offline", *SHORT))[0]
    assert result["code"] == 0
    assert result["printed"].count("warning: Weights & Biases failed") == 1
    assert len(records(tmp_path / "run")) == 2


def _with_failing_wandb(argv: Sequence[str]) -> dict[str, Any]:
    import wandb

    service = mock.Mock(id="x")  # the service's side of the SDK
    service.log.side_effect = ConnectionError("gone")
    with mock.patch.object(wandb, "init", return_value=service):
        return train_and_compare(argv)


def test_deepspeeds_csv_monitor(tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "tiny"}
    result = run_tiny(1, tmp_path / "run", f"deepspeed.csv_monitor={json.dumps(monitor)}", *SHORT)
    assert result["code"] == 0
    assert list((tmp_path / "monitor").rglob("*lr*.csv"))


warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


# ---- where a model comes from --------------------------------------------------------------------------------------


def test_a_trained_folder_can_be_trained_on(tmp_path: Path) -> None:
    run_tiny(1, tmp_path / "first", "data.eval_examples=0")
    source = f"model={json.dumps({'name_or_path': str(tmp_path / 'first' / 'model')})}"
    second = run_tiny(1, tmp_path / "second", source, "training.seed=1")
    assert second["code"] == 0 and second["same_names"] and second["different"] == []
    assert summary(tmp_path / "second")["loss_first"] < summary(tmp_path / "first")["loss_first"] - 0.3
    assert summary(tmp_path / "second")["model"] == str(tmp_path / "first" / "model")


@pytest.mark.parametrize("stage", [2, 3])
def test_gguf_start(stage: int, tmp_path: Path) -> None:
    """The weights of the file are those that are trained, and the export no longer needs GGUF."""
    weights = write_gguf(tmp_path / "tiny.gguf")
    source = f"model={json.dumps({'name_or_path': str(tmp_path / 'tiny.gguf'), 'tokenizer': 'byte'})}"
    settings = [source, f"deepspeed.zero_optimization.stage={stage}", "training.learning_rate=1e-12", *SHORT]
    result = run_tiny(1, tmp_path / "run", *settings)
    assert result["code"] == 0, result["printed"]
    assert "GGUF tensors" not in result["printed"]  # transformers' progress bar; there is no terminal
    assert result["same_names"] and result["different"] == []
    assert result["digest"]["model.embed_tokens.weight"] == pytest.approx(weights["token_embd.weight"].sum(), rel=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "run" / "model" / "config.json").read_text())


def write_gguf(path: Path) -> dict[str, Any]:
    """A one-layer Llama of random weights for the byte tokenizer, unquantized."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    width, vocabulary = 32, 262
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    shapes = {"token_embd": (vocabulary, width), "output_norm": (width,), "output": (vocabulary, width)}
    shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    shapes |= {"blk.0.attn_q": (width, width), "blk.0.attn_output": (width, width)}
    shapes |= {"blk.0.attn_k": (width // 2, width), "blk.0.attn_v": (width // 2, width)}
    shapes |= {"blk.0.ffn_gate": (2 * width, width), "blk.0.ffn_up": (2 * width, width)}
    shapes |= {"blk.0.ffn_down": (width, 2 * width)}
    random = np.random.default_rng(0)
    tensors = {f"{name}.weight": 0.1 * random.standard_normal(shape, dtype="float32") for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_fp16_keeps_the_loss_scale_in_the_records(tmp_path: Path) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}  # overflows at first
    settings = [f"deepspeed.fp16={json.dumps(fp16)}", "data.eval_examples=0", "training.max_steps=20"]
    assert run_tiny(1, tmp_path / "run", *settings)["code"] == 0
    steps, final = records(tmp_path / "run"), summary(tmp_path / "run")
    skipped = [record for record in steps if record["skipped"]]
    assert skipped and final["steps_skipped"] == len(skipped)
    assert {record["block"] for record in skipped} == {0}  # an overflow keeps the block
    assert sum(final["updates_per_block"]) == 20 - len(skipped)
    assert steps[0]["loss_scale"] > steps[-1]["loss_scale"]
