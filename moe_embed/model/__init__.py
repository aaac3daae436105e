"""The wing on the device: the encoder as Flax NNX modules. Knows nothing of files, data or optimisers."""
