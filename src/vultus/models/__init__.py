"""Networks, and the files that hold trained ones: generators, discriminators, the frozen FaceNet, snapshots, folders
of the Hugging Face hub, ONNX files.

A new architecture or encoder belongs here. How networks are trained is in `training`, how faces are sampled in
`sampling`; networks that only evaluation needs are in `evaluation/backbones`.
"""
