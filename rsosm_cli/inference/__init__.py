"""Embedding and mapping loops in bounded memory."""
