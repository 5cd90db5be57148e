"""Training by several processes: which rank this is, what the ranks tell each other, and their sums."""
