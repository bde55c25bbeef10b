"""What answers questions about generated images."""
