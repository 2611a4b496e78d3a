"""Passes: run data through a model's `training_step` without a trainer, and record rows."""
