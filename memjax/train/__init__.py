"""Training the twins: one small decoder with five mixers, at equal parameters, on equal tokens."""
