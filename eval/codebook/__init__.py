"""What the codes stand for, and how they are used."""
