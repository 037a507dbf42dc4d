"""Pre-trained networks that only evaluation needs, a file each: face recognition (judges), features for distances of
distributions, perceptual distances. No loss contains them; `loading` says which are available.
"""
