"""What answers over HTTP: a model, MLflow's page behind a password."""
