"""City name to boundary."""
