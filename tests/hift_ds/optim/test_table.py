"""Every `optim` of transformers' Trainer has a place in the tests' table and in the documentation."""

import re
from pathlib import Path

import pytest
from transformers.training_args import OptimizerNames

from hift_ds.state.trial import examine
from tests.support import optimizers

PAGE = Path(__file__).parents[3] / "docs" / "optimizers.md"


def table() -> dict[str, str]:
    """First cell -> the rest of the row, for each name in the first cell."""
    rows = re.findall(r"^\| (`[a-z].*?) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {name: rest for names, rest in rows for name in re.findall(r"`(\w+)`", names)}


def test_the_tests_and_the_page_know_every_name() -> None:
    names = {name.value for name in OptimizerNames}
    known = {
        **optimizers.EXACT,
        **dict.fromkeys(optimizers.TORCHAO),
        **optimizers.REFUSED,
        **optimizers.BY_TRANSFORMERS,
    }
    assert names == set(known) == set(table()) & names


@pytest.mark.parametrize("name", [*optimizers.EXACT, *optimizers.TORCHAO])
def test_the_page_has_the_stages(name: str) -> None:
    assert table()[name].startswith(f"exact at stage {optimizers.EXACT.get(name, optimizers.WHOLE)} |") or (
        optimizers.EXACT.get(name) == optimizers.ALL and table()[name].startswith("exact at stages 0 to 3 |")
    )


@pytest.mark.parametrize("name", [*optimizers.REFUSED, *optimizers.BY_TRANSFORMERS])
def test_the_page_has_what_is_refused(name: str) -> None:
    assert table()[name].startswith("refused")


@pytest.mark.parametrize("name", [name for name in optimizers.REFUSED if name not in ("adalomo", "galore_adamw_8bit")])
def test_refused(name: str) -> None:
    with pytest.raises(ValueError, match="HiFT cannot train with") as error:
        examine(optimizers.made(name, optimizers.model()))
    assert optimizers.REFUSED[name] in str(error.value)


def test_the_embeddings_of_the_trainer_stay_in_32_bits() -> None:
    """bitsandbytes keeps that setting by the parameter's place in the optimizer, which differs between blocks."""
    from hift_ds.optim.properties import restrict

    optimizers.forget_overrides()
    llama = optimizers.model()
    whole = optimizers.made("adamw_8bit", llama)
    embeddings, other = llama.model.embed_tokens.weight, llama.model.layers[0].mlp.up_proj.weight
    for members, bits in (([embeddings], 32), ([other], 8)):
        clone, _ = restrict(whole, members)
        assert clone.get_config(0, 0, clone.param_groups[0])["optim_bits"] == bits
