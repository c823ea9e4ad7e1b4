"""Exit codes are an interface: scripts and schedulers compare numbers."""

from hift_ds.launch.exit_codes import MISTAKE, RANK_LOST, STOPPED


def test_the_documented_numbers() -> None:
    assert (MISTAKE, STOPPED, RANK_LOST) == (2, 75, 76)  # docs/stopping.md
