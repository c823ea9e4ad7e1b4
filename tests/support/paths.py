"""Where the project's files are."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
