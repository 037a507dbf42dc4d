"""Reports about run folders: HTML, Markdown, Weights & Biases. It reads files only and loads no torch."""
