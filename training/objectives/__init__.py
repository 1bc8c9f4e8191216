"""What a step minimises, and at which timesteps."""
