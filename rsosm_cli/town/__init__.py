"""The small town that ``rsosm demo`` makes: its ground, its picture and its map."""
