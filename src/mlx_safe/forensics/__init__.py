"""Crash reports, read: what died, when, why, and what to do about it.

    recover   the members that can still be read of any bytes
    records   the typed `Report`, made of whatever was read
    reader    `read`: one `Report` from a file, a directory, anything
    store     the directory: list, prune, what was announced and what was seen
    orphans   a process that died without a report becomes one
    startup   what `mlx_safe.install` does here: adopt, tell, prune
    words     headline, advice, time line, chart: a `Report` as sections of text
    render    sections on a terminal, with rich or without
    export    a copy without what is private
    command   ``mlx-safe reports``

Imports nothing by itself: `install` comes here at import of the package. What
the members of a report are: ``docs/reports.md``.
"""
