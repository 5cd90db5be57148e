"""The one record of training data: token ids, and how much predicting each of them counts.

Every format of row ends here, and packing, the step and the preview know nothing else. No torch.
Letters: N tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ossia.harmony.render import Rendered, Span


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Tokens of one document with a weight each, aligned with `ids` (packing shifts them, nobody else does).

    ids      (N,) int32
    weights  (N,) float32, >= 0: how much predicting position i from ids[:i] counts; 0 is not trained; [0] is always 0
    targets  (N,) int32, or None where every target is the id itself: what position i has to be predicted as
    source   "file:line" of the row it came from
    spans    who wrote which positions, as the renderer gave them
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    targets: NDArray[np.int32] | None
    source: str
    spans: tuple[Span, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """Positions whose prediction counts."""
        return int(np.count_nonzero(self.weights))

    @classmethod
    def from_rendered(cls, rendered: Rendered, source: str) -> Sample:
        """The renderer's lists as arrays."""
        targets = None if rendered.targets is None else np.array(rendered.targets, np.int32)
        weights = np.array(rendered.weights, np.float32)
        assert not len(weights) or weights[0] == 0, "the first token has nothing before it to be predicted from"
        return cls(np.array(rendered.ids, np.int32), weights, targets, source, tuple(rendered.spans))

    def truncated(self, max_length: int) -> Sample:
        """The first `max_length` tokens; spans are cut with them."""
        spans = tuple(
            Span(span.start, min(span.end, max_length), span.role, span.channel)
            for span in self.spans
            if span.start < max_length
        )
        targets = None if self.targets is None else self.targets[:max_length]
        return Sample(self.ids[:max_length], self.weights[:max_length], targets, self.source, spans)

    def roles_and_channels(self) -> tuple[list[str | None], list[str | None]]:
        """Role and channel of every position; None where no span says."""
        roles: list[str | None] = [None] * len(self)
        channels: list[str | None] = [None] * len(self)
        for span in self.spans:
            size = span.end - span.start
            roles[span.start : span.end] = [span.role] * size
            channels[span.start : span.end] = [span.channel] * size
        return roles, channels

    def to_json(self) -> dict[str, object]:
        """The stable machine-readable form of `ossia data --json`; "targets" only where one differs from its id."""
        roles, channels = self.roles_and_channels()
        record: dict[str, object] = {
            "source": self.source,
            "ids": self.ids.tolist(),
            "weights": self.weights.tolist(),
            "roles": roles,
            "channels": channels,
        }
        if self.targets is not None and not np.array_equal(self.targets, self.ids):
            record["targets"] = self.targets.tolist()
        return record
