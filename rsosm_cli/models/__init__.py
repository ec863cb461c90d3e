"""Image encoder, OSM encoder, fusion, heads and checkpoints."""
