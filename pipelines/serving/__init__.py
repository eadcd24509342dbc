"""What works with a finished model: over HTTP, in batches, and MLflow's page with a password."""
