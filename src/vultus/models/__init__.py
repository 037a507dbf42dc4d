"""Networks and the files that hold them: generators, discriminators, FaceNet, snapshots, hub folders, ONNX files.

No training, no sampling."""
