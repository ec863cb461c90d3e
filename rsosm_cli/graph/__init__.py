"""OSM objects of a tile as a heterograph."""
