"""How many tokens a model takes, from its configuration and its tables of position embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

# Names in configurations. transformers maps many others (n_positions, ...) to the first; MPT has the second.
_LIMITS = ("max_position_embeddings", "max_seq_len")


class PositionLimit(NamedTuple):
    """The longest sequence of a model.

    Attributes:
        tokens: the most tokens in a sequence; None without a limit.
        table: a table of position embeddings has no row for a longer sequence, so that it fails. False: the
            configuration names the limit only, as for rotary embeddings, and a longer sequence runs.
    """

    tokens: int | None
    table: bool


def position_limit(model: nn.Module) -> PositionLimit:
    """Return the longest sequence of a transformers model, which may be on the meta device.

    In a model of several towers, the text tower counts; in an encoder-decoder, the shorter of both sides. RoBERTa and
    models like it keep the first rows of their table for padding; these rows are subtracted.
    """
    config: Any = model.config
    text = config.get_text_config()
    named = [getattr(text, name, None) for name in _LIMITS]
    stated = [] if getattr(text, "alibi", False) else [one for one in named if isinstance(one, int) and one > 0]
    rows = [
        table.num_embeddings - _reserved_rows(table)
        for table in _position_tables(model, config, (type(config), type(text)))
    ]
    return PositionLimit(min([*stated[:1], *rows], default=None), table=bool(rows))


def _position_tables(module: nn.Module, config: Any, towers: tuple[type, ...], name: str = "") -> list[nn.Embedding]:
    """Find the tables in the parts of a model whose configuration (`config`: the nearest one) is one of `towers`."""
    config = getattr(module, "config", config)
    found = []
    if isinstance(module, nn.Embedding) and ("position" in name or name == "wpe") and type(config) in towers:
        found.append(module)
    for child_name, child in module.named_children():
        found += _position_tables(child, config, towers, child_name)
    return found


def _reserved_rows(table: nn.Embedding) -> int:
    """Return the number of rows that no token uses: those up to the padding row, or the table's own `offset`."""
    rows: int = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
    return rows
