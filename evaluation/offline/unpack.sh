#!/bin/sh
# Checks the parts beside this file, unpacks them, and installs their wheels into a folder of their own:
#   sh unpack.sh FOLDER
# PYTHON=python3.12 sh unpack.sh FOLDER names the Python that will run them (default: python3).
set -eu

main() {
    [ $# = 1 ] || fail "expected one folder: sh unpack.sh FOLDER"
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
    sed 's/^[^ ]*  //' SHA256SUMS | xargs cat | tar -x -C "$to" -f -
    python=${PYTHON:-python3}
    set -- "$to"/wheels/*.whl
    if [ -f "$1" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$to/site" "$@"
    fi
    echo "unpacked into $to"
    PYTHONPATH="$to/site" "$python" "$to/project/evaluation/offline/ready.py" "$to"
}

fail() {
    echo "error: $1" >&2
    exit 1
}

main "$@"
