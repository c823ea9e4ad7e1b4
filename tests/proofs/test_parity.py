"""The engine against the plain loop in every combination of the settings below, and against stock DeepSpeed.

tests/integration/test_parity.py holds a pairwise selection of them.
"""

from dataclasses import replace

import pytest

from tests.integration.test_parity import check_schedule, check_stock
from tests.support.parity import FINER, STAGES, STRATEGIES, cases, check
from tests.support.tiny import SCHEDULERS, Case


@pytest.mark.parametrize(
    "case",
    cases(
        [
            Case(stage=stage, strategy=strategy, layers_per_block=m)
            for stage in STAGES
            for strategy in STRATEGIES
            for m in (1, 2, 3, 4)  # 4: the last block is shorter
        ],
        [Case(stage=stage, layers_per_block=6) for stage in STAGES],
        [Case(stage=stage, steps_per_block=2, strategy="random") for stage in STAGES],
    ),
    ids=str,
)
def test_one_rank(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, ranks=2, strategy=strategy) for stage in STAGES for strategy in STRATEGIES],
        [Case(stage=stage, ranks=2, layers_per_block=m) for stage in STAGES for m in (2, 4, 6)],
        [Case(stage=stage, ranks=2, steps_per_block=2, strategy="top2down") for stage in STAGES],
    ),
    ids=str,
)
def test_two_ranks_with_different_data(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, ranks=ranks, offload=True) for stage in (1, 2, 3) for ranks in (1, 2)],
        [Case(stage=stage, offload=True, strategy="random", optimizer="Adam") for stage in (1, 2, 3)],
        [Case(stage=stage, dtype="bf16", offload=True) for stage in (1, 2, 3)],
    ),
    ids=str,
)
def test_cpu_offload(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [
            Case(stage=3, waiting="cpu", ranks=ranks, strategy=strategy, layers_per_block=m)
            for ranks in (1, 2)
            for strategy in STRATEGIES
            for m in (1, 2)
        ],
        [Case(stage=3, waiting="cpu", dtype=dtype, strategy=s) for dtype in ("bf16", "fp16") for s in STRATEGIES],
        [Case(stage=3, waiting="cpu", ranks=ranks, checkpointing=True, tied=True) for ranks in (1, 2)],
        [Case(stage=3, waiting="cpu", offload=True, dtype=dtype) for dtype in ("fp32", "bf16")],
    ),
    ids=str,
)
def test_weights_on_the_host(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=stage, offload=True, strategy="random", layers_per_block=m, optimizer=optimizer)
        for stage in (1, 2, 3)
        for m, optimizer in ((2, "Adagrad"), (4, "Lion"))
    ],
    ids=str,
)
def test_cpu_offload_of_other_optimizers(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, dtype="bf16", strategy=strategy) for stage in STAGES for strategy in STRATEGIES],
        [
            Case(stage=stage, dtype="bf16", layers_per_block=4, optimizer=optimizer, client_optimizer=True)
            for stage in STAGES
            for optimizer in ("AdamW", "RMSprop")
        ],
        [Case(stage=stage, dtype="bf16", optimizer="momentum", steps_per_block=2) for stage in STAGES],
        [Case(stage=stage, dtype="bf16", decay_groups=True, tied=True) for stage in STAGES],
        [Case(dtype="bf16", optimizer="Adafactor", client_optimizer=True)],
    ),
    ids=str,
)
def test_bf16(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, dtype="fp16", strategy=strategy) for stage in (1, 2, 3) for strategy in STRATEGIES],
        [Case(stage=stage, dtype="fp16", decay_groups=True, tied=True) for stage in (1, 2, 3)],
    ),
    ids=str,
)
def test_fp16(case: Case) -> None:
    """With DeepSpeed's first loss scale, which none of these steps overflows."""
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [
            Case(stage=stage, optimizer=optimizer, layers_per_block=2)
            for stage in STAGES
            for optimizer in ("Adam", "SGD", "momentum", "Adagrad", "Lion")
        ],
        [
            Case(stage=stage, optimizer=optimizer, client_optimizer=True, layers_per_block=2)
            for stage in STAGES
            for optimizer in ("AdamW", "RMSprop", "NAdam", "momentum")
        ],
        [Case(optimizer="Adafactor", client_optimizer=True)],
        [Case(stage=stage, ranks=2, optimizer="Adagrad", layers_per_block=2) for stage in STAGES],
    ),
    ids=str,
)
def test_optimizers(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, max_block_numel=FINER, dtype=dtype) for stage in STAGES for dtype in ("fp32", "bf16")],
        [Case(stage=stage, max_block_numel=FINER, ranks=2, strategy="random") for stage in STAGES],
        [Case(stage=stage, max_block_numel=FINER, step="block", optimizer="momentum") for stage in STAGES],
        [Case(stage=stage, max_block_numel=FINER, optimizer="Adagrad", cycles=1) for stage in STAGES],
        [Case(stage=2, max_block_numel=FINER, tied=True, steps_per_block=2, cycles=1)],
        [Case(stage=stage, balance=True, ranks=ranks) for stage, ranks in ((0, 1), (2, 2), (3, 1))],
        [Case(stage=stage, max_block_numel=2100, offload=True) for stage in (1, 2, 3)],
    ),
    ids=str,
)
def test_blocks_finer_than_a_layer(case: Case) -> None:
    check(replace(case, clip=0.005))  # smaller blocks have smaller gradients


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=stage, ranks=ranks, decay_groups=True, client_optimizer=client, layers_per_block=m)
        for stage in STAGES
        for ranks, client, m in ((1, False, 1), (1, True, 4), (2, False, 2))
    ],
    ids=str,
)
def test_options_of_parameter_groups(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, scheduler="torch", cycles=3, layers_per_block=3) for stage in STAGES],
        [Case(stage=stage, scheduler="WarmupLR", cycles=3, layers_per_block=3) for stage in STAGES],
        [Case(stage=2, scheduler=name, cycles=3, layers_per_block=3) for name in SCHEDULERS],
        [Case(stage=stage, scheduler="torch", steps_per_block=2, layers_per_block=2) for stage in (0, 3)],
        [
            Case(stage=1, scheduler="torch", dtype="bf16", client_optimizer=True),
            Case(stage=2, scheduler="torch", ranks=2, decay_groups=True),
        ],
    ),
    ids=str,
)
def test_schedules_tick_once_a_cycle(case: Case) -> None:
    check_schedule(case)


@pytest.mark.parametrize(
    "case",
    [Case(stage=stage, ranks=ranks, tied=True) for stage in STAGES for ranks in (1, 2)],
    ids=str,
)
def test_tied_weights(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", [Case(stage=s, checkpointing=True) for s in STAGES], ids=str)
def test_checkpointed_activations(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage=stage, layers_per_block=6, scheduler="torch") for stage in STAGES],
        [Case(stage=stage, layers_per_block=6, dtype="bf16", tied=True) for stage in (1, 2, 3)],
        [Case(stage=stage, layers_per_block=6, offload=True) for stage in (1, 2, 3)],
        [Case(stage=stage, layers_per_block=6, offload=True, dtype="bf16") for stage in (1, 2, 3)],
        [Case(stage=stage, layers_per_block=6, decay_groups=True) for stage in STAGES],
        [Case(stage=stage, layers_per_block=6, optimizer="Adagrad", cycles=3) for stage in STAGES],
    ),
    ids=str,
)
def test_all_layers_in_one_block_is_stock_deepspeed(case: Case) -> None:
    check_stock(case)
