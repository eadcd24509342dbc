"""What `aegan` makes of a trained model: pictures, paths, latents nearer to an image."""
