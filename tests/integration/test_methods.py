"""Every training method through the launcher: its loop, export, resume and ranks; and its package used by hand."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.launch.methods.table import TRAINED
from tests.support.ranks import run_on_ranks
from tests.support.training import arguments, records, summary

ALONE = ("prefix", "adapter", "prelayer", "s4", "mezo-prefix")  # exported without the model
OPTIONS = {
    "bitfit": ["model.config.attention_bias=true"],
    "galore": ["method.galore_rank=16"],
    "badam": ["method.badam_switch_every=2"],
    "lomo": ["training.learning_rate=1e-1"],
    "mezo": ["training.learning_rate=1e-4"],
    "mezo-adam": ["training.learning_rate=1e-4"],
}
# One batch again and again, so that its loss falls.
SAME_BATCH = ["data.train_examples=4", "data.eval_examples=2", "training.micro_batch_size=4", "training.max_steps=6"]
QUIET = ["data.eval_examples=0", "output.export=false"]


# ---- what runs on the ranks ----------------------------------------------------------------------------------------


def train(argv: Sequence[str], stop_after: int | None = None, wrap: Any = contextlib.nullcontext) -> dict[str, Any]:
    """Run the command line on this rank; what was printed, and of the engine its weights' hash and its logits.

    Args:
        stop_after: raise once that many steps are recorded, as if the process had been killed there.
        wrap: makes the context in which the loop runs, from the engine.
    """
    import deepspeed

    from hift_ds.launch import run
    from hift_ds.launch import train as launcher
    from hift_ds.launch.callbacks import records as log_records
    from hift_ds.launch.runtime import process

    seen: dict[str, Any] = {}
    loop, export, record_step = run.train, run.export_model, log_records.RunLog.step

    def spy_loop(engine: Any, *rest: Any, **named: Any) -> None:
        context = wrap(engine) if wrap is not contextlib.nullcontext else wrap()
        with context as seen["wrapped"]:
            loop(engine, *rest, **named)
        seen["weights"] = hashes(engine.module)

    def spy_export(engine: Any, *rest: Any) -> None:
        engine.eval()
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage3(engine)),
        ):
            seen["logits"] = engine.module(**text()).logits
        export(engine, *rest)

    def step_until(log: Any, record: dict[str, Any], *left: Any) -> None:
        record_step(log, record, *left)
        if record["step"] == stop_after:
            raise KeyboardInterrupt

    code: Any = None
    printed = io.StringIO()
    clock = types.SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(run, "train", spy_loop))
        stack.enter_context(mock.patch.object(run, "export_model", spy_export))
        stack.enter_context(mock.patch.object(log_records.RunLog, "step", step_until))
        stack.enter_context(mock.patch.object(process, "time", clock))  # no rank waits for the launcher to end it
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        with contextlib.suppress(KeyboardInterrupt):
            code = launcher.main(list(argv))
    return {"code": code, "printed": printed.getvalue(), **seen}


def stage3(engine: Any) -> bool:
    return engine.zero_optimization_stage() == 3


def text() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def hashes(module: torch.nn.Module) -> dict[str, str]:
    """Of each tensor that this rank holds, by name."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, tensor in module.state_dict().items()
    }


def train_and_load(argv: Sequence[str]) -> dict[str, Any]:
    """`train`, and how far the logits of what was exported are from the engine's."""
    from transformers import AutoModelForCausalLM

    from hift_ds.launch.methods.adapters import load_adapter

    result = train(argv)
    if result["code"] == 0:
        folder = loaded(argv).output.dir + "/model"
        result["alone"] = (Path(folder) / "adapter.json").exists()
        model = load_adapter(start(argv), folder) if result["alone"] else AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model.eval()(**text()).logits
        expected = result.pop("logits")
        result["apart"] = (logits - expected).abs().max().item() / expected.abs().max().item()
        with torch.no_grad():
            result["moved"] = (start(argv).eval()(**text()).logits - expected).abs().max().item()
    return result


def loaded(argv: Sequence[str]) -> Any:
    from hift_ds.launch.config.settings import load_settings
    from hift_ds.launch.train import parse

    given = parse(argv)
    return load_settings(given.config, given.set)


def start(argv: Sequence[str]) -> Any:
    """The model that the run begins with."""
    from transformers import set_seed

    from hift_ds.launch.model import loading

    settings = loaded(argv)
    tokenizer = loading.load_tokenizer(settings.model)
    set_seed(settings.training.seed)
    return loading.load_model(settings.model, loading.load_config(settings.model, tokenizer, None), settings.dtype)


# ---- short cuts ------------------------------------------------------------------------------------------------------


def run(out: Path, method: str, *overrides: str, ranks: int = 1, function: Any = train, **named: Any) -> dict[str, Any]:
    """Rank 0's result."""
    resume = named.pop("resume", None)
    given = arguments(out, f"method.name={method}", *OPTIONS.get(method, []), *overrides, resume=resume)
    return run_on_ranks(ranks, function, given, **named)[0]


def numbers(out: Path) -> list[list[Any]]:
    return [[one[key] for key in ("step", "loss", "learning_rate", "tokens", "skipped")] for one in records(out)]


# ---- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_trains_and_exports(method: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(out, method, *SAME_BATCH, function=train_and_load)
    assert result["code"] == 0, result["printed"]
    steps, final = records(out), summary(out)
    assert final["method"] == method and final["steps"] == len(steps) == 6 and final["steps_skipped"] == 0
    if TRAINED[method].engine == "mezo":
        assert all(0 < one["loss"] < 10 for one in steps)
    else:
        assert steps[-1]["loss"] < steps[0]["loss"]
    assert result["alone"] is (method in ALONE)
    assert result["moved"] > 0
    # LoRA's product is added to the weights, which rounds otherwise; all else is the same numbers.
    assert result["apart"] < 1e-5 if "lora" in method else result["apart"] == 0


def test_lora_at_zero_3_is_exported_alone(tmp_path: Path) -> None:
    result = run(tmp_path, "lora", *SAME_BATCH, "deepspeed.zero_optimization.stage=3", function=train_and_load)
    assert result["code"] == 0, result["printed"]
    assert result["alone"] and result["moved"] > 0 and result["apart"] == 0


def test_bitfit_without_biases_is_refused(tmp_path: Path) -> None:
    result = run_on_ranks(1, train, arguments(tmp_path / "run", "method.name=bitfit"))[0]
    assert result["code"] == 2 and "Traceback" not in result["printed"]
    assert "error: method.name: 'bitfit' does not fit LlamaForCausalLM: it has no biases" in result["printed"]
    assert not (tmp_path / "run").exists()


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mezo", "mezo-adam", "mezo-lora", "lomo", "lora"])
def test_resumed_run_equals_the_straight_one(method: str, tmp_path: Path) -> None:
    """Stopped after step 5, the last checkpoint being of step 4."""
    settings = ["training.save_every=2", "training.max_steps=6", "training.lr_schedule=linear", *QUIET]
    settings += ["training.micro_batch_size=4"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    expected = run(straight, method, *settings)
    assert expected["code"] == 0, expected["printed"]
    assert run(stopped, method, *settings, stop_after=5)["code"] is None
    resumed = run(stopped, method, *settings, resume="yes")
    assert resumed["code"] == 0, resumed["printed"]
    assert resumed["weights"] == expected["weights"]
    assert numbers(stopped) == numbers(straight) and len(numbers(stopped)) == 6
    assert len({rate for _, _, rate, _, _ in numbers(straight)}) == 6
    again = run(stopped, method, *settings, resume="auto")
    assert again["code"] == 0 and "nothing to do" in again["printed"]  # also where no model was to be written


@pytest.mark.parametrize(("method", "changed"), [("lora", "method.lora_alpha=32"), ("mezo", "method.mezo_eps=1e-2")])
def test_resume_with_another_option_of_the_method_is_refused(method: str, changed: str, tmp_path: Path) -> None:
    settings = ["training.save_every=2", "training.max_steps=4", *QUIET]
    run(tmp_path / "run", method, *settings, stop_after=3)
    result = run(tmp_path / "run", method, *settings, changed, resume="yes")
    assert result["code"] == 2 and "made with other settings" in result["printed"]
    assert changed.partition("=")[0].partition(".")[2] in result["printed"]


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mezo", "mezo-lora", "badam", "galore"])
def test_two_ranks_equal_one(method: str, tmp_path: Path) -> None:
    """Bit for bit: the sum of two micro-batches' gradients or losses, be they of one rank or of two.

    BAdam changes its block every two steps, in more steps than it has blocks.
    """
    settings = ["training.max_steps=16" if method == "badam" else "training.max_steps=4", *QUIET]
    one = run(tmp_path / "1", method, *settings)
    two = run_on_ranks(
        2, train, arguments(tmp_path / "2", f"method.name={method}", *OPTIONS.get(method, []), *settings)
    )
    assert one["code"] == 0, one["printed"]
    assert [other["code"] for other in two] == [0, 0], two[0]["printed"]
    assert two[0]["weights"] == two[1]["weights"]
    assert numbers(tmp_path / "2") == numbers(tmp_path / "1")
    assert two[0]["weights"] == one["weights"]


def test_lomo_on_two_ranks_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path / "run", "lomo", "training.micro_batch_size=2", *QUIET, ranks=2)
    assert result["code"] == 2 and "use one rank" in result["printed"] and "Traceback" not in result["printed"]
    assert not (tmp_path / "run").exists()


def test_lomo_does_not_accumulate(tmp_path: Path) -> None:
    result = run(tmp_path / "run", "lomo", "training.micro_batch_size=2", *QUIET)
    assert result["code"] == 2 and "training.micro_batch_size=4" in result["printed"]


@pytest.mark.parametrize("method", ["badam", "galore", "lora", "mezo"])
def test_two_micro_batches_are_the_batch_of_both(method: str, tmp_path: Path) -> None:
    """The loss of each step, up to rounding, which Adam's first steps make larger."""
    losses = []
    for micro in (2, 4):
        out = tmp_path / str(micro)
        settings = [f"training.micro_batch_size={micro}", "training.max_steps=4", "training.learning_rate=1e-4", *QUIET]
        assert run(out, method, *settings)["code"] == 0
        losses.append([one["loss"] for one in records(out)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


# ---- the packages used by hand ---------------------------------------------------------------------------------------


class _Model:
    """As much of an engine as the loss needs."""

    device = torch.device("cpu")

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


def by_hand(argv: Sequence[str], package: str) -> dict[str, str]:
    """The same steps without launch/'s engines and loop: the package as its authors show it; the weights' hashes."""
    from hift_ds.launch.data.batches import collate, trained_tokens
    from hift_ds.launch.data.loading import load_data
    from hift_ds.launch.model import loading
    from hift_ds.launch.model.batch_loss import summed_loss
    from tests.support.data_fixtures import window_batches

    settings = loaded(argv)
    tokenizer = loading.load_tokenizer(settings.model)
    data = load_data(settings.data, tokenizer, task="causal-lm", seed=settings.training.seed)
    model = start(argv).train()
    step = _PACKAGES[package](model, settings.deepspeed["optimizer"]["params"]["lr"])
    windows = window_batches(len(data.train), settings.training.seed, 4, 4, 0, 1)
    for _ in range(settings.training.max_steps):
        (indices,) = next(windows)
        batch = collate([data.train[i] for i in indices], tokenizer.pad_token_id)
        targets = trained_tokens(batch)
        step(lambda batch=batch, n=targets: summed_loss(_Model(model), batch, "causal-lm", _chunk(settings)) / n)
    return hashes(model)


def _chunk(settings: Any) -> int | None:
    return settings.training.loss_chunk


def _lomo(model: Any, rate: float, clip: float | None = 1.0) -> Callable[[Any], None]:
    from lomo_optim import Lomo

    optimizer = Lomo(model, lr=rate, clip_grad_norm=clip)

    def step(loss: Callable[[], torch.Tensor]) -> None:
        value = loss()
        if clip:
            optimizer.grad_norm(value)
        optimizer.fused_backward(value, rate)

    return step


def _clipped(model: Any, optimizer: Any) -> Callable[[Any], None]:
    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    return step


def _galore(model: Any, rate: float) -> Callable[[Any], None]:
    from galore_torch import GaLoreAdamW

    inner = [p for name, p in model.named_parameters() if "_proj" in name]
    rest = [p for name, p in model.named_parameters() if "_proj" not in name]
    groups = [
        {"params": rest},
        {"params": inner, "rank": 16, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    ]
    return _clipped(model, GaLoreAdamW(groups, lr=rate, weight_decay=0.0, no_deprecation_warning=True))


def _badam(model: Any, rate: float) -> Callable[[Any], None]:
    from badam import BlockOptimizer

    layers = [[f"model.layers.{i}."] for i in range(4)]
    optimizer = BlockOptimizer(
        torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0),
        list(model.named_parameters()),
        [["model.embed_tokens."], *layers, ["model.norm."]],
        switch_block_every=2,
        switch_mode="ascending",
        verbose=0,
    )
    return _clipped(model, optimizer)


def _mezo(model: Any, rate: float, adam: bool = False) -> Callable[[Any], None]:
    from hift_ds import MeZO

    optimizer = MeZO(model, rate, eps=1e-3, adam=adam)
    return lambda loss: optimizer.step(lambda: loss().item())  # type: ignore[arg-type,return-value]


_PACKAGES: dict[str, Callable[[Any, float], Callable[[Any], None]]] = {
    "lomo": _lomo,
    "lomo without clipping": functools.partial(_lomo, clip=None),
    "galore": _galore,
    "badam": _badam,
    "mezo": _mezo,
    "mezo-adam": functools.partial(_mezo, adam=True),
}


@pytest.mark.parametrize(
    ("package", "overrides"),
    [
        ("lomo", []),
        ("lomo", ["training.loss_chunk=8"]),
        ("lomo", ["model.gradient_checkpointing=true"]),
        ("lomo without clipping", ["training.max_grad_norm=0"]),
        ("galore", []),
        ("badam", ["method.badam_order=ascending", "training.max_steps=13"]),
        ("mezo", []),
        ("mezo-adam", []),
    ],
    ids=str,
)
def test_equals_the_package_used_by_hand(package: str, overrides: list[str], tmp_path: Path) -> None:
    method = package.split()[0]
    settings = ["training.micro_batch_size=4", "training.max_steps=4", *QUIET, *overrides]
    ours = run(tmp_path / "run", method, *settings)
    assert ours["code"] == 0, ours["printed"]
    given = arguments(tmp_path / "run", f"method.name={method}", *OPTIONS.get(method, []), *settings)
    assert ours["weights"] == run_on_ranks(1, by_hand, given, package)[0]


def test_badam_trains_every_block_in_a_random_order(tmp_path: Path) -> None:
    """And what the package prints of it is not printed."""
    settings = ["method.badam_switch_every=1", "training.max_steps=6", *QUIET]
    argv = arguments(tmp_path / "run", "method.name=badam", *settings)
    ours = run_on_ranks(1, train, argv)[0]
    assert ours["code"] == 0 and "order" not in ours["printed"], ours["printed"]
    before = run_on_ranks(1, start_hashes, argv)[0]
    assert all(ours["weights"][name] != value for name, value in before.items())


def start_hashes(argv: Sequence[str]) -> dict[str, str]:
    return hashes(start(argv))


def test_galore_projects_gpt2s_matrices(tmp_path: Path) -> None:
    """Its Conv1D are matrices, too."""
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    settings = [f"model.config={json.dumps(config)}", "training.max_steps=2", *QUIET]
    results = [run(tmp_path / str(r), "galore", *settings, f"method.galore_rank={r}") for r in (4, 16)]
    assert [one["code"] for one in results] == [0, 0], results[0]["printed"] + results[1]["printed"]
    # The rank of a projection decides the first step already; what is not projected has the same one.
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    for name in (f"transformer.h.{layer}.{name}.weight" for layer in (0, 1) for name in names):
        assert results[0]["weights"][name] != results[1]["weights"][name], f"{name} was not projected"


# ---- memory ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted(engine: Any) -> Any:
    """Bytes of the weights, and the most that was alive above them in the loop."""
    from tests.support.device_memory import DeviceMemory

    found: dict[str, int] = {}
    with DeviceMemory() as memory:
        memory.declare(engine.module.state_dict().values(), label="weights")
        memory.reset()
        yield found
        found |= {"weights": memory.live["weights"], "above": memory.peak["total"] - memory.live["weights"]}


def train_counted(argv: Sequence[str]) -> dict[str, Any]:
    return train(argv, wrap=_counted)


@pytest.mark.parametrize("method", ["mezo", "lora"])
def test_mezo_keeps_no_second_copy(method: str, tmp_path: Path) -> None:
    """Above the weights: MeZO has parts of them at a time, and activations; LoRA, as a check of the count, more."""
    rows = [{"prompt": f"{i}", "completion": "a"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data.name=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.train_examples=null", *QUIET]
    settings += ["training.max_steps=2", "training.batch_size=1", "training.micro_batch_size=1"]
    result = run(tmp_path / "run", method, *settings, function=train_counted)
    assert result["code"] == 0, result["printed"]
    counted = result["wrapped"]
    assert counted["weights"] > 500_000
    assert (counted["above"] < 0.4 * counted["weights"]) is (method == "mezo"), counted
