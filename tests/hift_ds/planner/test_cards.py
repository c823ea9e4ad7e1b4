"""The tables of docs/cards.md are what the command makes."""

import pytest

from hift_ds.planner import cards
from tests.support.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "cards.md").read_text()


def test_the_page_has_the_rows_of_the_smallest_model() -> None:
    """Of all tables; the planner takes minutes for the other models."""
    assert [row for row in cards.rows_of("llama-3.2-1b") if row not in PAGE] == []


@pytest.mark.parametrize("model", cards.MODELS)
def test_the_page_has_the_host_memory_of_each_model(model: str) -> None:
    assert cards.row(cards.MODELS[model], cards.shape_of(model).host()) in PAGE


def test_the_page_is_the_commands_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "rows_of", lambda model: [f"<{model} {number}>" for number in range(3)])
    head, *_ = cards.page().split("<llama-3.2-1b 0>")
    assert PAGE.startswith(head)
