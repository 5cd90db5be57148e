"""Tasks -> episodes that the policy went through: sampled ids, their logprobs and experts, and the reward.

```text
task --rendered once for its group--> prompt ids --sampler--> sampled ids --parsed--> Turn --judge--> Step
                                         ^---- its messages rendered after the sampled ids, unless it is over ----|
```
Sampled ids are never decoded and encoded again: the next prompt is the last one, what was sampled, and what the
environment said. Rewards are judged while others are still being sampled. A turn begins when all episodes have ended
the one before, so that what is sampled depends on the weights and seeds alone and not on how long a reward took.
Letters: L layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ossia.engine import Completion, Request, Sampling, harmony_stops
from ossia.harmony.messages import Message
from ossia.harmony.parse import StreamParser
from ossia.harmony.render import Renderer
from ossia.harmony.vocab import Vocabulary
from ossia.rl.env import Caught, Env, Episode, Task, Turn
from ossia.rl.judge import Judge, Opened, Verdict
from ossia.rl.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Asked:
    """A task as it is given to the policy.

    number  which one of the step's
    seed    of the episodes: the same for the whole group
    ids     the rendered prompt
    """

    task: Task
    env: Env
    env_id: str
    number: int
    seed: int
    ids: tuple[int, ...]


@dataclass(slots=True)
class Trajectory:
    """One episode.

    version    of the policy that sampled it: how many steps it had been trained for
    ids        prompt, and all that followed
    sampled    of each id whether the policy sampled it; nothing else is trained
    logprobs   ln p of each sampled id when it was sampled
    routes     (len(ids), L, k) int16: the experts chosen at each position, -1 where not known; None: not recorded
    messages   the turns' messages and the environment's, in their order
    reward     sum over its steps; None: it failed
    metrics    of all its steps, added up
    finish     terminated, truncated (by the environment or by `max_turns`), length, or failed
    failure    why the environment gave no verdict
    reward_s   seconds that judging took
    """

    asked: Asked
    sample: int
    version: int
    ids: list[int]
    sampled: list[bool]
    logprobs: list[float] = field(default_factory=list)
    routes: np.ndarray | None = None
    messages: list[Message] = field(default_factory=list)
    reward: float | None = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    finish: str = ""
    failure: str | None = None
    problems: int = 0
    turns: int = 0
    reward_s: float = 0.0

    @property
    def num_sampled(self) -> int:
        """Ids that the policy sampled."""
        return len(self.logprobs)

    def sampled_ids(self) -> list[int]:
        """The sampled ids alone."""
        return [number for number, mine in zip(self.ids, self.sampled, strict=True) if mine]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an episode may be: tokens a turn, turns, and positions that the model has."""

    max_new: int
    max_turns: int
    max_length: int


class Rollout:
    """Samples episodes with the policy as it is now."""

    def __init__(
        self,
        sampler: Sampler,
        vocab: Vocabulary,
        judge: Judge,
        limits: Limits,
        *,
        routes: bool,
    ) -> None:
        self.sampler, self._vocab, self._judge, self._limits = sampler, vocab, judge, limits
        self._routes = routes
        self._renderer, self._stops = Renderer(vocab), harmony_stops(vocab)

    def sample(
        self,
        asked: Sequence[Asked],
        group: int,
        *,
        version: int,
        seed_of: Callable[[Trajectory], int],
        greedy: bool = False,
    ) -> list[list[Trajectory]]:
        """`group` episodes of each task.

        version   of the policy: how many steps it has been trained for
        seed_of   the seed of an episode's next turn
        greedy    the likeliest token each time
        Returns   (P, G) trajectories, in the tasks' order
        Raises    UserError if the model's output isn't finite; RunError if a server fails
        """
        self.sampler.refresh(version)
        groups = [
            [Trajectory(one, g, version, list(one.ids), [False] * len(one.ids)) for g in range(group)] for one in asked
        ]
        episodes = {
            id(t): Opened(one.env, one.task, one.seed) for one, mine in zip(asked, groups, strict=True) for t in mine
        }
        live = [trajectory for mine in groups for trajectory in mine]
        try:
            while live:
                judged = self._turn(live, episodes, seed_of, greedy)
                live = [t for t, verdict in judged if self._settle(t, self._judge.wait(verdict))]
        finally:
            for trajectory in (t for mine in groups for t in mine):
                _close(episodes[id(trajectory)], trajectory)
        return groups

    def _turn(
        self,
        live: Sequence[Trajectory],
        episodes: Mapping[int, Episode],
        seed_of: Callable[[Trajectory], int],
        greedy: bool,
    ) -> list[tuple[Trajectory, Verdict]]:
        """One generation for each, judged as they end; in the order of `live`."""
        by_number: dict[int, Trajectory] = {}
        for trajectory in live:
            room = min(self._limits.max_new, self._limits.max_length - len(trajectory.ids))
            sampling = Sampling(temperature=0.0) if greedy else Sampling(seed=seed_of(trajectory))
            request = Request(list(trajectory.ids), sampling, room, self._stops, routes=self._routes)
            by_number[self.sampler.add(request)] = trajectory
        verdicts: dict[int, Verdict] = {}
        for number, answer in self.sampler.answers():
            trajectory = by_number[number]
            turn = self._take(trajectory, answer)
            verdicts[id(trajectory)] = self._judge.submit(episodes[id(trajectory)], turn)
        return [(trajectory, verdicts[id(trajectory)]) for trajectory in live]

    def _take(self, trajectory: Trajectory, answer: Completion) -> Turn:
        """Add what was sampled to its trajectory; the turn as the environment sees it."""
        trajectory.ids += answer.ids
        trajectory.sampled += [True] * len(answer.ids)
        trajectory.logprobs += answer.logprobs
        trajectory.turns += 1
        if answer.routes is not None:
            trajectory.routes = _joined(trajectory.routes, answer.routes)
        turn = parse_turn(self._vocab, answer.ids)
        trajectory.problems += len(turn.problems)
        trajectory.messages += turn.messages
        trajectory.finish = "length" if answer.finish == "length" else ""
        return turn

    def _settle(self, trajectory: Trajectory, verdict: Verdict) -> bool:
        """Note what a turn led to; whether the episode goes on."""
        trajectory.reward_s += verdict.seconds
        step = verdict.step
        if step is None:
            return _failed(trajectory, verdict.failure or "no verdict")
        assert trajectory.reward is not None
        trajectory.reward += step.reward
        for name, value in step.metrics.items():
            trajectory.metrics[name] = trajectory.metrics.get(name, 0.0) + value
        over = step.terminated or step.truncated or trajectory.finish == "length"
        if not over:
            more: list[int] = []
            with (caught := Caught()):
                more = self._renderer.continuation(step.messages)
            if caught.why is not None:
                return _failed(trajectory, f"its messages can't be rendered: {caught.why}")
            over = (
                trajectory.turns == self._limits.max_turns
                or len(trajectory.ids) + len(more) >= self._limits.max_length
            )  # fmt: skip
            if not over:
                trajectory.ids += more
                trajectory.sampled += [False] * len(more)
                trajectory.messages += step.messages
                return True
            trajectory.finish = "truncated"
        if not trajectory.finish:
            trajectory.finish = "truncated" if step.truncated else "terminated"
        return False


def _close(episode: Episode, trajectory: Trajectory) -> None:
    """Let go of an episode; what it raises then costs the sample as well."""
    caught = Caught()
    with caught:
        episode.close()
    if caught.why is not None and trajectory.failure is None:
        _failed(trajectory, f"closing: {caught.why}")


def _failed(trajectory: Trajectory, why: str) -> bool:
    """The environment gave no verdict: this sample counts for nothing, and its episode doesn't go on."""
    trajectory.reward, trajectory.finish, trajectory.failure = None, "failed", why
    return False


def parse_turn(vocab: Vocabulary, ids: Sequence[int]) -> Turn:
    """Sampled ids that follow `<|start|>assistant` as the environment sees them."""
    parser = StreamParser(vocab)
    for number in ids:
        parser.push(number)
    parser.finish()
    problems = tuple(f"{p.what}: {p.text!r}" for p in parser.problems)
    return Turn(tuple(parser.messages), parser.stop, problems, tuple(ids))


def _joined(before: np.ndarray | None, now: np.ndarray) -> np.ndarray:
    """Routes of all positions. What was known before this turn stays, since a prompt's last layer records none.

    before  (positions up to the end of the last turn, L, k); now (all positions but the last, L, k)
    """
    last = np.full((1, *now.shape[1:]), -1, np.int16)
    routes = np.concatenate((now, last))
    if before is not None:
        known = (before >= 0).all(axis=-1, keepdims=True)
        routes[: len(before)] = np.where(known, before, routes[: len(before)])
    return routes
