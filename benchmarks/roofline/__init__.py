"""What counting bytes, instructions and launches says that a card will take."""
