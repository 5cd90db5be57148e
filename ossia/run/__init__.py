"""What a run begins with and what it leaves: what is trained, its result, and answers before and after."""
