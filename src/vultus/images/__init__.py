"""Image files and pixels: decoding and cropping, face alignment, the metadata, watermark and signature that mark
generated images, and their detection.

New image formats and new kinds of marks belong here. No network, no data set; only `align` needs dlib.
"""
