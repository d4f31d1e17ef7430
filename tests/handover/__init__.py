"""What one daemon leaves to the next."""
