"""What may be sampled: Harmony's structure of a turn (`turn.py`), and JSON that matches a schema (`json_text.py`)."""

from ossia.engine.grammar.turn import ANY_OBJECT, Constraint, GrammarCompiler

__all__ = ["ANY_OBJECT", "Constraint", "GrammarCompiler"]
