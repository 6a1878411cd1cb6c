"""Each client in each case: see `cases`."""

from __future__ import annotations

import pytest

from clients.cases import CASES, Case, Stage
from clients.stage import CLIENTS, Client

CELLS = [
    pytest.param(case, client, id=f"{case.name}-{client.name}")
    for case in CASES
    for client in CLIENTS
    if client.name not in case.without
]


@pytest.mark.parametrize(("case", "client"), CELLS)
def test_client(stage: Stage, case: Case, client: Client) -> None:
    reference = stage.outcomes(CASES[0])[client.name]
    case.expected(client, stage.outcomes(case)[client.name], reference)
