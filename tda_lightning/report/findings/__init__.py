"""Findings: what a person should look at first, and how sure it is."""
