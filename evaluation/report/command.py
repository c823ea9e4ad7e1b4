"""Write the report of a comparison of fine-tuning methods: tables and pictures, as Markdown and as one HTML file.

    python -m evaluation.report OUT [--add FOLDER...] [--join-budgets] [--title TITLE]
        [--verdicts verdicts.jsonl] [--wandb offline]

OUT is a folder with results.jsonl. The command writes report.md, report.html and plots/ into it. --add first copies the
cells of other comparisons into OUT/results.jsonl, e.g. seeds or tasks that ran on another machine. --join-budgets shows
tasks with budgets of their own side by side. The default title is the title of the comparison; it is also the name of
the group of runs at Weights & Biases.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hift_ds import paths
from hift_ds.evaluation.mt_bench.verdicts import read_verdicts
from hift_ds.evaluation.report import results
from hift_ds.evaluation.report.content import write_report
from hift_ds.evaluation.report.results import RESULTS, SETTINGS
from hift_ds.evaluation.report.wandb_report import log_report
from hift_ds.launch.errors import UserError

TITLE = "Comparison of fine-tuning methods"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _title(folder: Path) -> str:
    try:
        return str(json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["title"])
    except (OSError, ValueError, KeyError, TypeError):  # results made by --add have no settings
        return TITLE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; return the exit code: 0, or 2 for a user error."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m evaluation.report", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("out", type=paths.to_write, metavar="OUT", help=f"folder with {RESULTS}")
    parser.add_argument(
        "--add", nargs="+", type=paths.to_read, metavar="FOLDER", help=f"first copy the cells of its {RESULTS} into OUT"
    )
    parser.add_argument(
        "--join-budgets",
        action="store_true",
        help="count a model's budgets in samples as one, and those in seconds as one",
    )
    parser.add_argument(
        "--verdicts", type=paths.to_read, metavar="FILE", help="verdicts of MT-Bench, written by evaluation.mt_bench"
    )
    parser.add_argument("--title", help=f"default: the title of the comparison, or {TITLE!r}")
    parser.add_argument(
        "--wandb", choices=("offline", "online"), help="also log tables and pictures as a run of Weights & Biases"
    )
    parser.add_argument("--wandb-project", metavar="NAME", help="default: the project of training runs")
    try:
        options = parser.parse_args(argv)
        if options.add:
            results.add_cells(options.out, options.add)
        found = results.read_results(options.out / RESULTS)
        if options.join_budgets:
            found = results.with_joined_budgets(found)
        judged = read_verdicts(options.verdicts) if options.verdicts else None
        title = options.title or _title(options.out)
        write_report(found, options.out, title, verdicts=judged)
        if options.wandb:
            from hift_ds.launch.config.settings import LoggingSettings  # takes seconds to import

            project = options.wandb_project or LoggingSettings.wandb_project
            log_report(found, options.out, title, mode=options.wandb, project=project, verdicts=judged or ())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out / 'report.html'} and report.md: {len(found)} cells")
    return 0
