"""Dynamics: how an optimizer step changes the effect of earlier ones."""
