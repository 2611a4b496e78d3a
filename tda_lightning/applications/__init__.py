"""Uses of a recorded run: each returns ids with reasons, and changes nothing of the user's."""

__all__: list[str] = []
