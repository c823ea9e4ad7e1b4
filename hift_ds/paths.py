"""What is wrong with a path, in words, before anything is opened: each command says it in one line with its key."""

import argparse
import os
import stat
from pathlib import Path

# Bytes of the names of files that a run makes inside its folder, such as checkpoints/step_100/rank_0/state.pt.
INSIDE = 256


def fault(path: str | Path, *, reads: bool = False, inside: int = 0) -> str | None:
    """Return why a file or folder of this name cannot exist or be reached, or None. A missing one is no fault.

    Args:
        path: the name as the user gave it; ``~`` is expanded.
        reads: also find that an existing file or folder may not be read.
        inside: bytes of the names of files that are made inside the folder.
    """
    name = str(path)
    if not name.strip():
        return f"{name!r} is empty; expected a path"
    try:
        place = Path(os.path.abspath(Path(name).expanduser()))
        encoded = os.fsencode(place)
    except RuntimeError:
        return f"{name!r}: there is no user {name.split('/')[0][1:]!r} on this machine; write the whole path"
    except (ValueError, OSError):
        return f"{_short(name)} has characters that no file name can have; remove them"
    if b"\0" in encoded:
        return f"{_short(name)} has a NUL character, which no file name can have; remove it"
    existing = next(one for one in (place, *place.parents) if os.path.exists(one))
    longest = max(place.parts, key=lambda part: len(os.fsencode(part)))
    if (size := len(os.fsencode(longest))) > (limit := _limit(existing, "PC_NAME_MAX", 255)):
        return f"the name {_short(longest)} has {size} bytes, and the drive takes at most {limit}; shorten it"
    if (size := len(encoded)) + inside > (limit := _limit(existing, "PC_PATH_MAX", 4096)):
        files = f" and {inside} for the files inside" if inside else ""
        return f"the path {_short(name)} has {size} bytes{files}, and the drive takes at most {limit}; shorten it"
    return _fault_on_the_way(place) or (
        f"{name!r} cannot be read (no permission); grant it, or name another"
        if reads and os.path.exists(place) and not os.access(place, os.R_OK)
        else None
    )


def to_read(name: str) -> Path:
    """Return the path of a command's argument that is read; a `type` of argparse."""
    return _argument(name, reads=True)


def to_write(name: str) -> Path:
    """Return the path of a command's argument that is written; a `type` of argparse."""
    return _argument(name, reads=False)


def _argument(name: str, reads: bool) -> Path:
    if reason := fault(name, reads=reads):
        raise argparse.ArgumentTypeError(reason)
    return Path(name).expanduser()


def _fault_on_the_way(place: Path) -> str | None:
    """Return the first folder on the way to a place that is none, that may not be entered, or that is a broken link."""
    for part in (*reversed(place.parents), place):
        try:
            found = part.stat()
        except FileNotFoundError:
            if part.is_symlink():
                return (
                    f"{str(part)!r} is a link to {os.readlink(part)!r}, which does not exist; mend or remove the link"
                )
            return None
        except OSError as error:  # no permission, a circle of links
            return f"{str(part)!r} cannot be reached ({error.strerror}); name another path"
        if part != place and not stat.S_ISDIR(found.st_mode):
            return f"{str(part)!r} is a file, not a folder; name another path"
    return None


def _limit(place: Path, name: str, default: int) -> int:
    try:
        return os.pathconf(place, name)
    except (OSError, ValueError):
        return default


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:40]}...{name[-12:]}")
