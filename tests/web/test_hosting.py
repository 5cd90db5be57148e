"""Several models in one server: who is called what, whose adapter is whose, and that each answers as itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from openai import NotFoundError

from ossia.errors import UserError
from ossia.web.app import Server
from ossia.web.hosting import Limits, open_hosted, read_wanted
from ossia.web.metrics import Metrics
from tests.conftest import MakeTiny
from tests.e2e.conftest import ARCH
from tests.web.conftest import GREET, Live, Talker, running


def serving(wanted: list[str], adapters: list[str]) -> Server:
    metrics = Metrics()
    limits = Limits(max_batch=4, max_queue=8)
    hosted = open_hosted(read_wanted(wanted, adapters), metrics, limits, dtype="float32", weights="auto", device="cpu")
    return Server(tuple(hosted), metrics)


@pytest.fixture(scope="module")
def two(talker: Talker, tiny: MakeTiny) -> Iterator[Live]:
    """The talker's model, and another random one of the same shape."""
    other = tiny(ARCH, seed=7)
    server = serving([f"one={talker.model}", f"two={other}"], [f"talker={talker.run}", f"two:odd={talker.run}"])
    with running(server) as live:
        yield live


def test_each_model_and_adapter_answers_under_its_name(two: Live, talker: Talker) -> None:
    assert [(model.id, model.parent) for model in two.client.models.list()] == [
        ("one", None),
        ("talker", "one"),
        ("two", None),
        ("odd", "two"),
    ]

    def answer(model: str) -> str:
        return two.client.completions.create(model=model, prompt="x", max_tokens=12, temperature=0).choices[0].text

    assert len({answer(name) for name in ("one", "talker", "two", "odd")}) == 4
    assert answer(str(talker.model)) == answer("one"), "what was given for it is a name too"
    greeting = two.client.chat.completions.create(model="talker", messages=[GREET], temperature=0)
    assert greeting.choices[0].message.content == "Hello!"
    with pytest.raises(NotFoundError, match="allowed: one, talker, two, odd"):
        answer("three")


def test_engines_have_their_own_figures_and_share_the_memory_for_caches(
    two: Live, caplog: pytest.LogCaptureFixture
) -> None:
    two.client.completions.create(model="two", prompt="xyz", max_tokens=5, temperature=0)
    text = httpx2.get(f"{two.url}/metrics").text
    for name in ("one", "two"):
        assert f'ossia_requests_running{{model="{name}"}} 0.0' in text
    loads = [one.worker.load() for one in two.server.models]
    health = httpx2.get(f"{two.url}/health").json()
    assert health["cache_max_bytes"] == sum(load.cache_max_bytes for load in loads)
    engines = [one.worker._engine for one in two.server.models]
    with caplog.at_level("INFO", "ossia.web"):
        alone = serving([f"alone={two.served.aliases[0]}"], []).models[0].worker._engine
    assert re.fullmatch(r"alone: \d.* of weights \(bf16\), a cache of up to \d.*iB", caplog.messages[-1])
    assert [engine.cache_bytes for engine in engines] == [alone.cache_bytes // 2] * 2


def test_a_cache_of_8_bits_is_for_whoever_asks_for_it(two: Live) -> None:
    wanted = read_wanted([f"small={two.served.aliases[0]}"], [])
    limits = Limits(max_batch=4, max_queue=8, int8_cache=True)
    (small,) = open_hosted(wanted, Metrics(), limits, dtype="float32", weights="auto", device="cpu")
    (mine, *_), (usual, *_) = (one.worker._engine.session().cache.lanes for one in (small, two.server.models[0]))
    assert mine.block_bytes < usual.block_bytes / 2


def test_names_come_from_folders_the_hub_or_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    given = [str(tmp_path / "x" / "mine"), "openai/gpt-oss-20b", "tuned=runs/t/model", str(odd)]
    found = [(one.name, one.model) for one in read_wanted(given, [])]
    assert found == [("mine", given[0]), (given[1], given[1]), ("tuned", "runs/t/model"), ("a=b", str(odd))]


@pytest.mark.parametrize(
    ("models", "adapters", "words"),
    [
        (["runs/a/model", "runs/b/model"], [], "model-2=runs/b/model"),
        (["a=x", "a=y"], [], "x has the name a already"),
        (["=x"], [], "expected MODEL, or NAME=MODEL"),
        (["a b=x"], [], "expected MODEL, or NAME=MODEL"),
        (["a=x", "b=y"], ["b=RUN"], "something with the name b already"),
        (["a=x"], ["t=RUN", "t=RUN"], "something with the name t already"),
        (["a=x", "b=y"], ["t=RUN"], "which of the models is it for.*\n.*--adapter a:t=... or --adapter b:t=..."),
        (["a=x"], ["b:=RUN", "x"], "expected NAME=DIR"),
    ],
)
def test_what_is_not_clear_is_asked_back_before_anything_is_read(
    talker: Talker, models: list[str], adapters: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        read_wanted(models, [given.replace("RUN", str(talker.run)) for given in adapters])


def test_an_adapter_goes_to_the_model_that_it_was_trained_on_or_that_is_named(talker: Talker) -> None:
    run, peft, mine = str(talker.run), str(talker.run / "adapter"), str(talker.model)
    wanted = read_wanted(["a=x", mine], [f"r={run}", f"p={peft}", f"a:n={run}"])
    assert [sorted(one.adapters) for one in wanted] == [["n"], ["p", "r"]]
    assert wanted[1].adapters["r"] == talker.run, "a run folder stays one: it is followed"
    (alone,) = read_wanted(["x"], [f"r={run}"])
    assert sorted(alone.adapters) == ["r"], "there is no question with a single model"


def test_a_run_brings_the_model_that_it_trains_once_however_it_is_named(talker: Talker, tmp_path: Path) -> None:
    run, model = talker.run, str(talker.model)
    (one,) = read_wanted([str(run), f"again={run}"], [f"third={run}"])
    assert (one.name, one.model, one.adapters) == (
        talker.model.name,
        model,
        {run.name: run, "again": run, "third": run},
    )
    (named,) = read_wanted([f"base={model}", str(run)], [])
    assert (named.name, list(named.adapters)) == ("base", [run.name])
    with pytest.raises(UserError, match=f"{run}: there is something with the name {run.name} already"):
        read_wanted([f"{run.name}=x", str(run)], [])


def test_a_run_that_trains_all_weights_is_a_model_at_its_end_and_never_an_adapter(tmp_path: Path) -> None:
    run = tmp_path / "whole"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: x\ndata: y\n")
    with pytest.raises(UserError, match=r"only at its end\n.*`ossia export`"):
        read_wanted([str(run)], [])
    with pytest.raises(UserError, match=r"no adapter\n.*ossia serve n="):
        read_wanted(["x"], [f"n={run}"])
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    (one,) = read_wanted([str(run)], [])
    assert (one.name, one.model, one.adapters) == ("whole", str(run / "model"), {})
