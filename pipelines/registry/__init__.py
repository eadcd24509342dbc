"""MLflow: its store, models and versions, and what they are made of."""
