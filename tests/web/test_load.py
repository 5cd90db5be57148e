"""The load test of `benchmarks/serve_load.py`, smaller: nothing is lost, mixed up or left behind."""

from __future__ import annotations

import asyncio

from benchmarks.serve_load import Found, left_behind, load
from tests.web.conftest import Model, serving


def test_under_load_with_clients_that_leave_nothing_is_lost_mixed_up_or_left_behind(
    model: Model, endless: dict[str, int]
) -> None:
    with serving(model, max_batch=8, max_queue=24) as live:
        found: Found = asyncio.run(load(live.url, "base", endless, requests=80, at_once=24, longest=96))
        assert found.wrong == []
        assert sum(found.outcomes.values()) == 80
        assert found.outcomes["broken off"] > 3
        assert not any(left_behind(live.url).values())
        assert live.worker.outstanding == 0
        assert not live.worker._tickets
        assert not live.worker._running
        assert not live.worker._numbers
