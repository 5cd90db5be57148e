"""OpenAI's HTTP bodies to engine requests, and sampled tokens back to OpenAI's answers. No server in here."""
