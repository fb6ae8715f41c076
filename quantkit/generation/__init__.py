"""Generation: prompts in, text out, for one caller or many."""
