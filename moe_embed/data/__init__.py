"""The wing on the host: text to packed batches. No device code inside."""
