#!/usr/bin/env bash
# Installs into .venv, then runs lint, types and all tests, and prints a table. As root on Debian or Ubuntu it also installs
# the programs that tests of Slurm, monitoring and the image talk to, with apt-get; without root those tests are skipped.
#
#   launch/test.sh [--full] [--stage NAME]... [--] [PYTEST ARGUMENTS]
#
#   --full         also the tests marked slow
#   --stage NAME   only this stage (install always runs): lint, types, unit, distributed, integration, slurm, monitoring, image
# Other arguments go to pytest. A path or node id among them replaces the test stages: `launch/test.sh tests/unit/test_house.py -k lines`.
# Exit code: 0 when every stage passed, 1 otherwise. Budgets are reported, never enforced.
# shellcheck disable=SC2329 # stages are called by name
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO_ROOT"

REPORTS=$REPO_ROOT/.test-reports
TEST_STAGES=(unit distributed integration slurm monitoring image)
STAGES=(lint types "${TEST_STAGES[@]}")
INTEGRATION=tests/integration

usage() { sed -n '2,/^# Exit code/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

budget_seconds() {
  case $1 in
  install) echo 300 ;;
  lint | types) echo 60 ;;
  unit) echo 120 ;;
  distributed) echo 420 ;;
  integration | image) echo 240 ;;
  slurm) echo 300 ;;
  monitoring) echo 180 ;;
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
    selected=("${TEST_STAGES[@]}")
  else
    selected=("${STAGES[@]}")
  fi
fi

# A shell of its own, because errexit is off inside whatever is tested by || or if.
install() {
  # shellcheck disable=SC2016 # expanded by that shell
  bash -c 'source "$1" && prepare_environment demo dev' install "$REPO_ROOT/launch/environment.sh" || return
  [ "$selects_tests" = 1 ] || install_programs
}

# What the selected stages need beside Python. Their tests are skipped where it cannot be installed, which is code 2.
install_programs() {
  local stage code
  for stage in "${selected[@]}"; do
    code=0
    case $stage in
    slurm) bash "$INTEGRATION/install_slurm.sh" || code=$? ;;
    monitoring) bash "$INTEGRATION/install_prometheus.sh" || code=$? ;;
    image) bash "$INTEGRATION/install_image_tools.sh" || code=$? ;;
    esac
    [ "$code" = 0 ] || [ "$code" = 2 ] || return "$code"
  done
}

lint() {
  local failed=0
  "$VENV/bin/ruff" check . || failed=1
  "$VENV/bin/ruff" format --check . || failed=1
  "$VENV/bin/lint-imports" || failed=1
  "$VENV/bin/shellcheck" -x .ci/run launch/*.sh launch/*/*.{sh,sbatch} tests/*/*.sh tests/integration/*/*.sh || failed=1
  "$VENV/bin/hadolint" Dockerfile || failed=1
  return "$failed"
}

# Without the variable pyright asks a registry whether it is the newest.
types() { PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$VENV/bin/pyright" --pythonpath "$VENV/bin/python"; }

# run_pytest STAGE PATH [PYTEST ARGUMENTS]; paths on the command line take the place of all of that
run_pytest() {
  local stage=$1 code=0
  shift
  if [ "$selects_paths" = 1 ]; then
    set --
  elif [ ! -e "$1" ]; then
    echo "stage $stage: $1 does not exist" >&2
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
integration() {
  run_pytest integration "$INTEGRATION" --ignore-glob="*/test_slurm*" --ignore="$INTEGRATION/test_monitoring.py" \
    --ignore="$INTEGRATION/test_dashboards.py" --ignore="$INTEGRATION/test_image.py"
}
# Clusters wait more than they compute, and two of them do not meet.
slurm() { run_pytest slurm "$INTEGRATION"/test_slurm*.py -n 2 --dist worksteal; }
monitoring() { run_pytest monitoring "$INTEGRATION/test_dashboards.py" "$INTEGRATION/test_monitoring.py"; }
# Building takes longer than a test may otherwise be silent.
image() { run_pytest image "$INTEGRATION/test_image.py" -o faulthandler_timeout=900; }
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

# Writes one line over all pytest stages into total.txt, and prints what was skipped and why.
sum_up() {
  "$VENV/bin/python" - "$REPORTS" <<'PYTHON'
import collections, pathlib, sys, xml.etree.ElementTree as ET
folder, total, skipped = pathlib.Path(sys.argv[1]), collections.Counter(), []
for report in folder.glob("*.xml"):
    tree = ET.parse(report).getroot()
    for suite in tree.iter("testsuite"):
        total.update({name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")})
    for case in tree.iter("testcase"):
        reasons = [found.get("message") for found in case.iter("skipped")]
        skipped += [f"{case.get('classname')}::{case.get('name')}: {reason}" for reason in reasons]
if total["tests"]:
    print("\nskipped:", *skipped or ["nothing"], sep="\n  ")
failed = total["failures"] + total["errors"]
counted = f", {total['skipped']} skipped" if total["skipped"] else ""
(folder / "total.txt").write_text(f"{total['tests'] - failed - total['skipped']} passed, {failed} failed{counted}\n")
PYTHON
}
sum_up || echo '0 passed, 0 failed' >"$REPORTS/total.txt"

printf '\n%-14s %8s %8s  %s\n' stage seconds budget result
while IFS=$'\t' read -r stage seconds budget result; do
  printf '%-14s %8s %8s  %s\n' "$stage" "$seconds" "$budget" "$result"
done <"$REPORTS/stages.tsv"
if [ "$selects_tests" = 1 ] && compgen -G "$REPORTS/*.xml" >/dev/null && grep -q '^0 passed, 0 failed' "$REPORTS/total.txt"; then
  echo "no test matches ${pytest_args[*]}" >&2
  any_failed=1
fi
cat "$REPORTS/total.txt"
exit "$any_failed"
