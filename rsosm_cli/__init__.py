"""rsosm: from a city's name to its map."""

__version__ = "0.1.0"
