#!/usr/bin/env bash
# mlx 0.32.4 on Linux: its backends cannot be installed side by side.
#
# `mlx[cpu]` brings the package mlx-cpu, `mlx[cuda13]` the package mlx-cuda-13. Both wheels
# carry mlx/lib/libmlx.so, and neither names the other, so pip installs both without a word
# and the one that came last is what computes. A project that depends on `mlx[cpu]` can so
# take the place of a user's CUDA backend.
#
# Guess beforehand: backends with names of their own have files of their own, as plug-ins
# that mlx finds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for package in mlx-cpu mlx-cuda-13; do
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --python-version 3.12 --platform manylinux_2_35_x86_64 --dest "$work/$package" "$package==0.32.4"
done
python3 - "$work" << 'PY'
import sys
import zipfile
from pathlib import Path

names = {}
for package in ("mlx-cpu", "mlx-cuda-13"):
    (wheel,) = (Path(sys.argv[1]) / package).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names[package] = set(archive.namelist())
        (about,) = (n for n in names[package] if n.endswith(".dist-info/METADATA"))
        text = archive.read(about).decode()
    other = {"mlx-cpu": "mlx-cuda", "mlx-cuda-13": "mlx-cpu"}[package]
    print(package, wheel.stat().st_size, "bytes; names the other:", other in text)
    assert other not in text
both = sorted(n for n in names["mlx-cpu"] & names["mlx-cuda-13"] if n.endswith(".so"))
print("in both:", *both)
assert both == ["mlx/lib/libmlx.so"]
PY
