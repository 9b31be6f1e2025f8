"""ONNX files and the certificates that go with them."""
