"""Errors of a disk name the file and say how to go on."""

import os
from pathlib import Path

import pytest

from hift_ds.launch.errors import UserError
from hift_ds.launch.runtime import outputs


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device.*--resume"):
        with outputs.writing(tmp_path / "x"), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    with pytest.raises(UserError, match="summary.json: cannot be written"):
        outputs.write_json(tmp_path / "absent" / "summary.json", {})
    assert os.listdir(tmp_path) == []
