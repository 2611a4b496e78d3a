"""Adapters to other libraries: each file is imported only where it is used."""
