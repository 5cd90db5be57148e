"""Question: what do all results say, in one table?

Run: python -m benchmarks.table      Needs: nothing      Writes: docs/benchmarks.md, tables in export.md and README.md

Every figure in the documents comes from benchmarks/results/*.json through here; a test holds that they are current.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.clients import table as exports
from benchmarks.common import RESULTS, ROOT

PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin, made by python -m benchmarks.table -->", "<!-- benchmarks: end -->"
WORDS = {
    "b1-512": "B1, 512 tokens, all trained",
    "b1-2048": "B1, 2,048 tokens, all trained",
    "b1-2048-chats": "B1, chats packed to 2,048 tokens",
    "b1-8192": "B1, 8,192 tokens, all trained",
    "b1-512-experts": "B1, 512 tokens, all trained, and r8 on the experts",
    "b1-2048-experts": "B1, 2,048 tokens, all trained, and r8 on the experts",
    "b2-512": "B2, 512 tokens, all trained",
    "b2-2048": "B2, 2,048 tokens, all trained",
    "b2-512-experts": "B2, 512 tokens, all trained, and r8 on the experts",
    "b2-2048-experts": "B2, 2,048 tokens, all trained, and r8 on the experts",
}


def load(name: str) -> dict[str, Any] | None:
    """A result, or None where it has not been measured."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def sft_rows(cases: Iterable[str] = WORDS) -> Iterator[str]:
    """The lines of the side-by-side table."""
    yield "| LoRA r16 on attention, bf16 | two cores of | Ossia | transformers + peft | faster | memory |"
    yield "|---|---|---|---|---|---|"
    for case in cases:
        words = WORDS[case]
        if (found := load(f"sft_cpu-{case}")) is None:
            continue
        share = found["config"]["trained"] / found["config"]["tokens"]
        trained = f", {share:.0%} trained" if share < 0.99 else ""
        rates = (f"{found['trained_tokens_per_s'][side]:.0f} tok/s" for side in ("ossia", "peer"))
        peaks = (found["peak_bytes"][side] / 1e9 for side in ("ossia", "peer"))
        mine, theirs = (f"{rate}, {peak:.1f} GB" for rate, peak in zip(rates, peaks, strict=True))
        machine = " ".join(found["device"].replace("(R)", "").removesuffix(" Processor").split())
        ratios = f"{found['speedup']:.1f}x | {found['memory_ratio']:.2f}x"
        yield f"| {words}{trained} | {machine} | {mine} | {theirs} | {ratios} |"


def grpo_lines() -> Iterator[str]:
    """A step of GRPO beside TRL's."""
    if (found := load("grpo_step-sort")) is None:
        return
    config, step, peak = found["config"], found["median_step_s"], found["peak_bytes"]
    yield "## A step of GRPO beside TRL's (`benchmarks/grpo_step.py`)"
    yield ""
    yield (
        f"{config['prompts']} prompts, {config['group']} answers each of at most {config['new']} tokens, sampled and "
        f"judged, and one update of all weights in float32; the demo's model, {config['threads']} threads."
    )
    yield ""
    yield "| | Ossia | TRL | faster | memory |"
    yield "|---|---|---|---|---|"
    mine, theirs = (f"{step[side]:.2f} s, {peak[side] / 1e9:.2f} GB" for side in ("ossia", "peer"))
    yield f"| a step | {mine} | {theirs} | {found['speedup']:.1f}x | {found['memory_ratio']:.2f}x |"
    yield ""


DECODE_WORDS = {
    "demo-1": "demo shape, float32, 1 request",
    "demo-16": "demo shape, float32, 16 requests",
    "demo-64": "demo shape, float32, 64 requests",
    "b1-1": "B1, bf16, 1 request",
    "b1-16": "B1, bf16, 16 requests",
    "rollout": "demo shape, 64 answers of mixed lengths, as TRL generates",
}


def decode_rows() -> Iterator[str]:
    """The lines of the generation table, prefill included."""
    yield "| greedy, CPU | Ossia | transformers `generate` | faster |"
    yield "|---|---|---|---|"
    for case, words in DECODE_WORDS.items():
        if (found := load(f"decode_cpu-{case}")) is not None:
            mine, theirs = (f"{found['tokens_per_s'][side]:,.0f} tok/s" for side in ("ossia", "peer"))
            yield f"| {words} | {mine} | {theirs} | {found['speedup']:.1f}x |"


LLAMACPP_WORDS = {
    "demo-f32": "demo shape, float32",
    "demo-bf16": "demo shape, bf16",
    "b1-bf16": "B1, bf16",
}


def llamacpp_rows() -> Iterator[str]:
    """The lines of the table beside llama.cpp: decode steps alone, one request."""
    yield "| greedy, 1 request, decode steps alone, CPU | Ossia | llama.cpp | faster |"
    yield "|---|---|---|---|"
    for case, words in LLAMACPP_WORDS.items():
        if (found := load(f"decode_llamacpp-{case}")) is not None:
            mine, theirs = (f"{found['tokens_per_s'][side]:,.0f} tok/s" for side in ("ossia", "llamacpp"))
            yield f"| {words} | {mine} | {theirs} | {found['speedup']:.2f}x |"


def serving_lines() -> Iterator[str]:
    """What the load test of the server found."""
    if (found := load("serve_load")) is None:
        return
    config, first = found["config"], found["first_token_ms"]
    outcomes = ", ".join(f"{count:,} {what}" for what, count in sorted(found["outcomes"].items()))
    lost, left = len(found["wrong"]), sum(found["left"].values())
    yield "## The server under load (`benchmarks/serve_load.py`)"
    yield ""
    yield (
        f"{config['requests']:,} requests, {config['at_once']} at a time, some clients leaving under way: {outcomes}; "
        f"{lost} lost or wrong, {left} left in the engine."
    )
    yield ""
    yield "| seconds a client waits | p50 | p90 | p99 | longest |"
    yield "|---|---|---|---|---|"
    for key, words in (("first_s", "to the first text of a stream"), ("whole_s", "to the end of an answer")):
        cells = " | ".join(f"{found[key][name]:.3f}" for name in ("p50", "p90", "p99", "max"))
        yield f"| {words} | {cells} |"
    yield ""
    yield (
        f"With nobody else there the first token of 256 takes {first['engine']:.0f} ms in the engine and "
        f"{first['server']:.0f} ms through the server, which adds {first['server_adds']:.0f} ms."
    )
    yield ""


GPU_WORDS = {
    "train-4k-keep": "4 documents of 4,096 in a pack, activations kept",
    "train-4k": "the same, activations computed again",
    "train-4k-experts": "the same, and adapters of rank 8 on the experts",
    "train-2k-stream": "2,048 tokens, experts streamed from the machine's memory",
    "train-2k": "2,048 tokens, experts resident",
    "train-2k-whole": "the same, a layer's experts expanded together",
    "train-2k-host": "2,048 tokens, experts resident, the embedding in the machine's memory",
    "train-2k-stream-host": "2,048 tokens, experts streamed, embedding and head in the machine's memory",
    "train-16k-stream": "16,384 tokens, experts streamed",
    "train-16k-stream-host": "16,384 tokens, experts streamed, 4,096 at a time, embedding and head away",
    "train-64k": "1 document of 65,536",
    "train-64k-chunks": "1 document of 65,536, experts by 16,384 tokens",
    "train-64k-offload": "1 document of 65,536, the same, and layers' inputs in the machine's memory",
    "train-300k": "1 document of 307,200, the same",
    "train-4k-triton": "4 documents of 4,096 in a pack, attention in Triton",
    "train-4k-fa3": "the same with FlashAttention 3",
    "train-4k-float16": "4 documents of 4,096 in a pack, in float16",
    "train-120b": "gpt-oss-120b's shape, 4,096 tokens, resident",
    "train-120b-host": "gpt-oss-120b's shape, 2,048 tokens, resident, the embedding in the machine's memory",
    "train-120b-stream": "gpt-oss-120b's shape, 8,192 tokens, experts streamed",
    "train-4k-packs-keep": "4 packs of 4,096, activations kept",
    "train-4k-packs": "4 packs of 4,096, activations computed again",
    "train-4k-transformers": "the same with transformers + peft, gradient checkpointing, bf16 weights",
    "decode-1": "1 request",
    "decode-1-adapter": "1 request, adapters on attention and experts",
    "decode-64": "64 requests",
    "decode-256": "256 requests",
}


def gpu_lines() -> Iterator[str]:
    """What was measured on a GPU."""
    names = ("train", "stream", "peer", "120b", "decode")
    results = [found for name in names if (found := load(f"gpu-{name}")) is not None]
    if not results:
        return
    where = results[0]["where"]
    yield f"## On a GPU (`benchmarks/gpu.py`): {where['gpu']}, torch {where['versions']['torch']}"
    yield ""
    yield "gpt-oss-20b's shape with random weights in MXFP4, LoRA of rank 16 on attention, every token trained;"
    yield "decoding steps alone, with 4,096 tokens of context a request."
    yield ""
    yield "| case | tok/s | peak GPU memory |"
    yield "|---|---|---|"
    for found in results:
        for name, case in found["cases"].items():
            rate, peak = case["tokens_per_second"], case["peak_reserved_bytes"] / 1e9
            kind = "train" if name.startswith("train") else "decode"
            yield f"| {kind}: {GPU_WORDS[name]} | {rate:,.0f} | {peak:.1f} GB |"
    yield ""
    if (peer := load("gpu-peer")) is not None:
        losses = ", ".join(f"{case['losses'][0]:.3f}" for case in peer["cases"].values())
        yield f"The sides had the same weights and ids; the losses of their first steps: {losses}."
        yield ""
    if (found := load("gpu-grpo")) is not None:
        case = found["cases"]["grpo"]
        config, last = case["config"], case["steps"][-1]
        samples = config["prompts"] * config["group"]
        yield (
            f"A step of GRPO, {samples} samples of {config['new']:,} tokens: {last['sample_s']:.1f} s to sample "
            f"({last['sampled_per_s']:,.0f} tok/s), {last['train_s']:.1f} s to train on {last['tokens']:,} tokens, "
            f"{last['peak_reserved_bytes'] / 1e9:.1f} GB (commit {found['where']['commit'][:7]})."
        )
        yield ""


EXPORT_WORDS = {
    "hf-bf16-all": "`hf-bf16`, adapters on attention and experts",
    "gguf-all": "`gguf`, adapters on attention and experts",
    "gguf-attention": "`gguf`, adapters on attention, experts as they are",
}


def export_lines() -> Iterator[str]:
    """Exports of the 20b shape, verified."""
    results = {}
    for name, words in EXPORT_WORDS.items():
        if (found := load(f"export_20b-{name}")) is not None:
            results[words] = found
    if not results:
        return
    yield "## Exports of gpt-oss-20b's shape (`benchmarks/export_20b.py`)"
    yield ""
    yield "| random weights in MXFP4 | written | to write | to verify | CPU time | its own memory | with mapped pages |"
    yield "|---|---|---|---|---|---|---|"
    for words, found in results.items():
        seconds, cpu = found["seconds"], sum(found["cpu_seconds"].values())
        own = max(found["peak_anonymous_bytes"].values()) / 1e9
        yield (
            f"| {words} | {found['written_bytes'] / 1e9:.1f} GB | {seconds['writing']:.0f} s "
            f"| {seconds['verifying']:.0f} s | {cpu:.0f} s | {own:.2f} GB "
            f"| {found['peak_resident_bytes_of_all'] / 1e9:.2f} GB |"
        )
    layer = next(iter(results.values()))["config"]["bf16_layer_bytes"] / 1e9
    yield ""
    yield f"Peaks, verification included; a layer is {layer:.2f} GB in bfloat16. Times are of 2 cores."
    yield ""
    if (found := load("export_20b-hf-bf16-all-killed")) is not None:
        tries, whole = found["tries"], found["undisturbed"]["written_bytes"]
        noted = " and ".join(f"{one['noted_bytes'] / whole:.0%}" for one in tries if one["killed"])
        peak = max(one["peak_resident_bytes_of_all"] for one in tries) / 1e9
        yield (
            f"Killed (`kill -9`) when {noted} of its bytes were noted as whole, and begun again each time, `hf-bf16` "
            f"ends in {'the same' if found['same'] else 'OTHER'} bytes as undisturbed, {found['files']} files by their "
            f"sha256; at most {peak:.2f} GB with mapped pages (`--killed`, commit {found['where']['commit'][:7]})."
        )
        yield ""


def plan_lines() -> Iterator[str]:
    """How near the plan is to what was measured."""
    if (found := load("plan")) is None:
        return
    yield "## What `ossia plan` says, and what it takes (`benchmarks/plan.py`)"
    yield ""
    yield "| | planned | measured | planned / measured |"
    yield "|---|---|---|---|"
    for place, cases in (("CPU", found["cpu"]), ("GPU", found["gpu"])):
        for name, case in cases.items():
            sizes = (f"{case[key] / 1e9:.3f} GB" for key in ("planned_bytes", "measured_bytes"))
            yield f"| {place}: {name} | {' | '.join(sizes)} | {case['ratio']:.3f} |"
    yield ""
    yield "On a CPU the process's largest resident set, files' pages included; of a GPU what torch reserved at most."
    yield ""


def step_20b_lines() -> Iterator[str]:
    """The full 20b shape on a CPU."""
    if (found := load("step_20b")) is None:
        return
    config = found["config"]
    yield f"## A step of the 20b shape on a CPU (`benchmarks/step_20b.py`): {found['device']}"
    yield ""
    yield (
        f"QLoRA, rank 16 on attention and 8 on the experts, {config['tokens']:,} tokens, {config['threads']} "
        f"thread{'s' if config['threads'] > 1 else ''}; random weights."
    )
    yield ""
    yield "| weights | largest resident set | of it anonymous | planned | a step, processor's time | wall |"
    yield "|---|---|---|---|---|---|"
    sides = [side for side in ("resident", "mmap") if side in found]
    for side in sides:
        case = found[side]
        keys = ("peak_resident_bytes", "peak_anonymous_bytes", "planned_anonymous_bytes")
        sizes = " | ".join(f"{case[key] / 2**30:.2f} GiB" for key in keys)
        yield f"| {side} | {sizes} | {case['step_cpu_s']:.0f} s | {case['step_s']:.0f} s |"
    yield ""
    for side in sides:
        shares = ", ".join(f"{part} {share:.0%}" for part, share in found[side]["share"].items() if share >= 0.005)
        yield f"Of a step with `{side}`: {shares}."
        yield ""
    if (peer := found.get("peer")) is not None:
        limit, words = peer["limit_bytes"] / 2**30, peer["last_words"][-1]
        yield (
            f"transformers + peft, held to {limit:.0f} GiB of memory, end after {peer['seconds']:.0f} s with exit code "
            f"{peer['exit_code']}: `{words}`"
        )
        yield ""


def jail_lines() -> Iterator[str]:
    """What the benchmark of the jail found."""
    if (found := load("jail")) is None:
        return
    rates, ms, flood = found["jails_per_s"], found["median_ms"], found["flood"]
    yield "## The jail (`benchmarks/jail.py`)"
    yield ""
    yield (
        f"Fresh jails for short programs on {found['cores']} cores: {rates['2']:.0f} a second from two threads, "
        f"{rates['1']:.0f} from one; {ms['jail']:.1f} ms for one alone, and {ms['call'] * 1e3:.0f} µs for a call into "
        "one that is there."
    )
    yield ""
    hanging = f"{flood['hanging']} of {flood['programs']} programs hang"
    yield f"| a step in which {hanging} | takes longer by | their limits |"
    yield "|---|---|---|"
    for kind, share_s in flood["share_s"].items():
        yield f"| {kind} | {flood['cost'][kind] * share_s:.2f} s | {share_s:.0f} s |"
    yield ""


def qat_lines() -> Iterator[str]:
    """What rounding experts to MXFP4 cost, and what training under it won back."""
    if (found := load("qat_mxfp4")) is None:
        return
    yield "## Experts in MXFP4, and `qat: mxfp4` (`benchmarks/qat_mxfp4.py`)"
    yield ""
    steps = "; ".join(
        f"{kind} {one['config']['steps']} steps, then {one['config']['further']} more at a tenth of the rate"
        for kind, one in found["found"].items()
    )
    yield (
        f"The demo's task: {steps}. Held-out losses are of exported folders, beside the bf16 export of as many steps; "
        "KL from what was trained, in float32."
    )
    yield ""
    yield "| trained | export | held-out loss | beside bf16 | KL |"
    yield "|---|---|---|---|---|"
    beside = {"trained": "trained, bf16", "trained further": "trained further, bf16", "qat": "trained further, bf16"}
    for kind, measured in found["found"].items():
        exports = measured["exports"]
        for name, one in exports.items():
            run, _, layout = name.partition(", ")
            apart = one["held_out_loss"] / exports[beside[run]]["held_out_loss"] - 1
            shown = "" if layout == "bf16" else f"{apart:+.2%}"
            words = {"trained further": "further", "qat": "further with `qat`"}.get(run, run)
            yield f"| {kind}, {words} | hf-{layout} | {one['held_out_loss']:.4f} | {shown} | {one['kl']:.1e} |"
    yield ""


def round_lines() -> Iterator[str]:
    """How long merging and rounding takes."""
    if (found := load("round_mxfp4")) is None:
        return
    config = found["config"]
    yield "## Rounding to MXFP4 (`benchmarks/round_mxfp4.py`)"
    yield ""
    weights = f"{config['weights'] / 1e6:,.0f} million weights"
    yield f"A layer of gpt-oss-20b: {weights}, an adapter of rank {config['rank']}, {config['threads']} threads."
    yield ""
    yield "| | wall | CPU time |"
    yield "|---|---|---|"
    for name, times in found["seconds"].items():
        yield f"| {name} | {times['wall_s']:.1f} s | {times['cpu_s']:.1f} s |"
    yield ""


def cut_lines() -> Iterator[str]:
    """What ranks with parts of the weights take."""
    if (found := load("cut")) is None:
        return
    model = found["model_bytes"] / 1e9
    yield "## Several ranks of one machine (`benchmarks/cut.py`)"
    yield ""
    yield (
        f"LoRA on attention of a model of {model:.2f} GB in MXFP4, four packs a step, gloo over loopback, two cores of "
        f"{found['device']}; a thread a rank."
    )
    yield ""
    yield "| ranks | weights | a step | the fullest rank |"
    yield "|---|---|---|---|"
    for run in found["runs"]:
        held = "whole" if run["shard"] == "none" else "cut"
        held += "" if run["gathers_ahead"] else ", gathers waited for where they begin"
        peak = max(run["rank_peak_bytes"]) / 1e9
        yield f"| {run['ranks']} | {held} | {run['step_s']:.1f} s | {peak:.2f} GB |"
    yield ""
    yield "| milliseconds | 2 ranks | 4 ranks |"
    yield "|---|---|---|"
    two, four = (found["collectives_s"][size] for size in ("2", "4"))
    for name, seconds in two.items():
        words = "an exchange of words" if name == "words" else name
        yield f"| {words} | {seconds * 1e3:.1f} | {four[name] * 1e3:.1f} |"
    yield ""


def page() -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m benchmarks.table` from `benchmarks/results/`, where versions, device, commit, config",
        "and all repeats are. Ratios are what counts: absolute times are of one small machine without a GPU.",
        "GPU figures are of one machine with one GPU, and absolute.",
        "",
        "## Training, side by side in one run (`benchmarks/sft_cpu.py`)",
        "",
        *sft_rows(),
        "",
        "tok/s are trained tokens; memory is each process's own peak resident set. Both sides' first losses agree.",
        "",
    ]
    lines += [*grpo_lines(), *gpu_lines(), *plan_lines(), *step_20b_lines(), *cut_lines()]
    lines += ["## Generation, side by side in one run (`benchmarks/decode_cpu.py`)", "", *decode_rows(), ""]
    lines += ["## Generation beside llama.cpp (`benchmarks/decode_llamacpp.py`)", "", *llamacpp_rows(), ""]
    lines += [*serving_lines(), *export_lines(), *qat_lines(), *round_lines(), *jail_lines()]
    if demo := load("demo"):
        lines += [
            "## The demo (`benchmarks/demo.py`)",
            "",
            "| seed | held-out loss | exact match | CPU time | wall | peak memory |",
            "|---|---|---|---|---|---|",
        ]
        for run in demo["runs"]:
            losses, match = [*run["held_out_loss"].values()], run["exact_match"]
            lines.append(
                f"| {run['seed']} | {losses[0]:.2f} → {losses[-1]:.3f} "
                f"| {match['before']:.2f} → {match['after']:.2f} of {run['questions']} "
                f"| {run['cpu_s']:.0f} s | {run['wall_s']:.0f} s | {run['peak_bytes'] / 1e9:.2f} GB |"
            )
        threads = demo["config"]["threads"]
        lines += ["", f"Threads: {threads}. Wall times are of a machine that did other work as well; CPU times count."]
        lines.append("")
    if startup := load("startup"):
        lines += [
            "## Starting (`benchmarks/startup.py`)",
            "",
            "| | median of " + str(startup["config"]["repeats"]) + " |",
            "|---|---|",
        ]
        lines += [f"| `{name}` | {seconds:.3f} s |" for name, seconds in startup["median_s"].items()]
        lines.append("")
    if render := load("render_speed"):
        rates = render["conversations_per_s"]
        lines += ["## Rendering with weights (`benchmarks/render_speed.py`), one core", ""]
        lines += ["| conversations a second | CPU time | wall |", "|---|---|---|"]
        lines += [f"| {name} | {rate['cpu']:,.0f} | {rate['wall']:,.0f} |" for name, rate in rates.items()]
        lines.append("")
    return "\n".join(lines)


def readme(text: str) -> str:
    """The README with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    cases = [case for case in WORDS if "-512" not in case]
    return "\n".join([before + BEGIN, *sft_rows(cases), END + after])


def main() -> None:
    """Write all three."""
    PAGE.write_text(page(), encoding="utf-8")
    exports.PAGE.write_text(exports.page(exports.PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
