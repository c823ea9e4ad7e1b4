"""Encoded values in the store: where slices lie, and what is kept when values are read and written again."""

from typing import Any

import torch

from hift_ds.state.codec import FIRST_MOMENT, SECOND_MOMENT, Split
from hift_ds.state.encoded import EncodedState, Slice, decoded


def encoded(slices: list[Slice], codecs: dict[str | None, Any]) -> EncodedState:
    buffers: dict[Any, torch.Tensor] = {}

    def buffer(key: Any, like: torch.Tensor) -> torch.Tensor:
        return buffers.setdefault(key, torch.full(like.shape, 77, dtype=like.dtype))

    state = EncodedState(codecs, slices, buffer)
    state.reserve()
    return state


def test_masters_in_slices_of_several_blocks_come_back_exactly() -> None:
    cuts = [Slice(0, 0, 1500, False, 0), Slice(0, 1500, 1600, False, 2048), Slice(1, 0, 7, True)]
    state, generator = encoded(cuts, {None: Split()}), torch.Generator().manual_seed(0)
    for number, size in ((0, 1600), (1, 7)):
        masters = torch.randn(size, generator=generator)
        state.write(number, None, masters)
        assert torch.equal(state.read(number, None, masters.shape, masters.bfloat16()), masters)
    state.clear(None)
    weights = torch.randn(7, generator=generator).bfloat16()
    assert torch.equal(state.read(1, None, weights.shape, weights), weights.float())


def test_codes_change_only_where_values_do() -> None:
    state = encoded([Slice(0, 0, 3000, True)], {"exp_avg": FIRST_MOMENT, "exp_avg_sq": SECOND_MOMENT})
    values = torch.randn(60, 50, generator=torch.Generator().manual_seed(0)).square()
    assert state.names(0) == [] and not state.parts_of(0)
    for name in ("exp_avg", "exp_avg_sq"):
        state.write(0, name, values)
    before = {name: state.read(0, name, values.shape) for name in state.names(0)}
    assert all(0 < float((found - values).abs().max()) < 0.1 * float(values.max()) for found in before.values())
    codes = {name: {part: t.clone() for part, t in parts.items()} for name, parts in state.parts_of(0).items()}
    for name, found in before.items():
        changed = found.clone()
        changed.view(-1)[700] *= 3
        state.write(0, name, changed)
        parts = state.parts_of(0)[name]
        differing = (parts["codes"] != codes[name]["codes"]).nonzero().flatten()
        assert 700 in differing and all(512 <= int(place) < 768 for place in differing)
        assert [int(n) for n in (parts["scales"] != codes[name]["scales"]).nonzero()] in ([], [2])


def test_codes_are_loaded_as_they_are_or_decoded_for_a_run_without_them() -> None:
    cuts = [Slice(0, 0, 3000, True)]
    state, other = (encoded(cuts, {"exp_avg": FIRST_MOMENT}) for _ in range(2))
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    state.write(0, "exp_avg", values)
    saved = state.parts_of(0)["exp_avg"]
    other.load(0, "exp_avg", saved)
    assert all(torch.equal(other.parts_of(0)["exp_avg"][part], tensor) for part, tensor in saved.items())
    found = decoded(FIRST_MOMENT, [saved[part.name] for part in FIRST_MOMENT.parts], cuts, values.shape)
    assert torch.equal(found, state.read(0, "exp_avg", values.shape))
    other.forget_state()
    assert other.names(0) == []


def test_values_that_are_read_and_written_again_keep_their_codes() -> None:
    """To encode what was decoded changes one code in ten thousand."""
    values = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    state = encoded([Slice(0, 0, values.numel(), True)], {"exp_avg": FIRST_MOMENT})
    state.write(0, "exp_avg", values)
    codes = state.parts_of(0)["exp_avg"]["codes"].clone()
    state.write(0, "exp_avg", state.read(0, "exp_avg", values.shape))
    assert torch.equal(state.parts_of(0)["exp_avg"]["codes"], codes)


def test_rows_that_no_step_has_trained_are_zero() -> None:
    state = encoded([Slice(0, 0, 1500, False, 0), Slice(0, 1500, 3000, False, 2048)], {"exp_avg": FIRST_MOMENT})
    state.set_known(0, "exp_avg")
    assert not state.read(0, "exp_avg", torch.Size([3000])).any()


def test_a_rank_without_any_row_of_a_master() -> None:
    state = encoded([], {None: Split()})
    state.write(0, None, torch.zeros(8))
    assert not state.read(0, None, torch.Size([8]), torch.zeros(8).bfloat16()).any()
