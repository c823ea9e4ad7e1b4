"""A checkpoint continues with another number of ranks, ZeRO stage, cut into blocks or placement, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support import tiny
from tests.support.pairwise import others_slow
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case

Held = dict[str, dict[str, Any]]


def held(engine: Any) -> Held:
    """In a rank: weight, master, moments and number of updates of each parameter, not by what loads checkpoints."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine.block_optimizers.settle()
    found: Held = {name: {"weight": weight} for name, weight in tiny.weights(engine).items()}
    named = dict(engine.module.named_parameters())
    for block, optimizer in zip(engine.blocks, of_blocks(engine), strict=True):
        state = optimizer.optimizer.state
        for name in block.parameter_names:
            parameter = named[name]
            if engine.zero_optimization_stage():
                found[name]["master"] = safe_get_full_fp32_param(parameter).clone()
                for moment in ("exp_avg", "exp_avg_sq"):
                    found[name][moment] = safe_get_full_optimizer_state(parameter, moment).clone()
                counts = {float(state[master]["step"]) for master, _ in optimizer.masters()}
            else:
                with optimizer.decoded(changes=False):
                    optimizer.block_state.decode({"exp_avg", "exp_avg_sq"})
                    weights = optimizer._weights
                    (index,) = (i for i, weight in enumerate(weights) if weight is parameter)
                    master = optimizer.masters()[index][0]
                    found[name]["master"] = master.detach().clone()
                    found[name] |= {m: state[master][m].clone() for m in ("exp_avg", "exp_avg_sq")}
                    counts = {float(state[master]["step"])}
                    optimizer.block_state.discard_decoded()
            (found[name]["updates"],) = counts
    return found


def of_blocks(engine: Any) -> list[Any]:
    optimizers = engine.block_optimizers
    return [optimizers.optimizers[index] for index, _ in optimizers._places]


def saved(case: Case, folder: str, steps: int) -> Held:
    """In a rank: train and save."""
    engine = tiny.initialize(case)
    try:
        for step in range(steps):
            tiny.optimizer_step(engine, step)
        before = held(engine)
        engine.save_checkpoint(folder, tag="saved", client_state={"note": "kept"})
        return before
    finally:
        engine.destroy()


def loaded(case: Case, folder: str) -> tuple[Held, tuple[Any, ...], dict[str, torch.Tensor]]:
    """In a rank: what a new engine has of a checkpoint, where it continues, and its weights two steps later."""
    model = tiny.model(case.dtype, case.tied)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    engine = tiny.initialize(case, llama=model)
    try:
        _, client_state = engine.load_checkpoint(folder, tag="saved")
        assert client_state["note"] == "kept"
        after, place = held(engine), (engine.global_steps, engine.cycle, engine.active_block)
        for step in range(2):
            tiny.optimizer_step(engine, 100 + step)
        return after, place, tiny.weights(engine)
    finally:
        engine.destroy()


def differences(ours: Held, truth: Held, but: tuple[str, ...] = ()) -> list[str]:
    assert ours.keys() == truth.keys()
    found = []
    for name, values in truth.items():
        for what, value in values.items():
            if what not in but and not torch.equal(
                torch.as_tensor(ours[name][what]).view(-1), torch.as_tensor(value).view(-1)
            ):
                found.append(f"{what} of {name}")
    return found


BF16, HOST = {"dtype": "bf16"}, {"waiting": "cpu"}
PAIRS = [
    (Case(stage=2, ranks=2), Case(stage=0)),
    (Case(stage=0, **BF16), Case(stage=3, ranks=2, **BF16)),
    (Case(stage=3, ranks=2, **BF16), Case(stage=2, **BF16, layers_per_block=2)),
    (Case(stage=3, ranks=2, max_block_numel=1600), Case(stage=1, ranks=2)),
    (Case(stage=1), Case(stage=2, ranks=2, max_block_numel=1600, balance=True)),
    (Case(stage=2, ranks=2, **BF16), Case(stage=0, ranks=2, **BF16, **HOST, layers_per_block=2)),
    (Case(stage=0, **BF16, **HOST), Case(stage=3, ranks=2, **BF16, **HOST)),
    (Case(stage=2, ranks=2, **HOST), Case(stage=2, **HOST, layers_per_block=2)),
    (Case(stage=0), Case(stage=3, ranks=2, place="none")),
    (Case(stage=3, **BF16), Case(stage=0, **BF16, layers_per_block=2)),
    (Case(stage=3, tied=True, **BF16), Case(stage=0, tied=True, **BF16)),
]


@pytest.mark.parametrize("before, after", others_slow(PAIRS, PAIRS[:6]), ids=str)
def test_state_is_found_by_name(before: Case, after: Case, tmp_path: Path) -> None:
    truth = run_on_ranks(before.ranks, saved, before, str(tmp_path), before.k)[0]
    results = run_on_ranks(after.ranks, loaded, after, str(tmp_path))
    for ours, place, weights in results:
        assert not differences(ours, truth)
        assert place == (before.k, 1, 0)
        assert all(value.isfinite().all() for value in weights.values())
        assert any(not torch.equal(weights[name], truth[name]["weight"]) for name in weights)


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_in_the_middle_of_a_cycle_other_ranks_continue(ranks: tuple[int, int], tmp_path: Path) -> None:
    before, after = (Case(stage=stage, ranks=count) for stage, count in zip((2, 3), ranks, strict=True))
    steps = before.k + 2  # the first two blocks have one update more
    truth = run_on_ranks(before.ranks, saved, before, str(tmp_path), steps)[0]
    assert len({values["updates"] for values in truth.values()}) == 2
    for ours, place, _ in run_on_ranks(after.ranks, loaded, after, str(tmp_path)):
        assert not differences(ours, truth)
        assert place == (steps, 1, 2)


def test_codes_are_encoded_anew_where_they_are_cut_elsewhere(tmp_path: Path) -> None:
    before = Case(stage=2, ranks=2, dtype="bf16", moments="8bit")
    after = replace(before, ranks=1, layers_per_block=2)
    truth = run_on_ranks(2, saved, before, str(tmp_path), before.k)[0]
    ((ours, _, _),) = run_on_ranks(1, loaded, after, str(tmp_path))
    assert not differences(ours, truth, but=("exp_avg", "exp_avg_sq"))
    for moment in ("exp_avg", "exp_avg_sq"):
        error = sum((ours[n][moment] - truth[n][moment]).square().sum() for n in truth)
        assert 0 < error < 4e-4 * sum(truth[n][moment].square().sum() for n in truth)


def refusals(cases: list[tuple[Case, tuple[str, ...]]], folder: str) -> list[str]:
    """In a rank: what runs are told that cannot continue; each must leave the model as it was."""
    messages = []
    for case, freeze in cases:
        model = tiny.model(case.dtype, case.tied)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in freeze)
        engine = tiny.initialize(case, llama=model)
        start = tiny.weights(engine)
        with pytest.raises(ValueError) as error:
            engine.load_checkpoint(folder, tag="saved")
        messages.append(str(error.value))
        assert tiny.identical(tiny.weights(engine), start)
        engine.destroy()
    return messages


def test_what_cannot_continue_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    case = Case(stage=1)
    run_on_ranks(1, saved, case, str(tmp_path), case.k)
    cases = [
        (replace(case, dtype="bf16"), ()),
        (replace(case, optimizer="SGD"), ()),
        (case, ("model.norm.weight",)),
        (replace(case, decay_groups=True), ()),
    ]
    dtype, optimizer, frozen, groups = run_on_ranks(1, refusals, cases, str(tmp_path))[0]
    assert "dtype of the weights: bfloat16 now, float32 in the checkpoint" in dtype
    assert "it is state of AdamW, and this run uses SGD" in optimizer
    assert "model.norm.weight" in frozen and "hift.freeze" in frozen
    assert "it has 1 parameter groups, and this run has 2" in groups


def unreadable(folder: str) -> tuple[str, bool]:
    """In a rank: what all ranks are told if one of them cannot read a file, and whether the weights are as before."""
    engine = tiny.initialize(Case(stage=2, ranks=2))
    start, load = tiny.weights(engine), engine.checkpoint_engine.load

    def fail(path: str, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 1 and "optim_states" in path:
            raise OSError(5, "Input/output error", path)
        return load(path, **kwargs)

    try:
        with mock.patch.object(engine.checkpoint_engine, "load", fail), pytest.raises(ValueError) as error:
            engine.load_checkpoint(folder, tag="saved")
        return str(error.value), tiny.identical(tiny.weights(engine), start)
    finally:
        engine.destroy()


def test_a_rank_that_cannot_read_stops_all(tmp_path: Path) -> None:
    run_on_ranks(2, saved, Case(stage=2, ranks=2), str(tmp_path), Case().k)
    results = run_on_ranks(2, unreadable, str(tmp_path))
    for message, is_unchanged in results:
        assert message.startswith("rank 1 could not load the checkpoint: ") and "Input/output error" in message
        assert is_unchanged


def weights_alone(case: Case, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int, str, bool]:
    """In a rank: weights and masters that were loaded without the rest, the steps done, and what a model with one layer
    less is told, and whether it has the others if it asks for no more."""
    engine = tiny.initialize(case)
    try:
        engine.load_checkpoint(folder, tag="saved", load_module_only=True)
        weights, masters, steps = tiny.weights(engine), tiny.masters(engine), engine.global_steps
    finally:
        engine.destroy()
    engine = tiny.initialize(case, llama=tiny.model(case.dtype, layers=tiny.LAYERS - 1))
    try:
        with pytest.raises((ValueError, RuntimeError)) as error:
            engine.load_checkpoint(folder, tag="saved", load_module_only=True)
        engine.load_checkpoint(folder, tag="saved", load_module_only=True, load_module_strict=False)
        others = tiny.weights(engine)
        return (
            weights,
            masters,
            steps,
            str(error.value),
            all(torch.equal(others[name], weights[name]) for name in others),
        )
    finally:
        engine.destroy()


@pytest.mark.parametrize("before, after", ((2, 3), (3, 3), (3, 1)))
def test_weights_alone_are_loaded_from_any_stage(before: int, after: int, tmp_path: Path) -> None:
    case = Case(stage=before, ranks=2, dtype="bf16")
    truth = run_on_ranks(2, saved, case, str(tmp_path), case.k)[0]
    (weights, masters, steps, error, has_others) = run_on_ranks(
        1, weights_alone, Case(stage=after, dtype="bf16"), str(tmp_path)
    )[0]
    assert all(torch.equal(weights[name], values["weight"]) for name, values in truth.items())
    assert all(torch.equal(masters[name], weights[name].float().view(-1)) for name in truth)
    assert steps == 0 and f"layers.{tiny.LAYERS - 1}." in error and has_others


def saved_in_part(case: Case, frozen: str, folder: str) -> dict[str, torch.Tensor]:
    """In a rank: train with a frozen weight, and save without it."""
    engine = with_frozen(case, frozen)
    try:
        tiny.optimizer_step(engine, 0)
        engine.save_checkpoint(folder, tag="saved", exclude_frozen_parameters=True)
        return tiny.weights(engine)
    finally:
        engine.destroy()


def loaded_in_part(case: Case, frozen: str, folder: str) -> dict[str, torch.Tensor]:
    engine = with_frozen(case, frozen)
    try:
        engine.load_checkpoint(folder, tag="saved", load_module_strict=False)
        return tiny.weights(engine)
    finally:
        engine.destroy()


def with_frozen(case: Case, frozen: str) -> Any:
    model = tiny.model(case.dtype)
    model.get_parameter(frozen).requires_grad_(False)
    return tiny.initialize(case, llama=model)


@pytest.mark.parametrize("before, after", ((3, 3), (3, 2), (2, 3)))
def test_frozen_weights_may_be_left_out(before: int, after: int, tmp_path: Path) -> None:
    frozen = "model.embed_tokens.weight"
    (truth, _) = run_on_ranks(2, saved_in_part, Case(stage=before, ranks=2), frozen, str(tmp_path))
    (weights,) = run_on_ranks(1, loaded_in_part, Case(stage=after), frozen, str(tmp_path))
    assert tiny.identical(weights, truth)


def weights_of_frozen(case: Case, folder: str) -> dict[str, torch.Tensor]:
    engine = with_frozen(case, "model.embed_tokens.weight")
    try:
        engine.load_checkpoint(folder, tag="saved", load_module_only=True)
        return tiny.weights(engine)
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", (2, 3))
def test_weights_of_a_run_that_trained_what_is_frozen_now(stage: int, tmp_path: Path) -> None:
    (truth,) = run_on_ranks(1, saved, Case(stage=stage), str(tmp_path), Case().k)
    (weights,) = run_on_ranks(1, weights_of_frozen, Case(stage=stage), str(tmp_path))
    assert all(torch.equal(weights[name], values["weight"]) for name, values in truth.items())


def saved_without_hift(case: Case, folder: str) -> dict[str, torch.Tensor]:
    """In a rank: train without HiFT, and save."""
    import hift_ds

    model = tiny.model(case.dtype)
    model.model.norm.weight.requires_grad_(False)
    config = {**tiny.ds_config(case), "hift": {"enabled": False}}
    engine = hift_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    try:
        tiny.optimizer_step(engine, 0)
        engine.save_checkpoint(folder, tag="saved")
        return tiny.weights(engine)
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", (0, 3))
def test_weights_of_a_run_without_hift_at_zero_3(stage: int, tmp_path: Path) -> None:
    (truth, _) = run_on_ranks(2, saved_without_hift, Case(stage=3, ranks=2), str(tmp_path))
    (weights,) = run_on_ranks(1, weights_of_frozen, Case(stage=stage), str(tmp_path))
    assert tiny.identical(weights, truth)


def refused_shapes(case: Case, folder: str) -> tuple[list[str], bool]:
    """In a rank: what a model with a smaller vocabulary is told, and whether its weights are as before."""
    model = tiny.model(case.dtype)
    model.resize_token_embeddings(48)
    engine = tiny.initialize(case, llama=model)
    start, messages = tiny.weights(engine), []
    try:
        for alone in (False, True):
            with pytest.raises(ValueError) as error:
                engine.load_checkpoint(folder, tag="saved", load_module_only=alone)
            messages.append(str(error.value))
        return messages, tiny.identical(tiny.weights(engine), start)
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", (0, 3))
def test_weights_of_another_shape_are_refused_and_change_nothing(stage: int, tmp_path: Path) -> None:
    run_on_ranks(1, saved, Case(stage=stage), str(tmp_path), Case().k)
    ((messages, is_unchanged),) = run_on_ranks(1, refused_shapes, Case(stage=stage), str(tmp_path))
    for message in messages:
        assert "2 weights have another shape" in message
        assert "model.embed_tokens.weight [64, 32] in the checkpoint, [48, 32] in this run" in message
    assert is_unchanged


class CountsInOne(torch.optim.Optimizer):
    """Counts in the last tensor of a call only, as DeepSpeed's FusedAdam does."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = {"step": 0, "sum": torch.zeros_like(parameter)}
                self.state[parameter]["sum"].add_(parameter.grad)
            self.state[group["params"][-1]]["step"] += 1
            rate = group["lr"] / self.state[group["params"][-1]]["step"]
            for parameter in group["params"]:
                parameter.sub_(self.state[parameter]["sum"], alpha=rate)


def counted(case: Case, folder: str, is_new: bool) -> set[int]:
    """In a rank: the counts of all masters after a cycle, saved if it is new, else loaded."""
    import hift_ds

    model = tiny.model(case.dtype)
    config = tiny.ds_config(case)
    engine = hift_ds.initialize(model=model, optimizer=CountsInOne(model.parameters()), config=config)[0]
    try:
        if not is_new:
            engine.load_checkpoint(folder, tag="saved")
        for step in range(engine.steps_per_cycle):
            tiny.optimizer_step(engine, step)
        if is_new:
            engine.save_checkpoint(folder, tag="saved")
        return {state["step"] for block in of_blocks(engine) for state in block.optimizer.state.values()}
    finally:
        engine.destroy()


def test_counts_of_an_optimizer_that_counts_in_one_tensor_of_a_call(tmp_path: Path) -> None:
    case = Case(stage=0, dtype="bf16", client_optimizer=True)
    assert run_on_ranks(1, counted, case, str(tmp_path), True) == [{1}]
    assert run_on_ranks(1, counted, replace(case, layers_per_block=2), str(tmp_path), False) == [{2}]
    assert run_on_ranks(1, counted, replace(case, stage=2), str(tmp_path), False) == [{2}]


def settings_of_another_class(case: Case, folder: str) -> dict[str, Any]:
    """In a rank: the settings of a run with a class of the same state, after a checkpoint was loaded."""
    import hift_ds

    model = tiny.model(case.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, fused=True)
    engine = hift_ds.initialize(model=model, optimizer=optimizer, config=tiny.ds_config(case))[0]
    try:
        engine.load_checkpoint(folder, tag="saved")
        return {key: value for key, value in engine.optimizer.param_groups[0].items() if key != "params"}
    finally:
        engine.destroy()


def test_how_a_run_computes_is_not_in_a_checkpoint(tmp_path: Path) -> None:
    case = Case(stage=1, client_optimizer=True)
    run_on_ranks(1, saved, case, str(tmp_path), case.k)
    (settings,) = run_on_ranks(1, settings_of_another_class, case, str(tmp_path))
    assert settings["fused"] is True and settings["decoupled_weight_decay"] is False  # torch's AdamW has them otherwise
    assert settings["lr"] == tiny.LEARNING_RATE


def moments(case: Case, folder: str, saves: bool) -> dict[str, torch.Tensor]:
    """In a rank: the first moments of a run that saves a checkpoint, or that continues it and takes one more step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = tiny.initialize(case)
    try:
        if saves:
            for step in range(case.k):
                tiny.optimizer_step(engine, step)
            engine.save_checkpoint(folder, tag="saved")
        else:
            engine.load_checkpoint(folder, tag="saved")
        engine.block_optimizers.settle()
        named = engine.module.named_parameters()
        found = {name: safe_get_full_optimizer_state(p, "exp_avg").clone() for name, p in named}
        tiny.optimizer_step(engine, 100)
        return found
    finally:
        engine.destroy()


@pytest.mark.parametrize("moves_to_host", (True, False))
def test_the_step_moves_to_the_host_and_back(moves_to_host: bool, tmp_path: Path) -> None:
    before, after = (Case(stage=2, offload=at) for at in (not moves_to_host, moves_to_host))
    (truth,) = run_on_ranks(1, moments, before, str(tmp_path), True)
    (found,) = run_on_ranks(1, moments, after, str(tmp_path), False)
    assert tiny.identical(found, truth)
