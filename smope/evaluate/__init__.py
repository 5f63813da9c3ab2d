"""How good poses are: errors of a pose, scores of a data set, and the run of a model over one."""
