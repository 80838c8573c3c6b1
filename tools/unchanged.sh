# Format, lint, clean and export, and fail where that changes anything: then the working tree was not what its
# notebooks say. Work that is not committed yet is fine; it only must not change under the tools.
set -eu
state() { git status --porcelain; git diff HEAD | git hash-object --stdin; }
ruff format --check --quiet . || { echo "not formatted: run \`make format\`, then look at the difference" >&2; exit 1; }
ruff check --quiet .
before=$(state)
nbdev_clean
nbdev_export
if [ "$before" != "$(state)" ]; then
  echo "cleaning and exporting the notebooks changed the working tree: run \`make format\` and commit the result" >&2
  git status --short >&2
  exit 1
fi
