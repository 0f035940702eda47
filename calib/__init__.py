"""vlmq.calib."""
