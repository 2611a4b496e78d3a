"""Samples: how the items of a dataset are shown."""
