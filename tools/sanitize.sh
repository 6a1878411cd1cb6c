#!/usr/bin/env bash
# The native tests in a build with sanitizers: tools/sanitize.sh DIRECTORY
# Every report of a sanitizer makes a program fail, and so this script.
set -euo pipefail
build=$(cd "$1" && pwd)
export MLX_SAFE_METAL_RUNTIME=$build/metalsim/libmetalsim.so
hooks=$build/libmlx_safe_hooks_checked.so
commands=$(mktemp)
cases=$(mktemp)
trap 'rm -f "$commands" "$cases"' EXIT
left_out=()

run() {
  printf '%q ' "$@" >> "$commands"
  printf '\0' >> "$commands"
}

run_one() {
  local said
  if ! said=$(eval "timeout 500 $1" 2>&1); then
    printf 'failed: %s\n%s\n' "$1" "$said"
    return 255 # xargs starts no more
  fi
}
export -f run_one

run "$build/metalsim/metalsim_selftest"
run "$build/fuzz_errors" 2 2000
for regime in intercept observe; do run "$build/fuzz_nserror" 2 1000 $regime; done
run "$build/rings"
run "$build/ledger_rules"
"$build/surroundings" --list > "$cases"
while read -r case regime; do
  if [[ $case == forked && $build == *tsan ]]; then
    left_out+=("forked ($regime): ThreadSanitizer cannot follow a fork of a process with threads")
    continue
  fi
  run "$build/surroundings" "$case" "$hooks" "$build/libmlx_safe_hooks_twin.so" "$regime"
done < "$cases"
"$build/after_failure" --list > "$cases"
while read -r case regime; do
  run "$build/after_failure" "$case" "$hooks" "$regime"
done < "$cases"
# The sweep, thinned out: each n with one code, one lateness, once or lasting.
codes=(8 2 3 5 6 9 10 11 14 16 17 7)
for regime in intercept observe; do
  for workload in basic midgraph two_queues gpu_cpu_gpu fences sync decode tls held_up; do
    for nth in 1 2 3 4 5 7 9 12; do
      lasting=()
      ((nth % 3 != 0)) || lasting=(--persistent)
      run "$build/metalsim/host_$regime" "--workload=$workload" --rounds=5 \
        "--fail-nth=$nth" "--code=${codes[nth % 12]}" "${lasting[@]}" \
        "--late-us=$((nth % 2 * 500))" "--seed=$nth" --expect=sound "--hooks=$hooks"
    done
    run "$build/metalsim/host_$regime" "--workload=$workload" --rounds=5 \
      --fail-nth=3 --code=4 --expect=sound "--hooks=$hooks"
  done
done
# MLX 0.32.1 waits before it commits; at some of these it would hang.
for nth in 1 5 12; do
  run "$build/metalsim/host_observe" --workload=held_up --mlx=0.32.1 --rounds=3 \
    "--fail-nth=$nth" --expect=sound "--hooks=$hooks"
done
left_out+=("of the sweep: n beyond 12, and each n with every code, lasting and late; \
tests/test_metal.py runs all of them, without sanitizers, which make them too slow")
# Each mostly waits: ThreadSanitizer a second at its end, for what other threads do then.
# shellcheck disable=SC2016  # the expression is bash's
xargs -0 -n 1 -P 4 bash -c 'run_one "$1"' run_one < "$commands"
echo "$(tr -cd '\0' < "$commands" | wc -c) native runs under the sanitizers of $(basename "$build"), no reports"
for what in "${left_out[@]}"; do echo "left out: $what"; done
