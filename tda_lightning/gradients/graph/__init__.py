"""The autograd graph of a loss: where parameters meet data, what nodes saved, where samples lie."""
