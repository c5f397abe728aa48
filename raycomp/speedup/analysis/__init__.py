"""Which coordinates are constant, which no output depends on, and which can only go together."""
