"""Images from anywhere, and the batches of a step."""
