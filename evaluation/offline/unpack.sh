#!/bin/sh
# Checks the parts beside this file, unpacks them, and installs their wheels into a folder of their own:
#   sh unpack.sh FOLDER
# PYTHON=python3.12 sh unpack.sh FOLDER names the Python that will run them (default: python3).
set -eu

packed_for=X.Y # the version of Python; packing writes it here

main() {
    [ $# = 1 ] || fail "expected one folder: sh unpack.sh FOLDER"
    check_python "$1"
    mkdir -p "$1"
    to=$(cd "$1" && pwd)
    cd "$(dirname "$0")"
    [ -s SHA256SUMS ] || fail "SHA256SUMS is missing or empty: copy it again"
    count=$(($(wc -l <SHA256SUMS)))
    [ "$(tail -n 1 SHA256SUMS | cut -d ' ' -f 3)" = "$(printf 'part-%03d-of-%03d' "$count" "$count")" ] ||
        fail "SHA256SUMS does not list all parts: copy it again"
    wrong=0
    while read -r sum name; do
        if [ ! -f "$name" ]; then
            echo "missing: $name" >&2
            wrong=1
        elif [ "$(sha256sum "$name" | cut -d ' ' -f 1)" != "$sum" ]; then
            echo "damaged: $name ($(wc -c <"$name") bytes)" >&2
            wrong=1
        fi
    done <SHA256SUMS
    [ "$wrong" = 0 ] || fail "copy these parts again, then run the same command; nothing was unpacked"
    move_old
    sed 's/^[^ ]*  //' SHA256SUMS | xargs cat | tar -x -C "$to" -f -
    set -- "$to"/wheels/*.whl
    if [ -f "$1" ]; then
        # by the variable, because pip before 22.1 refuses the option
        PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --no-index --no-deps --target "$to/site" "$@"
    fi
    if there "$to/kept-runs"; then
        mv "$to/kept-runs" "$to/project/runs"
        echo "project/runs is that of the old project"
    fi
    echo "unpacked into $to"
    PYTHONPATH="$to/site${PYTHONPATH:+:$PYTHONPATH}" "$python" "$to/project/evaluation/offline/ready.py" "$to"
}

# Sets python to the absolute path of the Python that will run the project.
check_python() {
    named=${PYTHON:-python3}
    remedy="PYTHON=python$packed_for sh unpack.sh $1"
    version='import sys; print("%d.%d" % sys.version_info[:2])'
    found=$("$named" -c "$version") || fail "$named cannot be run; packed for Python $packed_for: $remedy"
    [ "$found" = "$packed_for" ] ||
        fail "packed for Python $packed_for, $named is $found: $remedy, or pack again with --python $found"
    "$named" -m pip --version >/dev/null 2>&1 ||
        fail "$named has no pip (Debian, Ubuntu: apt install python3-pip), or name another Python: $remedy"
    python=$("$named" -c 'import sys; print(sys.executable)')
}

# Moves what was unpacked before into a folder old-1, old-2 and so on, because new files among old ones would mix two
# versions. The runs wait in kept-runs, where the next call finds them if this one is interrupted.
move_old() {
    if there "$to/project/runs"; then
        ! there "$to/kept-runs" ||
            fail "both $to/project/runs and $to/kept-runs, of an interrupted call, exist: move one of them away"
        mv "$to/project/runs" "$to/kept-runs"
    fi
    number=1
    while there "$to/old-$number"; do
        number=$((number + 1))
    done
    for name in project site wheels; do
        if there "$to/$name"; then
            mkdir -p "$to/old-$number"
            mv "$to/$name" "$to/old-$number/$name"
            echo "moved the old $name to $to/old-$number"
        fi
    done
}

there() {
    [ -e "$1" ] || [ -L "$1" ]
}

fail() {
    echo "error: $1" >&2
    exit 1
}

main "$@"
