"""The pipeline as a job on a remote cluster: what is sent, run, followed, brought back."""
