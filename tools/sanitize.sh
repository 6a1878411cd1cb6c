#!/usr/bin/env bash
# The native tests in a build with sanitizers: tools/sanitize.sh DIRECTORY
# Every report of a sanitizer makes a program fail, and so this script.
set -euo pipefail
build=$(cd "$1" && pwd)
export MLX_SAFE_METAL_RUNTIME=$build/metalsim/libmetalsim.so
hooks=$build/libmlx_safe_hooks.so
log=$(mktemp)
cases=$(mktemp)
trap 'rm -f "$log" "$cases"' EXIT
count=0
left_out=()

run() {
  count=$((count + 1))
  if ! timeout 500 "$@" > "$log" 2>&1; then
    echo "failed: $*"
    cat "$log"
    exit 1
  fi
}

run "$build/metalsim/metalsim_selftest"
run "$build/fuzz_errors" 2 2000
for regime in intercept observe; do run "$build/fuzz_nserror" 2 1000 $regime; done
run "$build/rings"
"$build/surroundings" --list > "$cases"
while read -r case regime; do
  if [[ $case == forked && $build == *tsan ]]; then
    left_out+=("forked ($regime): ThreadSanitizer cannot follow a fork of a process with threads")
    continue
  fi
  run "$build/surroundings" "$case" "$hooks" "$build/libmlx_safe_hooks_twin.so" "$regime"
done < "$cases"
for case in $("$build/after_failure" --list); do
  run "$build/after_failure" "$case" "$hooks" intercept
done
for regime in intercept observe; do
  for workload in basic midgraph two_queues gpu_cpu_gpu fences sync decode tls; do
    for nth in 1 4 9; do
      run "$build/metalsim/host_$regime" "--workload=$workload" --rounds=5 \
        "--fail-nth=$nth" --late-us=500 "--seed=$nth" "--hooks=$hooks"
    done
  done
done
echo "$count native runs under the sanitizers of $(basename "$build"), no reports"
for what in "${left_out[@]}"; do echo "left out: $what"; done
