"""Every `optim` of transformers' Trainer and every optimizer of torch by the DeepSpeed config, at every ZeRO stage."""

import pytest

from tests.integration.test_optimizers import resumed
from tests.support import optimizers
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

MODES = pytest.mark.parametrize(("stage", "dtype"), optimizers.MODES)
TORCH = ("Adam", "AdamW", "SGD", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")


@MODES
@pytest.mark.parametrize("name", optimizers.EXACT)
def test_exact_or_refused(name: str, stage: int, dtype: str) -> None:
    (found,) = run_on_ranks(1, optimizers.difference, name, stage, dtype)
    if stage == 0 or optimizers.EXACT[name] == optimizers.ALL:
        assert found == 0.0
    else:
        assert "is not element-wise" in found and "use stage 0" in found


@MODES
@pytest.mark.parametrize("name", [*optimizers.REFUSED, *optimizers.BY_TRANSFORMERS])
def test_refused(name: str, stage: int, dtype: str) -> None:
    (found,) = run_on_ranks(1, optimizers.difference, name, stage, dtype)
    assert {**optimizers.REFUSED, **optimizers.BY_TRANSFORMERS}[name] in found


@MODES
@pytest.mark.parametrize("kind", TORCH)
def test_by_the_config(kind: str, stage: int, dtype: str) -> None:
    assert run_on_ranks(1, optimizers.config_difference, kind, {}, stage, dtype) == [0.0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", optimizers.TORCHAO)
def test_torchao_is_exact_at_stage_0(name: str, dtype: str) -> None:
    pytest.importorskip("torchao")
    assert run_on_ranks(1, optimizers.difference, name, 0, dtype) == [0.0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", optimizers.TORCHAO)
def test_torchao_is_refused_at_other_stages(name: str, stage: int) -> None:
    pytest.importorskip("torchao")
    (found,) = run_on_ranks(1, optimizers.difference, name, stage, "bf16")
    assert "quantized" in found and "use stage 0" in found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torchao_continues_with_the_same_bits(dtype: str) -> None:
    pytest.importorskip("torchao")
    assert run_on_ranks(1, resumed, "adamw_torch_8bit", 0, dtype) == [(0.0, True)]
