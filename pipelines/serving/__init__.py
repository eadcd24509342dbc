"""What answers with a model: over HTTP, MLflow's page behind a password, the explorer's page."""
