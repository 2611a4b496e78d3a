"""Training dynamics: how an optimizer step changes the effect of earlier steps."""
