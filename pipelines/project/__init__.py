"""The project folder: DVC's guard, cleaning up, a look at what is there, local servers."""
