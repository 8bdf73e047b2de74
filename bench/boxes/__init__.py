"""Boxes: which loss brings them to their target, and what it costs."""
