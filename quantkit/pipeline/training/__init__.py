"""The built-in training loop: its settings, losses, steps, and what it keeps on the disk."""
