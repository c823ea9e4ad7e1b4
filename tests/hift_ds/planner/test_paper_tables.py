"""The HiFT paper's tables 3, 6, 7, 8 and 9, held against the planner's `--layout paper`.

The paper's MB and GB are MiB and GiB. Its figures are rounded inside (the GB column is the sum of rounded MB), so a
printed figure is met within 0.015 or 2e-5 of itself; the bytes behind it are compared with an exact count.
"""

from functools import cache

import pytest

from hift_ds.planner.api import plan_memory
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request

MIB, GIB, MILLION = 2**20, 2**30, 10**6

# model -> table, batch (sequences of 512), parameters of the model and of its largest block, and for both the rows
# and columns of all matrices together, which is what Adafactor keeps (a vector whole).
#
# The heads that give the paper's totals: RoBERTa with its classifier of two labels (hidden x hidden and hidden x 2,
# without a pooler); GPT-2, GPT-Neo and LLaMA with their language-model heads, the first two tied to the embeddings.
MODELS = {
    "llama-7b": (3, 6, 6_738_415_616, 202_383_360, 2_836_992, 86_272),
    "roberta-base": (6, 8, 124_647_170, 39_000_576, 343_392, 54_620),
    "roberta-large": (7, 8, 355_361_794, 52_000_768, 821_856, 55_900),
    "gpt2-large": (8, 8, 774_030_080, 65_639_680, 1_392_721, 53_841),
    "gpt-neo-2.7b": (9, 8, 2_651_307_520, 133_900_800, 2_356_305, 57_425),
}

# Rows as printed: model, optimizer, precision, method, then trainable (M), parameters, gradients and state (MB), their
# sum, what is left, and the total (GB).
ROWS = [
    (model, optimizer, *row)
    for model, tables in {
        "llama-7b": {
            "adamw": [
                ("fp32", "full", 6738.42, 25705.04, 25705.04, 51410.08, 100.41, 41.7, 142.11),
                ("fp32", "hift", 202.38, 25705.04, 772.03, 1544.06, 27.36, 28.04, 55.41),
                ("mixed", "full", 6738.42, 38557.56, 25705.04, 51410.08, 112.96, 32.54, 145.50),
                ("mixed", "hift", 202.38, 38557.56, 772.03, 1544.06, 39.92, 21.62, 61.54),
                ("mixed-hi", "hift", 202.38, 13624.53, 772.03, 1544.06, 15.57, 21.00, 36.57),
            ],
            "sgdm": [
                ("fp32", "full", 6738.42, 25705.04, 25705.04, 25705.04, 75.31, 41.71, 117.01),
                ("fp32", "hift", 202.38, 25705.04, 772.03, 772.03, 26.61, 28.8, 55.41),
                ("mixed", "full", 6738.42, 38557.56, 25705.04, 25705.04, 87.86, 32.54, 120.40),
                ("mixed", "hift", 202.38, 38557.56, 772.03, 772.03, 39.16, 22.37, 61.54),
                ("mixed-hi", "hift", 202.38, 13624.53, 772.03, 772.03, 14.81, 21.75, 36.57),
            ],
            "sgd": [
                ("fp32", "full", 6738.42, 25705.04, 25705.04, 0.00, 50.21, 41.72, 91.93),
                ("fp32", "hift", 202.38, 25705.04, 772.03, 0.00, 25.86, 29.55, 55.41),
                ("mixed", "full", 6738.42, 38557.56, 25705.04, 0.00, 62.76, 32.54, 95.30),
                ("mixed", "hift", 202.38, 38557.56, 772.03, 0.00, 38.41, 23.13, 61.54),
                ("mixed-hi", "hift", 202.38, 13624.53, 772.03, 0.00, 14.06, 22.51, 36.57),
            ],
            "adafactor": [
                ("fp32", "full", 6738.42, 25705.04, 25705.04, 10.82, 50.22, 41.72, 91.94),
                ("fp32", "hift", 202.38, 25705.04, 772.03, 0.33, 25.86, 29.55, 55.41),
                ("mixed", "full", 6738.42, 38557.56, 25705.04, 10.82, 62.77, 32.54, 95.31),
                ("mixed", "hift", 202.38, 38557.56, 772.03, 0.33, 38.41, 23.13, 61.54),
                ("mixed-hi", "hift", 202.38, 13624.53, 772.03, 0.33, 14.06, 22.51, 36.57),
            ],
            "adagrad": [
                ("fp32", "full", 6738.42, 25705.04, 25705.04, 25705.04, 75.31, 41.72, 117.01),
                ("fp32", "hift", 202.38, 25705.04, 772.03, 772.03, 26.61, 28.80, 55.41),
                ("mixed", "full", 6738.42, 38557.56, 25705.04, 25705.04, 87.86, 32.54, 120.40),
                ("mixed", "hift", 202.38, 38557.56, 772.03, 772.03, 39.16, 22.37, 61.54),
                ("mixed-hi", "hift", 202.38, 13624.53, 772.03, 772.03, 14.81, 21.75, 36.57),
            ],
        },
        "roberta-base": {
            "adamw": [
                ("fp32", "full", 124.65, 475.49, 475.49, 950.98, 1.86, 5.02, 6.88),
                ("fp32", "hift", 39.00, 475.49, 148.77, 297.54, 0.90, 3.61, 4.52),
                ("mixed", "full", 124.65, 713.25, 475.49, 950.98, 2.09, 3.58, 5.67),
                ("mixed", "hift", 39.00, 713.25, 148.77, 297.54, 1.13, 2.58, 3.71),
            ],
            "sgdm": [
                ("fp32", "full", 124.65, 475.49, 475.49, 475.49, 1.39, 5.00, 6.39),
                ("fp32", "hift", 39.00, 475.49, 148.77, 148.77, 0.75, 3.76, 4.52),
                ("mixed", "full", 124.65, 713.25, 475.49, 475.49, 1.63, 3.57, 5.20),
                ("mixed", "hift", 39.00, 713.25, 148.77, 148.77, 0.99, 2.71, 3.69),
            ],
            "sgd": [
                ("fp32", "full", 124.65, 475.49, 475.49, 0.00, 0.93, 4.97, 5.90),
                ("fp32", "hift", 39.00, 475.49, 148.77, 0.00, 0.61, 3.91, 4.52),
                ("mixed", "full", 124.65, 713.25, 475.49, 0.00, 1.16, 3.57, 4.73),
                ("mixed", "hift", 39.00, 713.25, 148.77, 0.00, 0.84, 2.88, 3.72),
            ],
            "adafactor": [
                ("fp32", "full", 124.65, 475.49, 475.49, 0.98, 0.93, 4.98, 5.91),
                ("fp32", "hift", 39.00, 475.49, 148.77, 0.19, 0.61, 3.91, 4.52),
                ("mixed", "full", 124.65, 713.25, 475.49, 0.98, 1.16, 3.57, 4.73),
                ("mixed", "hift", 39.00, 713.25, 148.77, 0.19, 0.84, 2.87, 3.71),
            ],
            "adagrad": [
                ("fp32", "full", 124.65, 475.49, 475.49, 475.49, 1.39, 5.00, 6.39),
                ("fp32", "hift", 39.00, 475.49, 148.77, 148.77, 0.75, 3.76, 4.52),
                ("mixed", "full", 124.65, 713.25, 475.49, 475.49, 1.63, 3.57, 5.20),
                ("mixed", "hift", 39.00, 713.25, 148.77, 148.77, 0.99, 2.71, 3.69),
            ],
        },
        "roberta-large": {
            "adamw": [
                ("fp32", "full", 355.36, 1355.60, 1355.60, 2711.20, 5.30, 13.08, 18.38),
                ("fp32", "hift", 52.00, 1355.60, 198.38, 396.73, 1.90, 9.97, 11.88),
                ("mixed", "full", 355.36, 2033.40, 1355.60, 2711.20, 5.96, 9.30, 15.25),
                ("mixed", "hift", 52.00, 2033.40, 198.38, 396.73, 2.57, 7.17, 9.74),
            ],
            "sgdm": [
                ("fp32", "full", 355.36, 1355.60, 1355.60, 1355.60, 3.97, 13.08, 17.05),
                ("fp32", "hift", 52.00, 1355.60, 198.38, 198.38, 1.71, 10.20, 11.91),
                ("mixed", "full", 355.36, 2033.40, 1355.60, 1355.60, 4.63, 9.30, 13.93),
                ("mixed", "hift", 52.00, 2033.40, 198.38, 198.38, 2.37, 7.36, 9.74),
            ],
            "sgd": [
                ("fp32", "full", 355.36, 1355.60, 1355.60, 0.00, 2.65, 13.08, 15.73),
                ("fp32", "hift", 52.00, 1355.60, 198.38, 0.00, 1.52, 10.36, 11.88),
                ("mixed", "full", 355.36, 2033.40, 1355.60, 0.00, 3.31, 9.30, 12.60),
                ("mixed", "hift", 52.00, 2033.40, 198.38, 0.00, 2.18, 7.56, 9.74),
            ],
            "adafactor": [
                ("fp32", "full", 355.36, 1355.60, 1355.60, 3.14, 2.65, 13.08, 15.73),
                ("fp32", "hift", 52.00, 1355.60, 198.38, 0.21, 1.52, 10.36, 11.88),
                ("mixed", "full", 355.36, 2033.40, 1355.60, 3.14, 3.31, 9.30, 12.61),
                ("mixed", "hift", 52.00, 2033.40, 198.38, 0.21, 2.18, 7.51, 9.69),
            ],
            "adagrad": [
                ("fp32", "full", 355.36, 1355.60, 1355.60, 1355.60, 3.97, 13.08, 17.05),
                ("fp32", "hift", 52.00, 1355.60, 198.38, 198.38, 1.71, 10.20, 11.91),
                ("mixed", "full", 355.36, 2033.40, 1355.60, 1355.60, 4.63, 9.30, 13.93),
                ("mixed", "hift", 52.00, 2033.40, 198.38, 198.38, 2.37, 7.36, 9.74),
            ],
        },
        "gpt2-large": {
            "adamw": [
                ("fp32", "full", 774.03, 2952.69, 2952.69, 5905.39, 11.53, 37.26, 48.79),
                ("fp32", "hift", 65.64, 2952.69, 250.40, 500.79, 3.62, 31.73, 35.35),
                ("mixed", "full", 774.03, 4429.05, 2952.69, 5905.39, 12.98, 28.13, 41.11),
                ("mixed", "hift", 65.64, 4429.05, 250.40, 500.79, 5.06, 24.97, 30.03),
            ],
            "sgdm": [
                ("fp32", "full", 774.03, 2952.69, 2952.69, 2952.69, 8.65, 37.26, 45.91),
                ("fp32", "hift", 65.64, 2952.69, 250.40, 250.40, 3.37, 31.98, 35.35),
                ("mixed", "full", 774.03, 4429.05, 2952.69, 2952.69, 10.09, 28.14, 38.23),
                ("mixed", "hift", 65.64, 4429.05, 250.40, 250.40, 4.81, 25.22, 30.03),
            ],
            "sgd": [
                ("fp32", "full", 774.03, 2952.69, 2952.69, 0.00, 5.77, 37.25, 43.02),
                ("fp32", "hift", 65.64, 2952.69, 250.40, 0.00, 3.13, 32.22, 35.35),
                ("mixed", "full", 774.03, 4429.05, 2952.69, 0.00, 7.21, 28.12, 35.33),
                ("mixed", "hift", 65.64, 4429.05, 250.40, 0.00, 4.57, 25.46, 30.03),
            ],
            "adafactor": [
                ("fp32", "full", 774.03, 2952.69, 2952.69, 5.31, 5.77, 37.26, 43.03),
                ("fp32", "hift", 65.64, 2952.69, 250.40, 0.21, 3.13, 32.22, 35.35),
                ("mixed", "full", 774.03, 4429.05, 2952.69, 5.31, 7.21, 28.12, 35.33),
                ("mixed", "hift", 65.64, 4429.05, 250.40, 0.21, 4.57, 25.46, 30.03),
            ],
            "adagrad": [
                ("fp32", "full", 774.03, 2952.69, 2952.69, 2952.69, 8.65, 37.26, 45.91),
                ("fp32", "hift", 65.64, 2952.69, 250.40, 250.40, 3.37, 31.98, 35.35),
                ("mixed", "full", 774.03, 4429.05, 2952.69, 2952.69, 10.09, 28.13, 38.22),
                ("mixed", "hift", 65.64, 4429.05, 250.40, 250.40, 4.81, 25.22, 30.03),
            ],
        },
        "gpt-neo-2.7b": {
            "adamw": [
                ("fp32", "full", 2651.31, 10113.95, 10113.95, 20227.89, 39.51, 22.69, 62.20),
                ("fp32", "hift", 133.9, 10113.95, 510.79, 1021.58, 11.37, 16.95, 28.33),
                ("mixed", "full", 2651.31, 15170.93, 10113.95, 20227.89, 44.45, 19.57, 64.01),
                ("mixed", "hift", 133.9, 15170.93, 510.79, 1021.58, 16.31, 15.92, 32.23),
            ],
            "sgdm": [
                ("fp32", "full", 2651.31, 10113.95, 10113.95, 10113.95, 29.63, 22.69, 52.32),
                ("fp32", "hift", 133.9, 10113.95, 510.79, 510.79, 10.87, 17.45, 28.33),
                ("mixed", "full", 2651.31, 15170.93, 10113.95, 10113.95, 34.57, 19.57, 54.13),
                ("mixed", "hift", 133.9, 15170.93, 510.79, 510.79, 15.81, 16.33, 32.14),
            ],
            "sgd": [
                ("fp32", "full", 2651.31, 10113.95, 10113.95, 0.00, 19.75, 22.69, 42.44),
                ("fp32", "hift", 133.9, 10113.95, 510.79, 0.00, 10.38, 17.95, 28.33),
                ("mixed", "full", 2651.31, 15170.93, 10113.95, 0.00, 24.69, 19.56, 44.26),
                ("mixed", "hift", 133.9, 15170.93, 510.79, 0.00, 15.31, 16.83, 32.14),
            ],
            "adafactor": [
                ("fp32", "full", 2651.31, 10113.95, 10113.95, 8.99, 19.76, 22.69, 42.45),
                ("fp32", "hift", 133.9, 10113.95, 510.79, 0.22, 10.38, 17.95, 28.33),
                ("mixed", "full", 2651.31, 15170.93, 10113.95, 8.99, 24.70, 19.56, 44.26),
                ("mixed", "hift", 133.9, 15170.93, 510.79, 0.22, 15.31, 16.83, 32.14),
            ],
            "adagrad": [
                ("fp32", "full", 2651.31, 10113.95, 10113.95, 10113.95, 29.63, 22.69, 52.32),
                ("fp32", "hift", 133.9, 10113.95, 510.79, 510.79, 10.87, 17.45, 28.33),
                ("mixed", "full", 2651.31, 15170.93, 10113.95, 10113.95, 34.57, 19.57, 54.14),
                ("mixed", "hift", 133.9, 15170.93, 510.79, 510.79, 15.81, 16.33, 32.14),
            ],
        },
    }.items()
    for optimizer, rows in tables.items()
    for row in rows
]

# State in MB that the paper prints and the model does not give (rows and columns make 1.31 and 0.21).
NOT_REPRODUCIBLE = {("roberta-base", "adafactor", "full"): 0.98, ("roberta-base", "adafactor", "hift"): 0.19}

MOMENTS = {"adamw": 2, "sgdm": 1, "sgd": 0, "adagrad": 1}


def names(row: tuple) -> str:
    return f"table{MODELS[row[0]][0]}-{'-'.join(row[:4])}"


@cache
def planner(model: str) -> Planner:
    return Planner(Request(model, layout="paper"))


def planned(model: str, optimizer: str, precision: str, method: str) -> tuple[int, dict[str, int]]:
    """Trained parameters of the largest block, and the bytes that are there all the time of its step."""
    request = Request(model, method=method, precision=precision, optimizer=optimizer, layout="paper")
    built = planner(model).build(request)
    numels = [sum(built.numels(block)) for block in range(len(built.blocks))]
    largest = max(range(len(numels)), key=numels.__getitem__)
    return numels[largest], planner(model).held(request, largest)


def is_met(value: float, printed: float) -> bool:
    return abs(value - printed) <= max(0.015, 2e-5 * printed)


def test_every_row_is_there():
    rows = {row[:4] for row in ROWS}
    variants = {("fp32", "full"), ("fp32", "hift"), ("mixed", "full"), ("mixed", "hift")}
    expected = {(m, o, *v) for m in MODELS for o in (*MOMENTS, "adafactor") for v in variants}
    expected |= {("llama-7b", o, "mixed-hi", "hift") for o in (*MOMENTS, "adafactor")}
    assert rows == expected and len(ROWS) == 105


@pytest.mark.parametrize("row", ROWS, ids=names)
def test_row(row):
    model, optimizer, precision, method, trainable, para, gra, sta, pgs, _, _ = row
    _, _, total, block, total_factored, block_factored = MODELS[model]
    active, factored = (total, total_factored) if method == "full" else (block, block_factored)
    count, held = planned(model, optimizer, precision, method)

    weights = {"fp32": 4 * total, "mixed": 2 * total, "mixed-hi": 2 * total}[precision]
    masters = {"fp32": 0, "mixed": 4 * total, "mixed-hi": 4 * active}[precision]
    state = 4 * factored if optimizer == "adafactor" else 4 * MOMENTS[optimizer] * active
    assert count == active
    assert held == {
        "parameters": weights,
        "master_weights": masters,
        "gradients": 4 * active,
        "optimizer_state": state,
    }

    assert is_met(active / MILLION, trainable)
    assert is_met((weights + masters) / MIB, para)
    assert is_met(4 * active / MIB, gra)
    assert is_met((weights + masters + 4 * active + state) / GIB, pgs)
    if (model, optimizer, method) in NOT_REPRODUCIBLE:
        assert sta == NOT_REPRODUCIBLE[model, optimizer, method] and not is_met(state / MIB, sta)
    else:
        assert is_met(state / MIB, sta)


def test_the_whole_plan_holds_the_same():
    plan = plan_memory("gpt2-large", layout="paper", precision="mixed", optimizer="adamw", seq_len=8).as_dict()
    count, held = planned("gpt2-large", "adamw", "mixed", "hift")
    assert plan["peak_trainable_parameters"] == count and plan["peak"]["name"] == "embeddings"
    assert {key: plan["device"][key] for key in held} == held
    assert plan["device"]["buffers"] == 0 < plan["device"]["activations"]
    assert plan["device"]["total"] == sum(held.values()) + plan["device"]["activations"]
    assert plan["host"]["optimizer_state"] == 8 * (MODELS["gpt2-large"][2] - count)
