"""This library and the torch library side by side: the same weights and batches, turn by turn, as a ratio."""
