"""Images: decoding, cropping, face alignment, and the marks of generated images (metadata, watermark, C2PA).

No networks and no data sets; only `io` imports torch, where a function takes or returns tensors.
"""
