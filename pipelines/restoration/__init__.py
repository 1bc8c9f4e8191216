"""Restoration: samples of the images that a measurement may have come from."""
