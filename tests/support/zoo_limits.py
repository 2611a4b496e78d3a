"""What the recorder cannot do with the models of the zoo, by name and with the reason."""

REFUSED_ROWS: dict[str, str] = {}
REFUSED_TRAINING: dict[str, str] = {}
LEFT_OUT: dict[str, str] = {}
