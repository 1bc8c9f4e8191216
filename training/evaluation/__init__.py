"""Which sampler, how many steps, at what cost: tables, reports and cards."""
