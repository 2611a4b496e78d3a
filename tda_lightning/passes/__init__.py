"""Passes: data through a model and its own `training_step`, without a trainer."""
