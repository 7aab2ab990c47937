"""The formula, and how much of it acts where, when and in which region; no file, no host."""
