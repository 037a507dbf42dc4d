"""Pictures: decoding, cropping, face alignment, and the marks that generated pictures carry.

Imports nothing above it: no network, no data set."""
