"""Pose maths on tensors: rotations, boxes, projection. Metres, pixels, OpenCV camera frame."""
