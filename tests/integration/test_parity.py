"""The engine against the plain loop of Algorithm 1: pairwise tables of every setting that changes how it computes.

Weight decay, accumulation over two micro-batches and clipping that fires are on in all of them. Past bugs are pinned.
tests/proofs/test_parity.py has more combinations.
"""

from dataclasses import replace

import pytest
import torch

from tests.support import tiny
from tests.support.pairwise import Row, pairwise
from tests.support.parity import FINER, STAGES, STRATEGIES, cases, check, expected_order, train
from tests.support.ranks import run_on_ranks
from tests.support.tiny import ONE_RATE, OPTIMIZERS, SCHEDULERS, Case

DISTRIBUTED = {"stage": STAGES, "ranks": (1, 2), "dtype": ("fp32", "bf16", "fp16"), "offload": (False, True)}
BY_CONFIG = {"AdamW", "Adam", "SGD", "momentum", "Adagrad", "Lion"}  # the DeepSpeed section can name them
BY_CLIENT = {"AdamW", "RMSprop", "NAdam", "momentum", "Adafactor"}
ON_THE_HOST = {"AdamW", "Adam", "Adagrad", "Lion"}  # DeepSpeed has kernels for them


def possible(row: Row) -> bool:
    if row["stage"] == 0 and (row["offload"] or row["dtype"] == "fp16"):
        return False  # DeepSpeed has neither
    if row["dtype"] != "fp32" and row["ranks"] > 1:
        return False  # ranks add 16-bit gradients in another order than the reference
    if row["offload"] and row.get("max_block_numel") == FINER and row["dtype"] != "fp32":
        return False  # the last bit of DeepSpeed's CPU Adam flips 16-bit weights, and small blocks amplify it
    if "optimizer" in row:
        if row["optimizer"] not in (BY_CLIENT if row["client_optimizer"] else BY_CONFIG):
            return False
        if row["offload"] and (row["client_optimizer"] or row["optimizer"] not in ON_THE_HOST):
            return False
        if row["decay_groups"] and row["scheduler"] in ONE_RATE:
            return False  # the groups here have rates of their own
        if row["optimizer"] == "Adafactor" and (row["stage"] or row["ranks"] > 1):
            return False  # refused: it needs the shapes of tensors
    return True


BLOCKS = {
    "strategy": STRATEGIES,
    "layers_per_block": (1, 2, 4, 6),  # 4: the last block is shorter
    "steps_per_block": (1, 2),
    "max_block_numel": (None, FINER),
}


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(**row) for row in pairwise(DISTRIBUTED | BLOCKS, possible)],
        # The two that share a file of gradients; a tensor that two blocks share, and that is tied.
        [Case(stage=3, ranks=2, offload=True), Case(stage=2, ranks=2, offload=True)],
        [Case(stage=3, ranks=2, waiting="cpu", layers_per_block=2), Case(stage=3, waiting="cpu", dtype="bf16")],
        [Case(stage=2, max_block_numel=FINER, tied=True, steps_per_block=2)],
        [Case(stage=2, max_block_numel=FINER, step="block", optimizer="momentum")],
        [
            Case(
                stage=stage,
                max_block_numel=FINER,
                offload=True,
                dtype=d,
                optimizer="Adagrad" if d != "fp32" else "AdamW",
            )
            for stage, d in ((1, "bf16"), (2, "fp32"), (3, "fp16"))
        ],
        [
            Case(stage=stage, max_block_numel=FINER, place="none", dtype=d)
            for stage, d in ((0, "fp32"), (2, "bf16"), (3, "fp32"))
        ],
        [Case(stage=3, max_block_numel=FINER, optimizer="Adagrad"), Case(stage=1, max_block_numel=2100, offload=True)],
        [Case(stage=stage, balance=True, ranks=ranks) for stage, ranks in ((0, 1), (2, 2), (3, 1))],
    ),
    ids=str,
)
def test_blocks(case: Case) -> None:
    if case.max_block_numel or case.balance:  # smaller blocks have smaller gradients, and there are more of them
        once = case.strategy == "bottom2up" or case.steps_per_block > 1
        case = replace(case, clip=0.005, cycles=1 if once else 2)
    check(case)


OPTIONS = {
    "optimizer": tuple(OPTIMIZERS),
    "client_optimizer": (False, True),
    "scheduler": (None, *SCHEDULERS),
    "decay_groups": (False, True),
}


@pytest.mark.parametrize(
    "case",
    cases(
        [
            Case(layers_per_block=3, cycles=3 if row["scheduler"] else 2, **row)
            for row in pairwise(DISTRIBUTED | OPTIONS, possible)
        ],
        # torch before 2.13 does not make Adagrad's sums in a step.
        [Case(stage=2, ranks=2, optimizer="Adagrad", layers_per_block=2)],
        [Case(stage=2, offload=True, strategy="random", layers_per_block=4, optimizer="Lion")],
        [Case(stage=stage, scheduler="torch", steps_per_block=2, layers_per_block=2) for stage in (0, 3)],
    ),
    ids=str,
)
def test_optimizers(case: Case) -> None:
    check_schedule(case) if case.scheduler else check(case)


@pytest.mark.parametrize(
    "case",
    [Case(**row) for row in pairwise(DISTRIBUTED | {"tied": (False, True), "checkpointing": (False, True)}, possible)],
    ids=str,
)
def test_models(case: Case) -> None:
    check(replace(case, layers_per_block=2, cycles=1))


def check_schedule(case: Case) -> None:
    """Hold a run against the plain loop, and its learning rates against the schedule: one tick a cycle."""
    ours = check(case)
    rates = tiny.scheduled_rates(case)
    assert rates is not None and len(set(rates[: case.cycles])) > 1
    a_cycle = case.k * case.steps_per_block
    assert ours.rates == pytest.approx([rates[step // a_cycle] for step in range(case.steps)], rel=1e-12)


def check_stock(case: Case) -> None:
    """Bit for bit. Stock DeepSpeed's step on the host adds up the gradients' norm in another order, and clips by it.

    Not at stage 0 in bf16: there stock DeepSpeed's set-up takes an optimizer step on zero gradients
    (`FP16_Optimizer.initialize_optimizer_states`), which decays the weights and shifts Adam's step count by one."""
    ((ours, _, _),) = run_on_ranks(1, train, case)
    ((stock, _, _),) = run_on_ranks(1, train, case, stock=True)
    assert tiny.largest_difference(ours.end, stock.end) <= (1e-7 if case.offload else 0)
    assert ours.rates == stock.rates
    assert tiny.largest_difference(ours.end, ours.start) > 0


STOCK = {
    "stage": STAGES,
    "dtype": ("fp32", "bf16"),
    "offload": (False, True),
    "optimizer": ("AdamW", "Adagrad"),
    "scheduler": (None, "torch"),
    "decay_groups": (False, True),
    "tied": (False, True),
}


def comparable(row: Row) -> bool:
    if row["stage"] == 0:
        return not row["offload"] and row["dtype"] == "fp32"
    # Stock DeepSpeed makes Adagrad anew: with all parameters in one group, and where a schedule does not reach it.
    return row["optimizer"] != "Adagrad" or not (row["decay_groups"] or row["scheduler"])


@pytest.mark.parametrize(
    "case",
    [Case(layers_per_block=6, **row) for row in pairwise(STOCK, comparable)],
    ids=str,
)
def test_all_layers_in_one_block_is_stock_deepspeed(case: Case) -> None:
    check_stock(case)


def refusal(case: Case) -> str:
    """In a rank: what `initialize` says against a case."""
    with pytest.raises(ValueError) as error:
        tiny.initialize(case)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case(optimizer="Adafactor", client_optimizer=True), ("Adafactor", "element-wise")),
    ],
    ids=str,
)
def test_rows_are_refused_where_they_cannot_be(case: Case, said: tuple[str, ...]) -> None:
    (message,) = run_on_ranks(1, refusal, replace(case, max_block_numel=FINER))
    assert "hift.max_block_numel" in message and "model.embed_tokens.weight by rows" in message
    assert all(part in message for part in said)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_an_optimizer_that_needs_shapes_is_refused_where_zero_flattens(stage: int) -> None:
    (message,) = run_on_ranks(1, refusal, Case(stage=stage, optimizer="Adafactor", client_optimizer=True))
    assert "Adafactor" in message and f"stage={stage}" in message and "stage 0" in message


def train_with_unused(case: Case) -> tuple[float, list[float]]:
    """In a rank: trains a model with weights that the loss does not use, of an odd number and first in their layer.
    Returns how far they end from where weight decay alone takes them, and the norms of the gradients."""
    llama = tiny.model(case.dtype)
    torch.manual_seed(1)
    for layer in llama.model.layers[1:3]:
        layer._modules = {"unused": torch.nn.Linear(33, 31), **layer._modules}
    start = {name: p.detach().clone() for name, p in llama.named_parameters() if "unused" in name}
    engine = tiny.initialize(case, llama=llama)
    try:
        norms = []
        for step in range(case.steps):
            tiny.optimizer_step(engine, step)
            norms.append(float(engine.get_global_grad_norm()))
        end, decay = tiny.weights(engine), (1 - tiny.LEARNING_RATE * tiny.DECAY) ** case.cycles
        return tiny.largest_difference({n: end[n] for n in start}, {n: p * decay for n, p in start.items()}), norms
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=2),
        Case(stage=3),
        Case(stage=1, offload=True),
        Case(stage=3, ranks=2, offload=True),
        pytest.param(Case(stage=2, offload=True), marks=pytest.mark.slow),
        pytest.param(Case(stage=3, offload=True), marks=pytest.mark.slow),
        pytest.param(Case(stage=3, ranks=2), marks=pytest.mark.slow),
        pytest.param(Case(stage=2, ranks=2, offload=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_the_loss_does_not_use_gets_no_gradient_of_another_block(case: Case) -> None:
    difference, norms = run_on_ranks(case.ranks, train_with_unused, case)[0]
    assert difference <= 1e-7
    # Another block's gradients in the padding would be in the norm.
    truth = tiny.reference(replace(case, stage=0, offload=False), expected_order(case))
    assert norms == pytest.approx(truth.norms, rel=1e-4)


def settings(kind: str, stage: int, enabled: bool) -> list[tuple[object, ...]]:
    """In a rank: what an optimizer runs with whose config names nothing but the rate."""
    import hift_ds

    config = tiny.ds_config(Case(stage=stage))
    config["optimizer"] = {"type": kind, "params": {"lr": tiny.LEARNING_RATE}}
    config["hift"]["enabled"] = enabled
    engine, optimizer, _, _ = hift_ds.initialize(model=tiny.model(), config=config)
    names = ("lr", "betas", "eps", "weight_decay")
    try:
        return [tuple(group[name] for name in names) for group in optimizer.param_groups]
    finally:
        engine.destroy()


@pytest.mark.parametrize("kind", ("AdamW", "Adam"))
@pytest.mark.parametrize("stage", (0, 2))
def test_default_settings_are_deepspeeds(kind: str, stage: int) -> None:
    ours, stock = (run_on_ranks(1, settings, kind, stage, enabled)[0] for enabled in (True, False))
    assert ours == stock


def train_over_overflows(stage: int, dtype: str, ruined: tuple[int, ...]) -> list[tuple[int, bool, bool, float]]:
    """In a rank: 16 attempts at a step, those in `ruined` with an infinite loss. Of each attempt: the block that it was
    for, whether it was skipped, whether it left weights and masters as they were, the learning rate."""
    import hift_ds

    llama = tiny.model(dtype)
    config = tiny.ds_config(Case(stage=stage, dtype=dtype))
    if dtype == "fp16":  # starts with a scale that overflows
        config["fp16"] |= {"initial_scale_power": 20, "hysteresis": 1}
    else:
        config["bf16"] |= {"check_grad_overflow": True}
    engine = hift_ds.initialize(model=llama, config=config, lr_scheduler=tiny.halved_each_tick)[0]
    try:
        attempts = []
        for step in range(16):
            before = tiny.weights(engine), tiny.masters(engine)
            block, rate, skipped = engine.active_block, engine.get_lr()[0], engine.skipped_steps
            for micro in range(tiny.ACCUMULATION):
                loss = engine(**tiny.micro_batch(step, micro)).loss
                engine.backward(loss * float("inf") if step in ruined else loss)
                engine.step()
            after = tiny.weights(engine), tiny.masters(engine)
            kept = all(tiny.largest_difference(a, b) == 0 for a, b in zip(before, after, strict=True))
            attempts.append((block, engine.skipped_steps > skipped, kept, rate))
        return attempts
    finally:
        engine.destroy()


def check_overflows(attempts: list[tuple[int, bool, bool, float]]) -> None:
    done = 0
    for block, skipped, kept, rate in attempts:
        assert block == done % 6, "the block changed after a skipped step, or did not after a good one"
        assert kept == skipped, "a skipped step changed something, or a good one nothing"
        assert rate == tiny.LEARNING_RATE * 0.5 ** (done // 6)
        done += not skipped
    assert 6 < done < len(attempts)


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_keeps_the_block(stage: int) -> None:
    ruined = (0, 3, 4, 8)  # the first of all, two in a row, one after a cycle
    (attempts,) = run_on_ranks(1, train_over_overflows, stage, "bf16", ruined)
    assert tuple(i for i, attempt in enumerate(attempts) if attempt[1]) == ruined
    check_overflows(attempts)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_overflow_in_fp16_keeps_the_block(stage: int) -> None:
    (attempts,) = run_on_ranks(1, train_over_overflows, stage, "fp16", (9,))
    assert attempts[0][1], "the run has to start with an overflow of the loss scale"
    check_overflows(attempts)


def test_the_reference_is_a_reference() -> None:
    """The plain loop does not follow from the engine: it moves one block a step, by hand-counted Adam steps."""
    case = Case(clip=0.0, cycles=1)
    truth = tiny.reference(case, expected_order(case))
    names = tiny.block_names()[1]
    llama = tiny.model()
    loop_of_one = tiny.PlainHiFT(
        llama, tiny.block_names(), lambda named: tiny.torch_optimizer(case, [p for _, p in named]), order=[1]
    )
    assert loop_of_one.active_block == 1
    loop_of_one.step([tiny.micro_batch(0, m) for m in range(tiny.ACCUMULATION)])
    moved = {n for n, p in llama.named_parameters() if not torch.equal(p, truth.start[n])}
    assert moved == set(names)
    # The first AdamW step is lr * (sign of the gradient, where it is far above eps, + decay * weight).
    p, start = dict(llama.named_parameters())[names[0]], truth.start[names[0]]
    step = (start * (1 - tiny.LEARNING_RATE * tiny.DECAY) - p).abs()
    assert step.median().item() == pytest.approx(tiny.LEARNING_RATE, rel=1e-2)
