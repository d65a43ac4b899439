"""The hooks of each place where tokens merge, and what they share."""
