"""The Hub: uploads, model cards, and checkpoints from elsewhere."""
