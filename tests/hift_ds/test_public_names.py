"""The public names of the package: importing the package is light, and each name resolves to what its users expect."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hift_ds

HEAVY = ("torch", "deepspeed", "transformers", "peft", "numpy")


def test_importing_the_package_imports_no_heavy_library():
    code = f"import sys, hift_ds; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_settings_and_schedule_need_no_heavy_library():
    code = (
        "import sys; from hift_ds import BlockSchedule, ConfigError, HiFTConfig; "
        f"print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("name", hift_ds.__all__)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(hift_ds, name)
    assert value.__name__ == name
    # vars() and not __doc__: a class inherits the docstring of its base, and a dataclass gets its signature.
    documented = value.__doc__ if inspect.isfunction(value) else vars(value).get("__doc__")
    assert documented and documented.strip() and not documented.startswith(f"{name}(")
    assert name in dir(hift_ds)


def test_type_checkers_see_the_same_names_in_the_same_modules():
    tree = ast.parse(Path(hift_ds.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert sorted(imported) == sorted(hift_ds.__all__)
    for name, module in imported.items():
        assert getattr(hift_ds, name).__module__ == module


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hift_ds' has no attribute 'nothing'"):
        _ = hift_ds.nothing  # type: ignore[attr-defined]
