"""From recordings and weights to what Triton serves: nets, training, fitting, ONNX."""
