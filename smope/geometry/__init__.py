"""Pose maths on tensors: rotations, rigid motions, symmetric objects. Metres, OpenCV camera frame."""
