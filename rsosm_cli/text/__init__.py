"""Tags to vectors."""
