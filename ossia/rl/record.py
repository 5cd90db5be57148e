"""RUN/samples.jsonl of a run from rewards: every rollout with its parts, one JSON object a line.

```text
{"step", "split", "env", "task", "sample", "version", "messages",
 "completions": [{"ids", "text", "messages", "finish"}], "reward", "parts", "advantage", "failure"}
```
`version` is how many steps the policy that sampled it had been trained for. The file is cut back to a checkpoint's
length when a run goes on, as events.jsonl is, so it reads as one uninterrupted run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ossia.harmony.to_openai import messages_to_openai
from ossia.harmony.vocab import Vocabulary
from ossia.rl.batch import Group, Scored
from ossia.rl.env import Split
from ossia.train.state import checkpoint_paths, storage_error


class SampleLog:
    """The file, open for appending."""

    def __init__(self, path: Path, vocab: Vocabulary) -> None:
        self._path, self._vocab = path, vocab

    def write(self, step: int, split: Split, groups: Iterable[Group]) -> None:
        """Append every sample of a step. Raises RunError if the disk refuses it."""
        lines = [json.dumps(self._record(step, split, one)) + "\n" for group in groups for one in group.samples]
        data = "".join(lines).encode()
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError as error:
            safe = checkpoint_paths(self._path.parent)
            raise storage_error(error, saving=str(self._path), need=len(data), safe=safe) from error

    def sync(self) -> int:
        """Have the system put it on the disk; its length in bytes."""
        if not self._path.exists():
            return 0
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def cut(self, length: int) -> None:
        """Go back to that length."""
        if self._path.exists():
            os.truncate(self._path, length)

    def _record(self, step: int, split: Split, one: Scored) -> dict[str, Any]:
        t, ids = one.trajectory, one.trajectory.sampled_ids()
        messages = messages_to_openai(t.messages)
        return {
            "step": step,
            "split": split,
            "env": t.asked.env_id,
            "task": t.asked.task.name,
            "sample": t.sample,
            "version": t.version,
            "messages": t.asked.task.row["messages"],
            "completions": [{"ids": ids, "text": self._vocab.decode(ids), "messages": messages, "finish": t.finish}],
            "reward": one.reward,
            "parts": t.metrics,
            "advantage": one.advantage,
            "failure": t.failure,
        }
