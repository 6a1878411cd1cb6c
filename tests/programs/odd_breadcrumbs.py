"""Breadcrumbs of every kind of value."""

import mlx_safe
from mlx_safe import _reports


class Odd:
    def __repr__(self):
        raise RuntimeError

    __str__ = __repr__


mlx_safe.breadcrumb("x" * 94 + "\u00e4\u00e4")
mlx_safe.breadcrumb("values", n=None, t=True, i=-3, f=0.5, s='"\n\0', odd=Odd())  # type: ignore[arg-type]
mlx_safe.breadcrumb("not", nan=float("nan"), big=1 << 80, lone="\udc80")
mlx_safe.breadcrumb("long", kept=1, long="y" * 500, also=2)
mlx_safe.breadcrumb("", **{'a "key"': 1, "text": 2, "kind": 3})
for wrong in (None, 3, b"bytes"):
    try:
        mlx_safe.breadcrumb(wrong)  # type: ignore[arg-type]
    except TypeError:
        continue
    raise AssertionError(wrong)
_reports.write("fault", "")
