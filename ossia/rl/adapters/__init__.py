"""Environments of other ecosystems as ours (`PACKAGE:NAME` in a recipe), and ours as reward functions of TRL.

They run in this process, as any code of yours does: an environment of theirs that runs what a model wrote has to see to
that itself.
"""
