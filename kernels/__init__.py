"""vlmq.kernels."""
