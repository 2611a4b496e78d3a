"""Results: the objects that attribution returns."""
