"""A plan for a demo that takes seconds."""

from ossia.demo.conversations import Sizes
from ossia.demo.prepare import Plan

SMALL = Plan(
    sizes=Sizes(train_sorting=60, train_chats=120, heldout_sorting=4, heldout_chats=4, questions=4),
    steps=4,
    tokens_per_step=512,
    evaluations=2,
)
