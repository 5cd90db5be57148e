"""kill -9 at any moment, then --resume: the same bytes as a run that nobody touched."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.train.small_run import Death, left_behind, train, train_in_process


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("untouched") / "run"
    process = train_in_process(run)
    process.join()
    assert process.exitcode == 0
    return left_behind(run)


def places_to_die(folder: Path) -> list[tuple[str, int]]:
    """Every place of the small run, by counting them in a run that is let live."""
    death = Death("", 0)
    with death.lurking():
        train(folder / "counted")
    return [(kind, number) for kind, times in sorted(death.calls.items()) for number in range(1, times + 1)]


def test_a_run_killed_at_any_place_and_resumed_leaves_the_same_bytes(
    tmp_path: Path, untouched: dict[str, bytes]
) -> None:
    places = places_to_die(tmp_path)
    kinds = {kind for kind, _ in places}
    assert {"half a tensor file", "half a removal", "half an event", "before a rename", "after an update"} <= kinds
    differing = []
    for kind, number in places:
        run = tmp_path / f"{kind}-{number}".replace(" ", "-")
        killed = train_in_process(run, kind=kind, number=number)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL, (kind, number)
        train(run, resume=True)
        if left_behind(run) != untouched:
            differing.append((kind, number))
    assert not differing


def test_a_run_killed_again_and_again_at_random_moments_leaves_the_same_bytes(
    tmp_path: Path, untouched: dict[str, bytes]
) -> None:
    run, delay_s, kills = tmp_path / "run", random.Random(3), 0
    run.mkdir()
    (run / "events.jsonl").touch()
    while True:
        process = train_in_process(run, resume=True, pause_s=0.03)
        process.join(timeout=delay_s.uniform(0.1, 0.3 + 0.05 * kills))
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills > 0
    assert left_behind(run) == untouched


def test_a_resumed_run_differs_if_the_generators_are_left_as_they_are(
    tmp_path: Path, untouched: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: without the saved generators the dropout of later steps is another."""
    killed = train_in_process(tmp_path / "run", kind="before an update", number=4)
    killed.join()
    monkeypatch.setattr("ossia.train.state.set_rng_state", lambda saved: None)
    train(tmp_path / "run", resume=True)
    assert left_behind(tmp_path / "run") != untouched
