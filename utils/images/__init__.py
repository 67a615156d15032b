"""Images, from their files to the batches of a run."""
