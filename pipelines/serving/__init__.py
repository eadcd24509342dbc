"""What works with a finished model: over HTTP, in batches, in a browser, at the command line."""
