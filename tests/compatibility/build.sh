#!/bin/sh
# Make the wheel of a release (HEAD by default) that later ones are tried against: `sh tests/compatibility/build.sh [COMMIT]`.
# Pure Python, and the same bytes from the same commit: it is built of what git has, without the optional extension, with
# the time of the commit, and put into this folder as onehop-RELEASE-py3-none-any.whl.
set -eu
cd "$(dirname "$0")/../.."
commit=$(git rev-parse "${1:-HEAD}")
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct "$commit")
export SOURCE_DATE_EPOCH
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
mkdir "$there/tree"
git archive "$commit" src pyproject.toml README.md LICENSE | tar -x -C "$there/tree"
umask 022
chmod -R u=rwX,go=rX "$there/tree"
.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$there/made" "$there/tree"
mv "$there"/made/onehop-*-py3-none-any.whl tests/compatibility/
