#!/usr/bin/env bash
# Installs into .venv, then runs lint, types, unit, distributed and integration tests, and prints a table.
#
#   launch/test.sh [--full] [--stage NAME]... [--] [PYTEST ARGUMENTS]
#
#   --full         also the tests marked slow
#   --stage NAME   only this stage (install always runs): lint, types, unit, distributed, integration
# Other arguments go to pytest. A path or node id among them replaces the test stages: `launch/test.sh tests/unit/test_house.py -k lines`.
# Exit code: 0 when every stage passed, 1 otherwise. Budgets are reported, never enforced.
# shellcheck disable=SC2329 # stages are called by name
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO_ROOT"

REPORTS=$REPO_ROOT/.test-reports
STAGES=(lint types unit distributed integration)

usage() { sed -n '2,/^# Exit code/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

budget_seconds() {
  case $1 in
  install) echo 300 ;;
  lint | types) echo 60 ;;
  unit) echo 120 ;;
  distributed) echo 420 ;;
  integration) echo 240 ;;
  *) echo - ;;
  esac
}

selected=() pytest_args=() selects_tests=0 selects_paths=0 marker=(-m 'not slow')
while [ $# -gt 0 ]; do
  case $1 in
  --help | -h)
    usage
    exit 0
    ;;
  --full) marker=() ;;
  --stage)
    [ $# -gt 1 ] || { echo "--stage needs a name: ${STAGES[*]}" >&2; exit 2; }
    shift
    case " ${STAGES[*]} " in
    *" $1 "*) selected+=("$1") ;;
    *) echo "--stage $1: unknown. Stages: ${STAGES[*]}" >&2; exit 2 ;;
    esac
    ;;
  --)
    shift
    pytest_args+=("$@")
    break
    ;;
  *) pytest_args+=("$1") ;;
  esac
  shift
done
for argument in ${pytest_args[@]+"${pytest_args[@]}"}; do
  case $argument in
  -k | -k?* | -m | -m?* | --lf | --last-failed | --deselect*) selects_tests=1 ;;
  tests | tests/*) selects_tests=1 selects_paths=1 ;;
  esac
done
if [ ${#selected[@]} = 0 ]; then
  if [ "$selects_paths" = 1 ]; then
    selected=(selection)
  elif [ "$selects_tests" = 1 ]; then
    selected=(unit distributed integration)
  else
    selected=("${STAGES[@]}")
  fi
fi

# A shell of its own, because errexit is off inside whatever is tested by || or if.
install() {
  # shellcheck disable=SC2016 # expanded by that shell
  bash -c 'source "$1" && prepare_environment demo dev' install "$REPO_ROOT/launch/environment.sh"
}

lint() {
  local failed=0
  "$VENV/bin/ruff" check . || failed=1
  "$VENV/bin/ruff" format --check . || failed=1
  "$VENV/bin/lint-imports" || failed=1
  "$VENV/bin/shellcheck" -x launch/*.sh .ci/run || failed=1
  return "$failed"
}

# Without the variable pyright asks a registry whether it is the newest.
types() { PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$VENV/bin/pyright" --pythonpath "$VENV/bin/python"; }

# run_pytest STAGE FOLDER; paths on the command line take the place of FOLDER
run_pytest() {
  local stage=$1 code=0
  shift
  if [ "$selects_paths" = 1 ]; then
    set --
  elif [ ! -d "$1" ]; then
    echo "stage $stage: the folder $1 does not exist" >&2
    return 1
  fi
  "$VENV/bin/python" -m pytest "$@" --junitxml="$REPORTS/$stage.xml" ${marker[@]+"${marker[@]}"} \
    ${pytest_args[@]+"${pytest_args[@]}"} || code=$?
  # pytest's 5: no test was collected, or every one was deselected.
  if [ "$code" = 5 ] && [ "$selects_tests" = 1 ] && [ "$selects_paths" = 0 ]; then
    echo "stage $stage: no test matches ${pytest_args[*]}" >&2
    return 0
  elif [ "$code" = 5 ]; then
    echo "stage $stage: no test was collected, which counts as a failure" >&2
  fi
  return "$code"
}

# Unit tests need no second process each, so two of them run at a time.
unit() { run_pytest unit tests/unit -n 2; }
distributed() { run_pytest distributed tests/distributed; }
integration() { run_pytest integration tests/integration; }
selection() { run_pytest selection tests; }

rm -rf "$REPORTS"
mkdir -p "$REPORTS"
any_failed=0

run_stage() {
  local stage=$1 start=$SECONDS result=ok
  printf '\n== %s ==\n' "$stage"
  # A subshell, so that `die` in a stage ends the stage and not the script.
  ("$stage") || { result=FAILED any_failed=1; }
  printf '%s\t%s\t%s\t%s\n' "$stage" "$((SECONDS - start))" "$(budget_seconds "$stage")" "$result" >>"$REPORTS/stages.tsv"
}

run_stage install
if [ "$any_failed" = 0 ]; then
  for stage in "${selected[@]}"; do run_stage "$stage"; done
else
  echo "nothing else can run without the installation" >&2
fi

# One line over all pytest stages.
total_line() {
  "$VENV/bin/python" - "$REPORTS" <<'PYTHON'
import pathlib, sys, xml.etree.ElementTree as ET
total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
for report in pathlib.Path(sys.argv[1]).glob("*.xml"):
    for suite in ET.parse(report).getroot().iter("testsuite"):
        for name in total:
            total[name] += int(suite.get(name, 0))
failed = total["failures"] + total["errors"]
skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
print(f"{total['tests'] - failed - total['skipped']} passed, {failed} failed{skipped}")
PYTHON
}

printf '\n%-14s %8s %8s  %s\n' stage seconds budget result
while IFS=$'\t' read -r stage seconds budget result; do
  printf '%-14s %8s %8s  %s\n' "$stage" "$seconds" "$budget" "$result"
done <"$REPORTS/stages.tsv"
total_line >"$REPORTS/total.txt" || echo '0 passed, 0 failed' >"$REPORTS/total.txt"
if [ "$selects_tests" = 1 ] && compgen -G "$REPORTS/*.xml" >/dev/null && grep -q '^0 passed, 0 failed' "$REPORTS/total.txt"; then
  echo "no test matches ${pytest_args[*]}" >&2
  any_failed=1
fi
cat "$REPORTS/total.txt"
exit "$any_failed"
