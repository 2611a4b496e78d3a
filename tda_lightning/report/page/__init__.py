"""The page: markup, data and scripts as one file."""
