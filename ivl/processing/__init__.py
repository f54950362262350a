"""Media and conversations into tokens and tiles: one path for training and for inference."""
