"""Low-bit post-training quantization for vision-language models."""
