"""Pre-trained networks that evaluation needs, a file each; no loss contains them."""
