"""Recording: from rows and optimizer steps to `Step`s. This package does not know Lightning."""
