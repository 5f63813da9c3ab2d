"""The fast way from images to what was found: one recorded pass, simplified, replayed as a CUDA graph."""
