"""Question: what would memory, communication and time come to on 8 to 4,096 GPUs? Nothing here is measured.

Run: python -m benchmarks.scale      Needs: nothing      Writes: tables in docs/scale.md, plans in docs/scale/*.yaml

Everything is computed by the code behind `ossia plan --gpus` (`ossia.plan.many`, `ossia.model.budget.many`); a test
holds that page and plans are what it says today.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.common import ATTENTION, EXPERTS, ROOT
from ossia import cli
from ossia.config import Recipe
from ossia.model.arch import SHAPES
from ossia.model.budget.many.fleet import Sync, adapter_bytes, merged_bytes, needed_bytes_s, with_ranks
from ossia.model.budget.many.links import ETHERNET, INFINIBAND, NETWORKS, NVLINK_3, NVLINK_4, NVLINK_5, Link
from ossia.model.budget.work import Work
from ossia.plan.machine import named_gpu
from ossia.plan.many.pays import context_parallel_share, expert_parallel_tokens, hiding_tokens, most_ranks
from ossia.plan.many.predict import ManyPlan, Wanted, make_many_plan
from ossia.plan.many.times import StepTime, step_time

PAGE, RECIPES = ROOT / "docs" / "scale.md", sorted((ROOT / "docs" / "scale").glob("*.yaml"))
GPUS, MODELS = (8, 64, 512, 4096), ("20b", "120b")
PACK, DOCUMENT = 16_384, 4096
ADAPTER = {"rank": 16, "targets": ["attention", "experts"]}
GB = 10**9


def recipe(model: str, *, adapter: bool, tokens: int, pack: int = PACK) -> Recipe:
    """A step of so many tokens over all ranks, in packs of documents of at most 4,096."""
    pack = min(pack, tokens)
    given: dict[str, object] = {"model": model, "data": "train.jsonl", "max_length": min(DOCUMENT, pack)}
    if adapter:
        given["adapter"] = ADAPTER
    return Recipe.model_validate(given | {"train": {"tokens_per_step": tokens, "tokens_per_pack": pack}})


def planned(
    model: str, gpus: int, *, adapter: bool, tokens: int, network: Link = INFINIBAND, **more: object
) -> ManyPlan:
    """On H100s, eight in a machine, with `tokens` a GPU."""
    wanted = replace(Wanted(gpus, network), **more)
    made = recipe(model, adapter=adapter, tokens=tokens * gpus, pack=min(tokens, PACK))
    return make_many_plan(made, named_gpu("H100", None), wanted)


def _trained(adapter: bool) -> str:
    return "LoRA" if adapter else "all weights"


def step_rows() -> Iterator[str]:
    """Memory, what travels and time, with one pack a GPU."""
    columns = ("GPUs", "divided over", "GPU", "parts + gathered + step", "gathered", "summed", "a step", "waiting")
    yield f"| model, trained | {' | '.join(columns)} | tokens/s |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        for adapter in (True, False):
            for gpus in GPUS:
                plan = planned(model, gpus, adapter=adapter, tokens=PACK)
                yield _step_row(model, adapter, plan)


OWN = ("weights", "trained, float32", "optimizer", "gradients")
WHOLE = ("gathered layers", "gathered table", "layers' gradients")


def _step_row(model: str, adapter: bool, plan: ManyPlan) -> str:
    d, time, parts = plan.division, plan.time, plan.rank.device
    assert time is not None
    moved = [
        " + ".join(
            f"{sum(way) / GB:.1f}"
            for way in zip(*(s for name, s in plan.received.items() if word in name), strict=True)
        )
        for word in ("gathered", "summed")
    ]
    own, whole = (sum(parts.get(name, 0) for name in names) / GB for names in (OWN, WHOLE))
    memory = f"{plan.rank.device_peak / GB:.1f} GB"
    if d.offload:
        memory += f", and {plan.host_needed / GB:,.0f} GB of the machine"
    cells = (
        f"{d.gpus:,}",
        f"{d.shards}, state {d.trained_shards}",
        memory,
        f"{own:.1f} + {whole:.1f} + {plan.rank.device_peak / GB - own - whole:.1f}",
        *(f"{one} GB" if one else "-" for one in moved),
        f"{time.total:.2f} s",
        f"{max(time.waiting, 0):.1%}",
        f"{plan.tokens / time.total:,.0f}",
    )
    return f"| {model}, {_trained(adapter)} | {' | '.join(cells)} |"


FIXED = 1 << 22


def fixed_rows() -> Iterator[str]:
    """A step of always the same number of tokens over ever more GPUs: where data parallel stops paying."""
    yield "| model, trained | network | " + " | ".join(f"{gpus:,} GPUs" for gpus in GPUS) + " |"
    yield "|---|---|" + "---|" * len(GPUS)
    yield "| tokens a GPU | | " + " | ".join(f"{FIXED // gpus:,}" for gpus in GPUS) + " |"
    for model in MODELS:
        for adapter in (True, False):
            for name, network in NETWORKS.items():
                plans = [planned(model, n, adapter=adapter, tokens=FIXED // n, network=network) for n in GPUS]
                yield f"| {model}, {_trained(adapter)} | {name} | {' | '.join(_fixed_cell(plan) for plan in plans)} |"


def _fixed_cell(plan: ManyPlan) -> str:
    assert plan.time is not None
    mark = " *" if plan.division.offload else ""
    return f"{plan.time.total:.2f} s, {1 - plan.time.waiting:.0%}{mark}"


def pays_rows() -> Iterator[str]:
    """Tokens of a rank in a step from which on communication hides, and the ranks that a step keeps busy."""
    columns = ("sent over", "model, trained", "hides from tokens a GPU", "GPUs that 4M tokens keep busy")
    yield f"| a layer is divided over | {' | '.join(columns)} |"
    yield "|---|---|---|---|---|"
    where = (("the 8 GPUs of a machine", 8, "NVLink", INFINIBAND), ("64 GPUs", 64, "InfiniBand", INFINIBAND))
    for words, gpus, link, network in (*where, ("64 GPUs", 64, "Ethernet", ETHERNET)):
        for model in MODELS:
            for adapter in (True, False):
                plan = planned(model, gpus, adapter=adapter, tokens=PACK, shards=gpus, offload=False, network=network)
                tokens = hiding_tokens(plan.work, plan.division, plan.rates)
                ranks = f"{most_ranks(FIXED, tokens):,}"
                yield f"| {words} | {link} | {model}, {_trained(adapter)} | {tokens:,.0f} | {ranks} |"


EXPERT_TOKENS = (1024, 4096, 16_384, 65_536)


def expert_rows() -> Iterator[str]:
    """Up to where rows to experts are fewer bytes, and what a step takes either way."""
    yield "| 64 GPUs | fewer bytes up to tokens a GPU | " + " | ".join(f"step of {n:,}" for n in EXPERT_TOKENS) + " |"
    yield "|---|---|" + "---|" * len(EXPERT_TOKENS)
    for model in MODELS:
        for adapter in (True, False):
            shards = {"shards": 8 if adapter else 64, "offload": False}
            most = min(64, SHAPES[model].num_experts)
            ways = [planned(model, 64, adapter=adapter, tokens=PACK, experts=n, **shards) for n in (1, 8, most)]
            cells = [" / ".join(f"{_time(plan, tokens).total:.2f}" for plan in ways) + " s" for tokens in EXPERT_TOKENS]
            limit = expert_parallel_tokens(ways[0].work, 8)
            yield f"| {model}, {_trained(adapter)} | {limit:,.0f} | {' | '.join(cells)} |"


def _time(plan: ManyPlan, tokens: int) -> StepTime:
    """The same division with other tokens a GPU, activations computed again."""
    pack = min(tokens, PACK)
    work = replace(plan.work, pack=pack, packs=tokens // pack, longest=min(tokens, DOCUMENT), recompute=True)
    return step_time(work, plan.division, plan.rates)


def context_rows() -> Iterator[str]:
    """What exchanges take of a full layer's forward, eight ranks sharing a sequence."""
    lengths = (4096, 16_384, 65_536, 131_072)
    yield "| exchanged over | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |"
    yield "|---|" + "---|" * len(lengths)
    plan = planned("20b", 8, adapter=True, tokens=PACK)
    ways = {"NVLink": plan.rates.inner.bytes_s(8), "InfiniBand": INFINIBAND.bytes_s(8), "Ethernet": ETHERNET.bytes_s(8)}
    for name, bytes_s in ways.items():
        works = [replace(plan.work, longest=length) for length in lengths]
        shares = [f"{context_parallel_share(work, plan.rates, bytes_s, 8):.0%}" for work in works]
        yield f"| {name}, {bytes_s / GB:g} GB/s a GPU | {' | '.join(shares)} |"


TOKENS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)


def overlap_rows() -> Iterator[str]:
    """The simulated schedule against tokens of a GPU: the share of a step in which it waits."""
    yield "| waiting, of a step, at tokens a GPU | " + " | ".join(f"{tokens:,}" for tokens in TOKENS) + " |"
    yield "|---|" + "---|" * len(TOKENS)
    cases: tuple[tuple[str, str, bool, Link], ...] = (
        ("120b, LoRA, packed base over 64, InfiniBand", "120b", True, INFINIBAND),
        ("120b, LoRA, packed base over 64, Ethernet", "120b", True, ETHERNET),
        ("120b, all weights over 64, InfiniBand", "120b", False, INFINIBAND),
        ("120b, all weights over 64, Ethernet", "120b", False, ETHERNET),
        ("20b, all weights over 64, InfiniBand", "20b", False, INFINIBAND),
    )
    for words, model, adapter, network in cases:
        yield f"| {words} | {' | '.join(_waiting(model, adapter, network, tokens) for tokens in TOKENS)} |"


def _waiting(model: str, adapter: bool, network: Link, tokens: int) -> str:
    plan = planned(model, 64, adapter=adapter, tokens=PACK, shards=64, offload=False, network=network)
    return f"{_time(plan, tokens).waiting:.0%}"


SERVERS, STEP_S, SHARE = 16, 60.0, 0.01


def fleet_rows() -> Iterator[str]:
    """Bytes that a server is sent after a step, and how long they take."""
    together = f"for {SERVERS} servers in {SHARE:.0%} of a {STEP_S:.0f} s step"
    yield f"| model | sent | bytes | 100 Gb/s | 400 Gb/s | {together} |"
    yield "|---|---|---|---|---|---|"
    for model in MODELS:
        base = Work(SHAPES[model], "mxfp4", "resident", "cuda", "triton", "bfloat16", {}, pack=PACK)
        for targets, words in ((ATTENTION, "attention"), (EXPERTS, "experts"), ((*ATTENTION, *EXPERTS), "both")):
            for rank in (8, 16, 32):
                yield _fleet_row(
                    model, f"adapter, {words}, rank {rank}", adapter_bytes(with_ranks(base, targets, rank))
                )
        yield _fleet_row(model, "merged weights, MXFP4", merged_bytes(SHAPES[model], "mxfp4"))
        yield _fleet_row(model, "merged weights, bfloat16", merged_bytes(SHAPES[model], "bf16"))


def _fleet_row(model: str, words: str, num_bytes: int) -> str:
    times = " | ".join(f"{Sync(num_bytes, link.gb_s * GB).seconds:.3g} s" for link in (ETHERNET, INFINIBAND))
    needed = needed_bytes_s(num_bytes, SERVERS, STEP_S, SHARE) * 8 / GB
    return f"| {model} | {words} | {num_bytes / GB:,.2f} GB | {times} | {needed:,.1f} Gb/s |"


def link_rows() -> Iterator[str]:
    """What is divided by."""
    yield "| | one direction | from |"
    yield "|---|---|---|"
    for link in (NVLINK_3, NVLINK_4, NVLINK_5, INFINIBAND, ETHERNET):
        yield f"| {link.name} | {link.gb_s:g} GB/s a {'machine' if link.shared else 'GPU'} | {link.source} |"
    machine = named_gpu("H100", None)
    yield f"| products of an H100 | {machine.flops / 1e12:.0f} TFLOP/s | {machine.source} (docs/plan.md) |"


def recipe_rows() -> Iterator[str]:
    """The planned recipes."""
    yield "| recipe | planned for | needs, of each GPU | measured |"
    yield "|---|---|---|---|"
    for file in RECIPES:
        text = file.read_text(encoding="utf-8")
        head = {word: _head(text, word) for word in ("planned", "measured")}
        (needs,) = re.findall(r"^#   fits +yes: (.+)$", planned_recipe(text), flags=re.MULTILINE)
        where = head["planned"].removeprefix("for ").partition(";")[0]
        measured = re.sub(r"\s*\n#\s*", " ", head["measured"])
        yield f"| [`{file.name}`](scale/{file.name}) | {where} | {needs} | {measured} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "links": link_rows,
    "steps": step_rows,
    "fixed": fixed_rows,
    "pays": pays_rows,
    "experts": expert_rows,
    "context": context_rows,
    "overlap": overlap_rows,
    "fleet": fleet_rows,
    "recipes": recipe_rows,
}


def page(text: str) -> str:
    """The page with its tables as they are today. Raises ValueError for a marker that is missing or unknown."""
    names = re.findall(r"^<!-- (\w+): begin", text, flags=re.MULTILINE)
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"{PAGE}: tables {sorted(names)}; it has to have {sorted(TABLES)}")
    for name, rows in TABLES.items():
        begin, end = f"<!-- {name}: begin, made by python -m benchmarks.scale -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{PAGE}: no `{begin}` with its `{end}`")
        text = "\n".join((f"{before}{begin}", *rows(), f"{end}{after}"))
    return text


PLAN_BEGIN, PLAN_END = "# --- what it prints, an estimate; written by python -m benchmarks.scale", "# ---"


def _head(text: str, word: str) -> str:
    (found,) = re.findall(rf"^# {word} +(.*(?:\n#  +.*)*)$", text, flags=re.MULTILINE)
    return found


def planned_recipe(text: str) -> str:
    """A recipe's text with what the `ossia plan` command in its head prints."""
    command: Sequence[str] = shlex.split(_head(text, "plan"))
    assert command[0] == "ossia"
    file = str(ROOT / command[2])
    done = CliRunner().invoke(cli.app, [command[1], file, *command[3:]])
    assert done.exit_code == 0, done.output
    block = "\n".join((PLAN_BEGIN, *(f"#   {line}" for line in done.stdout.splitlines()), PLAN_END))
    if PLAN_BEGIN in text:
        before, _, rest = text.partition(PLAN_BEGIN)
        return f"{before}{block}{rest.partition(PLAN_END)[2]}"
    head, _, rest = text.partition("\n\n")
    return f"{head}\n{block}\n\n{rest}"


def main(files: Sequence[Path] = RECIPES) -> None:
    """Write the plans, then the page."""
    for file in files:
        file.write_text(planned_recipe(file.read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
