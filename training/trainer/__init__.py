"""One run of training, from its parts to what it leaves."""
