"""What the codes mean, and how they are used."""
