"""What is computed: from a checkpoint to traced ONNX graphs in a bundle."""
