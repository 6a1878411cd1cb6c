#!/usr/bin/env bash
# mlx-metal 0.32.4, the wheel tagged macosx_26_0_arm64: its libraries need macOS 26.2.
#
# A tag macosx_26_0 promises macOS 26.0 and later, so pip installs the wheel on 26.0 and
# 26.1. The libraries in it (LC_BUILD_VERSION) say minos 26.2. The wheels for macOS 14
# and 15 say what their tags say.
#
# Guess before looking: minos 26.0 in the third, as 14.0 and 15.0 in the other two.
# Seen: libmlx.dylib 14.0, 15.0, 26.2 (and the same in libjaccl.dylib).
# What dyld makes of it on a 26.0 was not tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for system in 14 15 26; do
  python3 -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary=:all: --platform "macosx_${system}_0_arm64" --dest "$folder" \
    mlx-metal==0.32.4
done
python3 - "$folder" <<'PYTHON'
import struct
import sys
import zipfile
from pathlib import Path

LC_BUILD_VERSION = 0x32
found = {}
for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    head = zipfile.ZipFile(wheel).open("mlx/lib/libmlx.dylib").read(16384)
    (count,) = struct.unpack_from("<I", head, 16)
    at = 32
    for _ in range(count):
        kind, size = struct.unpack_from("<2I", head, at)
        if kind == LC_BUILD_VERSION:
            (minimum,) = struct.unpack_from("<I", head, at + 12)
            tag = wheel.name.split("-")[-1].removesuffix(".whl")
            found[tag] = f"{minimum >> 16}.{minimum >> 8 & 255}"
        at += size
for tag, minimum in found.items():
    print(f"{tag}: needs macOS {minimum}")
sys.exit(
    found
    != {
        "macosx_14_0_arm64": "14.0",
        "macosx_15_0_arm64": "15.0",
        "macosx_26_0_arm64": "26.2",
    }
)
PYTHON
