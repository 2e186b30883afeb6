"""What ranks know of themselves and of the links between them, and what to make of it."""
