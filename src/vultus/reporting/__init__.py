"""Reports about run folders and their evaluations: HTML, Markdown, Weights & Biases.

It reads files, writes nothing into a run but the report, and loads no torch. It does not measure; see `evaluation`.
"""
