"""Bytes of one layer over one pack: what autograd keeps of it, and what stands beside that at its fullest moments.

Followed are `transformer.layer_forward` and what it calls, name by name; a name lives until its function returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from ossia.model.arch import Arch
from ossia.model.budget.work import Work
from ossia.sizes import DENSE_BLOCK, RANK_BYTES

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_INDEX = 8  # bytes of an int64


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers a token of the layer's tensors, from the shape."""

    hidden: int
    queries: int
    keys: int
    width: int
    top_k: int
    heads: int

    @classmethod
    def of(cls, arch: Arch) -> Sizes:
        """Of a shape."""
        return cls(
            arch.hidden_size,
            arch.num_heads * arch.head_dim,
            arch.num_kv_heads * arch.head_dim,
            arch.intermediate_size,
            arch.experts_per_token,
            arch.num_heads,
        )


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Of a layer with `window` (None: a full one) under a piece of work, for `tokens` tokens in.

    rows  tokens that leave it: of the last layer only those that count
    """

    work: Work
    window: int | None
    tokens: int
    rows: int

    @property
    def _n(self) -> Sizes:
        return Sizes.of(self.work.arch)

    @property
    def block(self) -> int | None:
        """Queries of a block, where attention goes block by block."""
        if self.work.attention != "cpu":
            return None
        return self.window or (DENSE_BLOCK if self.work.longest <= DENSE_BLOCK else None)

    def _rank(self, target: str) -> int:
        ranks = self.work.ranks
        return 0 if ranks is None else ranks.get(target, 0)

    def _expert_rank(self, target: str) -> int:
        """Its rank as the grouped product takes it."""
        unit = RANK_BYTES // self.work.size
        return -(-self._rank(target) // unit) * unit

    @property
    def _chunk(self) -> int:
        """Tokens that go through the experts together."""
        return self.rows if self.work.chunk is None else min(self.rows, self.work.chunk)

    # --- what autograd keeps, beside the layer's input

    @property
    def kept(self) -> int:
        """Bytes of the layer's graph over the pack; experts that take it in chunks leave nothing in it."""
        return self.kept_attention + (self._kept_experts(self.rows) if self._chunk == self.rows else 0)

    @property
    def kept_attention(self) -> int:
        """Of norm, projections and attention, as far as the second norm."""
        w, n, size = self.work, self._n, self.work.size
        numbers = sum(self._rank(target) for target in ("q_proj", "k_proj", "v_proj"))
        if w.adapts("q_proj", "k_proj", "v_proj") and not w.dropout:
            numbers += n.hidden  # normed, the input of what is trained
        found = self.tokens * (numbers * size + 4)  # and 1 / root mean square
        found += self._kept_sink_attention()
        copied = (self._copies_out or self.rows < self.tokens) and not w.dropout
        o_input = n.queries if w.adapts("o_proj") and copied else 0
        # and x between attention and experts
        found += self.rows * ((o_input + self._rank("o_proj")) * size + n.hidden * w.residual_size)
        return found + self._dropped(ATTENTION, (n.hidden, n.hidden, n.hidden, n.queries), self.tokens)

    @property
    def _copies_out(self) -> bool:
        """Whether documents' outputs are put together into a tensor of their own."""
        return self.work.attention == "cpu" and self.block is None

    def _kept_sink_attention(self) -> int:
        n, size, tokens = self._n, self.work.size, self.tokens
        if self.work.attention == "reference":  # keys and values for every head, scores, and the softmax with the sink
            return 4 * tokens * (n.queries * 4 + n.heads * 2 * (tokens + 1))
        if self.block is None:
            return tokens * ((2 * n.queries + 2 * n.keys) * size + 4 * n.heads)
        padded = -(-tokens // self.block) * self.block
        return padded * ((2 * n.queries + 4 * n.keys + 2 * self.block) * size + 4 * n.heads)

    def _kept_experts(self, rows: int) -> int:
        """Of the second norm, router and experts, over so many tokens."""
        w, n, size = self.work, self._n, self.work.size
        numbers = self._rank("router") + n.top_k  # the shares of the chosen
        if w.adapts("router") and not w.dropout:
            numbers += n.hidden
        each = 2 * n.width + n.hidden  # gate and up; the output
        if w.adapts("down_proj") and not w.dropout:
            each += n.width
        if w.adapts("gate_up_proj") and not w.dropout:
            each += n.hidden
        each += self._expert_rank("gate_up_proj") + self._expert_rank("down_proj")
        if w.kernels == "triton":  # what the adapter adds stands apart
            each += 2 * n.width * bool(self._rank("gate_up_proj")) + n.hidden * bool(self._rank("down_proj"))
        found = rows * ((numbers + n.top_k * each) * size + 4 + 3 * _INDEX * n.top_k)
        found += self._dropped(("router",), (n.hidden,), rows)
        return found + self._dropped(("gate_up_proj", "down_proj"), (n.hidden, n.width), rows * n.top_k)

    def _dropped(self, targets: tuple[str, ...], inputs: tuple[int, ...], rows: int) -> int:
        """With dropout each adapter has an input and a mask of its own."""
        if not self.work.dropout:
            return 0
        return sum(rows * n * (self.work.size + 1) for t, n in zip(targets, inputs, strict=True) if self._rank(t))

    # --- what is there beside the input and what is kept, while it is computed and differentiated

    @property
    def forward(self) -> int:
        """Most bytes of a forward without a graph, its result included."""
        return max(self._named(graph=False) + self._experts_forward(graph=False), self._including_sinks(graph=False))

    @property
    def forward_with_graph(self) -> int:
        """Most bytes of a forward with one, what is kept and the result included."""
        whole = self._chunk == self.rows
        after = self.kept + self._named(graph=True) + self._experts_forward(graph=whole)
        return max(after, self._including_sinks(graph=True))

    def _named(self, *, graph: bool) -> int:
        """What the layer's function still names when the experts are done, beside what is kept."""
        w, n = self.work, self._n
        holds = graph and self.block is None and w.attention != "reference"
        numbers = 0 if holds else self.tokens * (n.queries + 2 * n.keys)
        if graph:
            return numbers * w.size
        numbers += self.tokens * n.queries * (1 + (self.rows < self.tokens))  # attended
        return numbers * w.size + self.rows * n.hidden * w.residual_size  # between attention and experts

    def _experts_forward(self, *, graph: bool) -> int:
        """At the end of the experts' forward, of a chunk of the tokens; the result of all tokens included."""
        w, n, size, rows = self.work, self._n, self.work.size, self._chunk
        holds = graph and not w.dropout
        per_row = 0 if holds and w.adapts("router") else n.hidden  # normed
        each = 0 if holds and w.adapts("gate_up_proj") else n.hidden  # gathered
        each += 0 if holds and w.adapts("down_proj") else n.width  # hidden
        if not graph:
            each += 2 * n.width + n.hidden
        extra = n.top_k * n.hidden if self._rank("down_proj") else 0
        if graph and w.kernels == "triton":
            extra = 0
        result = n.hidden * w.residual_size
        found = rows * ((per_row + n.top_k * each) * size + max(result, extra * size))
        found += rows * n.top_k * _INDEX * (3 if graph else 6)
        return found if rows == self.rows else found + self.rows * result

    def _including_sinks(self, *, graph: bool) -> int:
        """While the sink is taken into attention's output: in float32 where no kernel does it in place."""
        w, n, size = self.work, self._n, self.work.size
        if w.kernels == "triton" or w.attention != "cpu":
            return 0
        kept = self._kept_sink_attention() if self.block or graph else self.tokens * (n.queries + 2 * n.keys) * size
        named = (n.queries + 2 * n.keys) * size if self.block else 0
        return kept + self.tokens * (n.hidden * size + named + n.queries * 8)

    @property
    def backward(self) -> int:
        """Most bytes of a backward, with what is left of the graph then, the result and both gradients.

        Experts that take the pack in chunks have one chunk's graph at a time, and the gradient in all of their input.
        """
        x = self._n.hidden * self.work.residual_size
        found = self.kept_attention + self._experts_backward(self._chunk) + 2 * self.rows * x
        return found if self._chunk == self.rows else found + (self.rows + self._chunk) * x

    def _experts_backward(self, rows: int) -> int:
        w, n = self.work, self._n
        choice = rows * n.top_k * w.size
        output, kept = choice * n.hidden, self._kept_experts(rows)
        left = kept - output - (choice * n.width if w.adapts("down_proj") and not w.dropout else 0)
        activating = left + choice * 3 * n.width
        left -= choice * 2 * n.width
        gathering = left + choice * (2 * n.width + n.hidden * (2 if self._rank("gate_up_proj") else 1))
        return max(kept + output, activating, gathering)
