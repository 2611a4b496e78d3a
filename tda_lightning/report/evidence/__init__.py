"""Evidence: everything that a report is built from, computed once."""
