"""A refresh of the model by new images: what is checked, decided and remembered."""
