"""`ossia demo`: its conversations, its untrained model, and the story that trains it and shows what it learnt."""
