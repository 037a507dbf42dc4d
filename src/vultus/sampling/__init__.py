"""From embeddings and noise to faces: latents, the population prior, conditioning, generation, grids."""
