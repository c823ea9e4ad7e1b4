"""Say which packages a machine lacks, and what to run there. unpack.sh starts this file, with the unpacked folder.

It imports nothing of the project, because that could fail for the packages that it looks for.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # pip's copy finds out what else is missing beside packaging
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

UNUSED = ("wandb", "requests")  # of the extra `train`: nothing imports them unless a setting asks for them
_SECTION = r"^{} = \[\n(.*?)^\]"
_ITEM = re.compile(r'^    "([^"]+)"', re.MULTILINE)


def requirements(pyproject: str) -> list[str]:
    """Return what the engine, launch/ and evaluation/ need, from the text of pyproject.toml."""
    found: list[str] = []
    for name in ("dependencies", "train"):
        section = re.search(_SECTION.format(name), pyproject, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        found += _ITEM.findall(section[1])
    return [text for text in found if Requirement(text).name not in UNUSED]


def lacking(texts: list[str], site: Path) -> Iterator[str]:
    """Yield what is not installed of these requirements, and of those of the packages in the folder `site`."""
    needed = [(text, "hift_ds") for text in texts]
    for one in importlib.metadata.distributions(path=[str(site)]):
        needed += [(text, one.metadata["Name"]) for text in one.requires or ()]
    for text, by in needed:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{wanted.name} is not installed; {by} needs {wanted.name}{wanted.specifier}"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} is {found}; {by} needs {wanted.name}{wanted.specifier}"


def environment(site: Path) -> str:
    """Return the text of env.sh: this Python, and the packages that were unpacked for it."""
    path = shlex.quote(str(site)) + "${PYTHONPATH:+:$PYTHONPATH}"
    return f"export PYTHON={shlex.quote(sys.executable)}\nexport PYTHONPATH={path}\n"


def main(folder: Path) -> int:
    """Write env.sh, and print what is missing, or the command of a comparison; return the exit code."""
    (folder / "env.sh").write_text(environment(folder / "site"))
    problems = sorted(set(lacking(requirements((folder / "project" / "pyproject.toml").read_text()), folder / "site")))
    if problems:
        print("error: this machine lacks packages:", *problems, sep="\n", file=sys.stderr)
        print("install them here, or pack again with --add NAME==VERSION for each", file=sys.stderr)
        return 1
    models = sorted((folder / "models").iterdir())
    for model in models:
        print(f"model  {model}")
    print(f"data   {folder / 'data'}")
    model_path = str(models[0]) if len(models) == 1 else "MODEL"
    arguments = ["--set", f"model.name_or_path={model_path}", "--set", f"data.path={folder / 'data'}"]
    arguments += ["--jobs", "4", "--minutes", "8", "--only", "zero-shot", "full", "hift", "lora"]
    print("to run, in any shell" + ("" if len(models) == 1 else ", with one of the models as MODEL") + ":")
    place, project = shlex.quote(str(folder / "env.sh")), shlex.quote(str(folder / "project"))
    print(f". {place} && cd {project} && make gpu-compare ARGS={shlex.quote(shlex.join(arguments))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
