#!/usr/bin/env bash
# A stream of mlx-data with repeat(1) goes through the data twice.
#
# Package: mlx-data 0.1.0 (Linux), Stream.repeat.
# Guess before: repeat(n) is n passes, as in tf.data, where repeat(1) changes nothing.
# Seen: repeat(1) is two passes, repeat(2) three. It counts resets ("Reset the stream num_time
# times before declaring it exhausted"). So epochs in an option, given to repeat, train one more.
# Another surprise: a shuffled buffer is in the same order in each pass. And a batch may hold
# examples of two passes.
# Write a loop over the epochs, with a new stream in each.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx-data==0.1.0' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.data

buffer = mlx.data.buffer_from_vector([{"x": i} for i in range(5)])


def passes(times):
    stream = buffer.to_stream().repeat(times)
    found = len(list(stream)) / len(buffer)
    print(f"repeat({times}): {found:g} passes")
    return found


assert len(list(buffer.to_stream())) == 5
assert [passes(n) for n in (1, 2, 3)] == [2, 3, 4]
shuffled = [int(s["x"]) for s in buffer.shuffle().to_stream().repeat(1)]
batches = [s["x"].tolist() for s in buffer.to_stream().repeat(1).batch(4)]
print(f"shuffled: {shuffled}; batches of four: {batches}")
assert shuffled[:5] == shuffled[5:]
assert batches == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4]]
PYTHON
