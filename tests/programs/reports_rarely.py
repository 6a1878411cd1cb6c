"""The protected server; a second report of a fault comes an hour after the first."""

import sys

from mlx_safe import _reports
from mlx_safe.cli import main

_reports.FAULT_REPORT_EVERY_S = 3600.0
sys.exit(main(["serve", *sys.argv[1:]]))
