"""What every room uses: processes, seeds, storage, folders, figures, versions."""
