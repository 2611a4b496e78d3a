"""Capture: read each sample's gradients off the autograd graph while a backward pass runs.

A parameter meets data in few kinds of nodes, whatever module owns it. So the capture walks the
graph of the loss, finds these nodes, proves which of their rows belong to which sample, and hooks
them.
"""
