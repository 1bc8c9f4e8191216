"""Samplers that are fitted to a network: their numbers go into its scheduler's config."""
