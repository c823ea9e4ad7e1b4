"""Run a script as it is, and write down what it passes to its model: `recorded.py FOLDER SCRIPT ARGUMENTS...`.

A launcher starts it in the place of the script, on CPUs.
"""

import os
import runpy
import sys
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]


def main(folder: Path, script: str) -> None:
    import torch
    import transformers
    from lightning.pytorch.accelerators import CPUAccelerator

    from tests.support import integrations

    load, seen = transformers.AutoModelForCausalLM.from_pretrained, []

    def load_and_record(*args, **kwargs):
        model = load(*args, **kwargs)
        seen.append(integrations.Recording(model, accumulation=2))
        return model

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    with (
        integrations.accelerate_on_cpu(),
        integrations.lightning_on_cpu(),
        mock.patch.object(CPUAccelerator, "auto_device_count", staticmethod(lambda: ranks)),
        mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", load_and_record),
    ):
        runpy.run_path(script, run_name="__main__")
    [recording] = seen
    torch.save((recording.steps(), recording.rates), folder / f"{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    record, *sys.argv = sys.argv[1:]
    main(Path(record), sys.argv[0])
