"""Published coefficients as data, with their sources."""
