"""What a run should say about its data: each matter once, with the number of rows and an example."""

from __future__ import annotations

from dataclasses import dataclass, field

from hift_ds.launch.errors import listed

SENTENCES = {
    "assistant first": "conversations begin with the assistant; this turn is not trained, because nothing asks for it",
    "one example a turn": (
        "the chat template writes earlier turns differently when later ones follow, so there is one example for each "
        "turn of the assistant"
    ),
    "other roles": (
        "messages with other roles than system, developer, user, assistant, tool and function, "
        "which are never trained: {names}"
    ),
    "keys not used": "keys of messages that are not used, because the chat template does not write them: {names}",
    "messages not written": "messages that the chat template leaves out, by role: {names}",
    "control tokens": (
        "texts contain control tokens of the tokenizer, and become these tokens: {names}; change them where they are "
        "meant as text"
    ),
    "no end mark": (
        "warning: answers end without a control token, so the trained model does not know where to stop; use a "
        "tokenizer whose chat template ends turns with one (model.tokenizer), or stop at a text. They end with {names}"
    ),
}

MAX_NAMES = 1000  # of a matter; each row may bring a new one


@dataclass
class Remark:
    """One matter: in how many rows it was found, the first of them, and the names concerned with their rows."""

    rows: int = 0
    first: str = ""
    names: dict[str, int] = field(default_factory=dict)


@dataclass
class Remarks:
    """The matters found in rows. A row counts once for each matter, and once for each name."""

    found: dict[str, Remark] = field(default_factory=dict)
    _latest: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, matter: str, where: str, name: str = "") -> None:
        """Count a row, at `where`, for a matter and a name. Rows must come in their order."""
        remark = self.found.setdefault(matter, Remark(first=where))
        if self._is_new(matter, "", where):
            remark.rows += 1
        if name and (name in remark.names or len(remark.names) < MAX_NAMES) and self._is_new(matter, name, where):
            remark.names[name] = remark.names.get(name, 0) + 1

    def merge(self, later: Remarks) -> None:
        """Add what was found in later rows."""
        for matter, one in later.found.items():
            remark = self.found.setdefault(matter, Remark(first=one.first))
            remark.rows += one.rows
            for name, rows in one.names.items():
                if name in remark.names or len(remark.names) < MAX_NAMES:
                    remark.names[name] = remark.names.get(name, 0) + rows

    def _is_new(self, matter: str, name: str, where: str) -> bool:
        is_new = self._latest.get((matter, name)) != where
        self._latest[matter, name] = where
        return is_new


def sentence(matter: str, names: dict[str, int]) -> str:
    """Return what is said about a matter. `names` are named with their numbers of rows, the most frequent first."""
    counted = sorted(names.items(), key=lambda item: -item[1])
    return SENTENCES[matter].format(names=listed((f"{name} ({n})" for name, n in counted), most=10))
