"""One module for each verb of the `ddim-schedulers` command line."""
