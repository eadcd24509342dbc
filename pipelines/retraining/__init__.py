"""Scheduled retraining: a ledger of steps, a look at the source, a workplace, a lease, messages."""
