"""Templates of the model cards, and one card for each example model."""
