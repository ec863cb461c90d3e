"""Pretraining, fine-tuning, metrics and reports."""
