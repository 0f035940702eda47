"""vlmq.eval."""
