"""Charts as plain data, and their drawings."""
