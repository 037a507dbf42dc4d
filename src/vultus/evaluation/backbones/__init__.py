"""Pre-trained networks of evaluation, a file for each. No loss contains them."""
