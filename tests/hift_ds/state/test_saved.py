"""State in a checkpoint by parameter name, on small masters that are written down by hand."""

from typing import Any

import pytest
import torch

from hift_ds.state.codec import FIRST_MOMENT
from hift_ds.state.encoded import Slice
from hift_ds.state.saved import Counted, SavedMaster, SavedState, Span, encoded_entry

WHOLE = {"a": torch.arange(10.0), "b": torch.arange(100.0, 107.0)}
UPDATED = Counted(None, {"step": torch.tensor(3.0)}, {}, False)


def master(spans: list[Span], numel: int, counted: Counted = UPDATED, **state: Any) -> SavedMaster:
    """A master that has the elements of WHOLE, and NaN for padding; its moment is twice as large."""
    values = torch.full((numel,), torch.nan)
    for span in spans:
        values[span.place : span.place + span.numel] = WHOLE[span.name][span.start : span.start + span.numel]
    return SavedMaster(spans, numel, values, state or {"exp_avg": 2 * values}, {}, [], [counted])


def two_ranks(**kwargs: Any) -> SavedState:
    """a and b one after the other in 20 elements, of which each rank has one half."""
    first = [Span("a", 0, 10, 0), Span("b", 0, 0, 0)]
    second = [Span("a", 0, 0, 0), Span("b", 0, 7, 0)]
    return SavedState([master(first, 10, **kwargs), master(second, 10, **kwargs)])


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_elements_are_found_by_name_wherever_they_are() -> None:
    saved = two_ranks()
    assert saved.names == {"a", "b"} and saved.encoded == []
    spans = [Span("b", 2, 3, 1), Span("a", 8, 2, 4)]
    assert saved.state_names(spans, 8) == ["exp_avg"]
    expected = torch.tensor([0, 102, 103, 104, 8, 9, 0, 0.0])
    assert torch.equal(saved.values(spans, None, meta(2, 4)), expected.view(2, 4))
    assert torch.equal(saved.values(spans, "exp_avg", meta(8)), 2 * expected)
    assert torch.equal(saved.parameter("a", 3, 6), torch.tensor([3.0, 4, 5]))


def test_a_master_of_the_same_elements_is_taken_as_a_whole() -> None:
    saved = two_ranks()
    spans = [Span("a", 0, 0, 0), Span("b", 0, 7, 0)]
    values = saved.values(spans, None, meta(2, 5))
    assert values.shape == (2, 5) and values.view(-1)[:7].equal(WHOLE["b"]) and values.view(-1)[7:].isnan().all()
    assert saved.values(spans, None, meta(12)).equal(torch.cat([WHOLE["b"], torch.zeros(5)])), "other padding"


def test_a_master_of_padding_alone_has_zeros() -> None:
    spans = [Span("a", 0, 0, 0)]
    assert two_ranks().values(spans, "exp_avg", meta(4)).equal(torch.zeros(4))
    assert float(two_ranks().counted(spans).counts["step"]) == 3


def test_it_survives_a_file(tmp_path: Any) -> None:
    entries = [one.entry() for one in two_ranks()._masters]
    torch.save([{"masters": [entry]} for entry in entries], tmp_path / "state.pt")
    saved = SavedState.read(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(saved.parameter("b", 0, 7), WHOLE["b"]) and saved.problems([Span("a", 2, 5, 0)], 5) == []
    with pytest.raises(ValueError, match="not kept by parameter name"):
        SavedState.read([{"blocks": []}])


def test_state_of_a_whole_tensor_stays_whole() -> None:
    spans = [Span("a", 0, 10, 0)]
    saved = SavedState([master(spans, 10, row=torch.arange(5.0))])
    assert saved.problems(spans, 10) == [] and saved.values(spans, "row", meta(2, 5)).equal(torch.arange(5.0))
    (problem,) = saved.problems([Span("a", 0, 5, 0)], 5)
    assert "'row' of a is of a whole tensor" in problem
    assert "no optimizer state of c" in saved.problems([Span("c", 0, 5, 0)], 5)[0]


def test_codes_are_taken_where_they_are_cut_alike_and_decoded_elsewhere() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    room = 2048
    padded = torch.cat([values, torch.zeros(room - 2000)])
    codes, scales = torch.empty(room, dtype=torch.uint8), torch.empty(room // 256)
    FIRST_MOMENT.encode(padded.clone(), [codes, scales])
    truth = torch.empty(room)
    FIRST_MOMENT.decode([codes, scales], truth)
    spans = [Span("a", 0, 2000, 0)]
    parts = {"codes": codes, "scales": scales}
    encoded = {"exp_avg": encoded_entry(FIRST_MOMENT, parts)}
    saved = SavedState([SavedMaster(spans, 2000, values, {}, encoded, [(0, 2000, 0)], [UPDATED])])
    cut = Slice(0, 0, 2000, True)
    assert saved.encoded == ["exp_avg"] and saved.state_names(spans, 2000) == ["exp_avg"]
    assert saved.codes(spans, 2000, "exp_avg", FIRST_MOMENT, [cut]) == parts
    assert saved.codes(spans, 2000, "exp_avg", FIRST_MOMENT, [Slice(0, 0, 1000, False)]) is None
    other = [Span("a", 700, 600, 0)]
    assert saved.codes(other, 600, "exp_avg", FIRST_MOMENT, [Slice(0, 0, 600, True)]) is None
    assert torch.equal(saved.values(other, "exp_avg", meta(600)), truth[700:1300])


def test_what_was_updated_differently_often_is_not_trained_together() -> None:
    counted = [Counted((0, 4), {"step": 2}, {}, False), Counted((4, 10), {}, {}, True)]
    spans = [Span("a", 0, 10, 0)]
    saved = SavedState([master(spans, 10)._replace(counted=counted)])
    assert saved.counted(spans, (0, 4)).counts == {"step": 2} and saved.counted(spans, (5, 7)).is_new
    with pytest.raises(ValueError, match=r"differently often: a \(step 2\) and a \(no count\)"):
        saved.counted(spans)
    mixed = SavedState([master([Span("a", 0, 10, 0)], 10), master([Span("b", 0, 7, 0)], 7, counted[0])])
    with pytest.raises(ValueError, match=r"a \(step 3\) and b \(step 2\)"):
        mixed.counted([Span("a", 0, 10, 0), Span("b", 0, 7, 10)])


def test_a_first_update_is_not_mixed_with_later_ones() -> None:
    """Momentum without a count: the first update sets it, and later ones add to it."""
    new, old = Counted(None, {}, {}, True), Counted(None, {}, {}, False)
    saved = SavedState([master([Span("a", 0, 10, 0)], 10, new), master([Span("b", 0, 7, 0)], 7, old)])
    assert saved.counted([Span("a", 0, 10, 0)]).is_new and not saved.counted([Span("b", 0, 7, 0)]).is_new
    with pytest.raises(ValueError, match="differently often"):
        saved.counted([Span("a", 0, 10, 0), Span("b", 0, 7, 10)])


def test_state_that_no_step_has_made_is_zero() -> None:
    """A rank whose rows no step has trained yet has none."""
    spans = [Span("a", 0, 10, 0)]
    saved = SavedState(
        [
            master([Span("a", 0, 5, 0)], 5),
            master([Span("a", 5, 5, 0)], 5)._replace(state={}, counted=[Counted(None, {}, {}, True)]),
        ]
    )
    assert saved.values(spans, "exp_avg", meta(10)).equal(torch.cat([2 * WHOLE["a"][:5], torch.zeros(5)]))
