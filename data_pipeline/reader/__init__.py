"""Batches of clips in the global order, at the speed of memory."""
