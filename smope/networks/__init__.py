"""Tensors in, tensors out: the networks know no mesh file, no camera file and no training."""
