"""How much host memory is planned before anything is built."""

import math

import pytest
import torch

from hift_ds.config import OffloadConfig
from hift_ds.state.arena import ALIGNMENT
from hift_ds.state.codec import FIRST_MOMENT, SECOND_MOMENT, Codec, Split
from hift_ds.state.placement import _host_bytes, bytes_in_store, choose_codecs
from hift_ds.state.trial import Traits

ADAM = Traits(None, 8, state=(("exp_avg", torch.float32), ("exp_avg_sq", torch.float32)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_plan_holds_every_share_with_its_padding_and_alignment(dtype: torch.dtype, ranks: int) -> None:
    traits = Traits(None, dtype.itemsize, state=(("moment", dtype),))
    for numel in range(1, 600):
        share = math.ceil(numel / ranks / 2) * 2
        placed = sum(math.ceil(share * size / ALIGNMENT) * ALIGNMENT for size in (4, dtype.itemsize))
        planned = _host_bytes([[torch.nn.Parameter(torch.empty(numel, device="meta"))]], ranks, traits, True)
        assert placed <= planned <= placed + 2 * ALIGNMENT


def test_a_parameter_that_blocks_share_counts_once_and_masters_count_where_there_are_some() -> None:
    one, other = (torch.nn.Parameter(torch.empty(1000, device="meta")) for _ in range(2))
    assert _host_bytes([[one], [one], [other]], 1, ADAM, True) == 2 * (12 * 1000 + 3 * ALIGNMENT)
    assert _host_bytes([[one]], 1, ADAM, False) == 8 * 1000 + 2 * ALIGNMENT
    assert _host_bytes([[one]], 1, Traits("it has rows", 0.5), True) == 4500 + 2 * ALIGNMENT


SPLIT, CODES = {None: Split()}, {"exp_avg": FIRST_MOMENT, "exp_avg_sq": SECOND_MOMENT}


@pytest.mark.parametrize(
    ("offload", "dtype", "has_masters", "codecs", "nbytes"),
    [
        ({}, torch.bfloat16, True, SPLIT, 10.125),
        ({"master": "split"}, torch.bfloat16, True, SPLIT, 10.125),
        ({"master": "fp32"}, torch.bfloat16, True, {}, 12),
        ({}, torch.float16, True, {}, 12),
        ({}, torch.float32, False, {}, 12),
        ({"moments": "8bit"}, torch.bfloat16, True, SPLIT | CODES, 2.125 + 2 * (1 + 4 / 256)),
        ({"moments": "8bit"}, torch.float32, True, CODES, 4 + 2 * (1 + 4 / 256)),
    ],
)
def test_formats(
    offload: dict[str, str], dtype: torch.dtype, has_masters: bool, codecs: dict[str | None, Codec], nbytes: float
) -> None:
    chosen = choose_codecs(OffloadConfig(**offload), torch.optim.AdamW, ADAM, dtype, has_masters)
    assert chosen == codecs and bytes_in_store(chosen, ADAM) == nbytes


RMSPROP = Traits(None, 4, state=(("square_avg", torch.float32),))
SGD = Traits(None, 0)


@pytest.mark.parametrize(
    ("offload", "optimizer", "traits", "dtype", "words"),
    [
        ({"master": "split"}, torch.optim.AdamW, ADAM, torch.float16, ("master='split'", "float16", "bf16", "auto")),
        ({"moments": "8bit"}, torch.optim.RMSprop, RMSPROP, torch.bfloat16, ("moments='8bit'", "RMSprop", "AdamW")),
        (
            {"moments": "8bit", "master": "split"},
            torch.optim.Adafactor,
            Traits("it has rows", 0.5),
            torch.bfloat16,
            ("master='split'", "it has rows", "moments='8bit'", "Adafactor"),
        ),
    ],
)
def test_formats_that_there_are_not(
    offload: dict[str, str],
    optimizer: type[torch.optim.Optimizer],
    traits: Traits,
    dtype: torch.dtype,
    words: tuple[str, ...],
) -> None:
    with pytest.raises(ValueError) as error:
        choose_codecs(OffloadConfig(**offload), optimizer, traits, dtype, True)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("offload", "words"),
    [
        ({"moments": "8bit"}, ("moments='8bit' has no effect", "SGD", "momentum")),
        ({"device": "nvme", "nvme": "moments"}, ("nvme='moments'", "SGD", "nothing would be in files", "nvme to all")),
    ],
)
def test_settings_for_state_that_an_optimizer_does_not_have_are_refused(
    offload: dict[str, str], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        choose_codecs(OffloadConfig(**offload), torch.optim.SGD, SGD, torch.bfloat16, True)
    assert all(word in str(error.value) for word in words), str(error.value)
    momentum = Traits(None, 4, state=(("momentum_buffer", torch.float32),))
    assert choose_codecs(OffloadConfig(**offload), torch.optim.SGD, momentum, torch.bfloat16, True)[None] == Split()
