"""Origins: which samples of a batch the tensors of a training step come from."""
