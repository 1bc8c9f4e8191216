"""Bits per dimension, and the statistics behind the optimal noise and trajectory."""
