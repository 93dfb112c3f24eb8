"""What the gManager commands, carried out."""
