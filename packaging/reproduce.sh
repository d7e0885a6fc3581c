#!/bin/sh
# Builds everything that `make packages` has built once more, from another directory and with nothing compiled before, and compares.
set -eu

cd "$(dirname "$0")/.."
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
git ls-files -z | xargs -0 cp --parents -t "$elsewhere"
"$elsewhere/packaging/build.sh" >/dev/null
for file in target/package/work/executable target/package/*.*; do
	cmp "$file" "$elsewhere/$file" && echo "the same: $file"
done
