"""Maps, polygons, statistics and previews."""
