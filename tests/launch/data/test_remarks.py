"""Remarks about rows: each row counts once, and their size does not grow with the data."""

from __future__ import annotations

from hift_ds.launch.data.remarks import MAX_NAMES, Remarks


def test_a_row_counts_once_for_a_matter_and_once_for_a_name() -> None:
    remarks = Remarks()
    for where, name in (("r:1", "a"), ("r:1", "b"), ("r:1", "a"), ("r:3", "a")):
        remarks.add("keys not used", where, name)
    remark = remarks.found["keys not used"]
    assert (remark.rows, remark.first, remark.names) == (2, "r:1", {"a": 2, "b": 1})


def test_names_that_differ_in_each_row_are_bounded() -> None:
    """run.json holds them."""
    remarks = Remarks()
    for i in range(3 * MAX_NAMES):
        remarks.add("no end mark", f"r:{i}", f"ends with {i}")
        remarks.add("no end mark", f"r:{i}", "ends with 0")
    remark = remarks.found["no end mark"]
    assert remark.rows == 3 * MAX_NAMES and len(remark.names) == MAX_NAMES
    assert remark.names["ends with 0"] == 3 * MAX_NAMES and remark.names["ends with 5"] == 1
