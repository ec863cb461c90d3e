"""The tile store, data sets and batching."""
