"""Harmony, the conversation format of gpt-oss: vocabulary, rendering with a weight per token, parsing. No torch."""

from ossia.harmony.chat import conversation_from_messages
from ossia.harmony.messages import CHANNELS, EFFORTS, ROLES, Conversation, Effort, Message, Role, System, Tool
from ossia.harmony.o200k import MODEL_ROWS, o200k_harmony_tokenizer_json, prune, write_o200k_harmony
from ossia.harmony.openai_tools import tools_from_openai
from ossia.harmony.parse import Closed, Delta, Opened, Problem, StreamParser, parse_completion
from ossia.harmony.render import Rendered, Renderer, Span, TrainOn
from ossia.harmony.to_openai import messages_to_openai
from ossia.harmony.vocab import HARMONY_SPECIALS, STOPS, Vocabulary

__all__ = [
    "CHANNELS",
    "EFFORTS",
    "HARMONY_SPECIALS",
    "MODEL_ROWS",
    "ROLES",
    "STOPS",
    "Closed",
    "Conversation",
    "Delta",
    "Effort",
    "Message",
    "Opened",
    "Problem",
    "Rendered",
    "Renderer",
    "Role",
    "Span",
    "StreamParser",
    "System",
    "Tool",
    "TrainOn",
    "Vocabulary",
    "conversation_from_messages",
    "messages_to_openai",
    "o200k_harmony_tokenizer_json",
    "parse_completion",
    "prune",
    "tools_from_openai",
    "write_o200k_harmony",
]
