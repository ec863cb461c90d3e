"""OpenStreetMap sources to one element table."""
