"""Recording: build `Step`s from rows and optimizer steps. Independent of Lightning."""
