"""The compiled operators and sampler for ONNX Runtime on a CPU."""
