"""Imagery sources to one raster, and windowed reading."""
